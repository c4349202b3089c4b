"""Loading a base model: from the Hub or a folder, quantised while it is read, or without weights."""
