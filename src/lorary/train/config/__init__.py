"""A run's configuration: one strict value, read from YAML."""

from lorary._deprecated import keep_old_names

keep_old_names("lorary.train.config")
