"""Forward passes in which each row has its own adapters."""
