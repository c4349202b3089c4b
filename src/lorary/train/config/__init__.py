"""A run's configuration: one strict value, read from YAML."""
