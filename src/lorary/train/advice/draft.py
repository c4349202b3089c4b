"""A configuration in the making: what the user has set stays, everything else is recommended."""

from __future__ import annotations

from typing import Any

from lorary.train.advice.advice import Recommendation
from lorary.train.config.config import SECTIONS, Config


class Draft:
    """The recommendations so far, over a configuration.

    Args:
        given: as the user wrote it.
        read: with what the data say: the task and the labels.

    Attributes:
        config: with the recommendations so far.
        recommendations: in order.
        warnings: so far.
    """

    def __init__(self, given: Config, read: Config) -> None:
        self.given, self.config = given, read
        self.recommendations: list[Recommendation] = []
        self.warnings: list[str] = []

    def is_given(self, key: str) -> bool:
        """Whether the user has set a key."""
        section, _, name = key.rpartition(".")
        return name in _section(self.given, section).model_fields_set

    def value(self, key: str) -> Any:
        """The value of a key so far."""
        section, _, name = key.rpartition(".")
        return getattr(_section(self.config, section), name)

    def recommend(self, key: str, value: Any, reason: str, source: str) -> Any:
        """Recommend a value, and return the one that holds: the user's own if there is one."""
        given = self.value(key) if self.is_given(key) else None
        self.recommendations = [one for one in self.recommendations if one.key != key]
        self.recommendations.append(Recommendation(key, value, reason, source, given))
        if given is None and value is not None:
            self.config = changed(self.config, {key: value})
        return value if given is None else given


def changed(config: Config, values: dict[str, Any]) -> Config:
    """A configuration with other values of some dotted keys."""
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        new = _section(config, section).model_copy(update={name: value})
        config = config.model_copy(update={section: new}) if section else new
    return config


def _section(config: Config, name: str) -> Any:
    assert name in SECTIONS, name
    return getattr(config, name) if name else config
