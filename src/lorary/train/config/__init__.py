"""A run's configuration: one strict value, read from YAML or a dictionary."""

from lorary._deprecated import keep_old_names
from lorary.train.config.config import Config
from lorary.train.config.load import from_dict, load

__all__ = ["Config", "from_dict", "load"]

keep_old_names("lorary.train.config")
