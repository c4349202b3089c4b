"""Training: configurations, data, and the loop (the only floor that touches TRL)."""
