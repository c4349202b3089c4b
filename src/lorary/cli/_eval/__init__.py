"""The steps of `lorary eval`: its data, the measurements, and lm-evaluation-harness."""
