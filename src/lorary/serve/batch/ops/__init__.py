"""Kernels that add the adapters' terms to the output of a base layer: a reference, for a CPU, for a GPU."""
