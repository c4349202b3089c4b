"""A resolved configuration in short: what the user set, and what was chosen; defaults are counted."""

from __future__ import annotations

from typing import Any

from lorary.train.config.config import Config
from lorary.train.config.yaml_source import dump


def summary(given: Config, resolved: Config) -> str:
    """YAML of the keys that the user set, and comments for the others.

    Args:
        given: as it was read.
        resolved: the same run after `resolve`.
    """
    before = given.model_dump(mode="json", exclude_unset=True)
    tree: dict[str, Any] = {}
    chosen: list[str] = []
    defaults = 0
    start = given.model_dump(mode="json")
    for key, value in resolved.model_dump(mode="json").items():
        if not isinstance(value, dict):
            tree |= {key: value} if key in before else {}
            defaults += key not in before
            continue
        mine = before.get(key, {})
        if given_here := {name: inner for name, inner in value.items() if name in mine}:
            tree[key] = given_here
        rest = [name for name in value if name not in mine]
        moved = [name for name in rest if value[name] != start[key][name]]
        chosen += [f"# {key}.{name}: {_line(value[name])}" for name in moved]
        defaults += len(rest) - len(moved)
    lines = ["# chosen:", *chosen] if chosen else []
    return "\n".join([dump(tree).rstrip(), *lines, f"# {defaults} other keys keep their defaults (--all)"])


def _line(value: Any) -> str:
    """A value in one line of YAML."""
    return (
        dump({"value": value[0] if isinstance(value, list) and len(value) == 1 else value}).strip().partition(": ")[2]
    )
