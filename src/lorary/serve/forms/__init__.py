"""The serving form of an adapter: the terms that a batch computes for its rows."""
