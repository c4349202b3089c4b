"""The serving form of an adapter: what a batch computes for its rows, whatever its method."""
