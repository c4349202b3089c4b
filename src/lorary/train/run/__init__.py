"""A training run: prepare, run, record, report."""
