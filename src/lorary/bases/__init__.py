"""Packed bases on disk: read from plain checkpoints and from bitsandbytes' own, and written as such."""
