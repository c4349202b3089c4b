"""Training runs: prepare, train, record, report. `lorary.train.run` is the function; this is its package."""
