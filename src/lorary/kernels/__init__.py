"""Fused kernels, each with a reference implementation in plain operations."""
