"""`lorary inspect context`."""
