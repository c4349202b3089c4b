"""Serving: thousands of adapters from one base. Knows nothing of `train` and `cli`."""
