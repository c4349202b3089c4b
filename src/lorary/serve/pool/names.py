"""What is wrong with an adapter's name: no name at all, taken, or unknown."""

from __future__ import annotations

from collections.abc import Collection

from lorary.errors import Diagnostic, suggestion
from lorary.files.strict_json import show
from lorary.serve.interface import UnknownAdapterError
from lorary.serve.pool.adapter_root import invalid_name

_MOST_COMPARED = 500  # names that a misspelt one is compared with


def name_problems(name: str, reserved: Collection[str], *, taken: bool) -> list[Diagnostic]:
    """Why an adapter cannot be loaded under a name."""
    if what := invalid_name(name):
        return [Diagnostic("name", what)]
    if name in reserved:
        return [Diagnostic("name", f"{show(name)} is the base's")]
    return [Diagnostic("name", f"{show(name)} is taken", "unload it first, or replace it")] if taken else []


def unknown_name(name: str, known: Collection[str], meant: str | None) -> UnknownAdapterError:
    """The error for a name that no adapter has.

    Args:
        name: the name.
        known: names that may have been meant.
        meant: the one that was, if it is clear.
    """
    if what := invalid_name(name):
        return UnknownAdapterError("unknown adapter:", [Diagnostic("", what)])
    fix = f"did you mean `{meant}`?" if meant else suggestion(name, known) if len(known) <= _MOST_COMPARED else ""
    return UnknownAdapterError("unknown adapter:", [Diagnostic("", f"no adapter has the name {show(name)}", fix)])
