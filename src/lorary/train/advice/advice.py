"""Advice as a value: recommended settings with their reasons and sources, and the configuration that follows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorary.train.advice.facts import Facts
from lorary.train.config.config import Config


@dataclass(frozen=True)
class Recommendation:
    """One advised setting.

    Args:
        key: of the configuration, such as `training.lr`.
        value: the advised value; None leaves the key empty.
        reason: in one sentence.
        source: of the rule behind it.
        given: the user's own value, which the configuration keeps; None if the user left the key open.
    """

    key: str
    value: Any
    reason: str
    source: str
    given: Any = None

    @property
    def chosen(self) -> Any:
        """The value in the advised configuration."""
        return self.value if self.given is None else self.given

    @property
    def sentence(self) -> str:
        """The reason with its source; of a value that the user chose, the advised one as well."""
        advised = "" if self.given in (None, self.value) else f"Yours; {shown(self.value)} is advised. "
        return f"{advised}{self.reason} [{self.source}]"


@dataclass(frozen=True)
class Advice:
    """The advised configuration of a run. Prints as a list of settings with their reasons.

    Args:
        config: the configuration, with every recommendation that the user has not overruled.
        recommendations: in the order of the decisions.
        warnings: what may spoil the run whatever the settings.
        notes: of the data and the model.
        facts: what the rules looked at.
    """

    config: Config
    recommendations: tuple[Recommendation, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    facts: Facts

    @property
    def reasons(self) -> Mapping[str, str]:
        """key -> the reason for its value."""
        return {one.key: one.sentence for one in self.recommendations}

    def to_dict(self) -> dict[str, Any]:
        """The advice in JSON types."""
        return {
            "config": self.config.model_dump(mode="json", exclude_unset=True),
            "recommendations": [dataclasses.asdict(one) for one in self.recommendations],
            "warnings": list(self.warnings),
            "notes": list(self.notes),
            "facts": self.facts.to_dict(),
        }

    def __str__(self) -> str:
        width = max(len(one.key) for one in self.recommendations)
        lines = [f"{one.key:<{width}}  {shown(one.chosen)}\n    {one.sentence}" for one in self.recommendations]
        return "\n".join([*lines, *(f"warning   {warning}" for warning in self.warnings)])


def shown(value: Any) -> str:
    """A value in one line; of a long table, its size.

    >>> shown(("lora", "dora")), shown(0.00031)
    ('lora, dora', '0.00031')
    """
    if isinstance(value, Mapping) and len(value) > 3:
        return f"{len(value)} entries, {min(value.values())} to {max(value.values())}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {inner}" for key, inner in value.items())
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
