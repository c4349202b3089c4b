"""The parts of `lorary compare`."""
