"""The serving form of an adapter of any method: the terms that a batch computes for its rows."""
