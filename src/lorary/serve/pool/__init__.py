"""Adapters from disk to the host to the base's device, within one byte budget, and their names."""
