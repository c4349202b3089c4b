"""`lorary inspect adapter`, `intrinsic` and `gradients`."""
