"""The forms that `lorary export` writes: one file per form, whose function `write` takes an `Export`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lorary.errors import ConfigError, Diagnostic, did_you_mean

# Form -> the options that it has beside --to and --base, as the parameters of the command are called.
FORMS: dict[str, tuple[str, ...]] = {
    "peft": ("folded",),
    "merged": ("dtype", "onto", "force"),
    "gguf": ("dtype",),
    "ollama": ("dtype", "base_gguf"),
    "vllm": (),
    "sglang": (),
}


class Export(NamedTuple):
    """A request for an export.

    Args:
        adapter: the adapter folder.
        output: where to write.
        base: the base model as given; None for the one that the adapter names, where the form needs one.
        options: the form's own options that were given, by the names in `FORMS`.
    """

    adapter: Path
    output: Path
    base: str | None
    options: Mapping[str, Any]


def writer(adapter: str, to: str, given: Collection[str]) -> Callable[[Export], None]:
    """The function that writes a form.

    Args:
        adapter: as it was given, for the error.
        to: the name of the form.
        given: the names of the options that were given.

    Raises:
        ConfigError: there is no such form, or it has no such options; every reason.
    """
    problems = []
    if to not in FORMS:
        problems.append(Diagnostic(f"--to {to}", "is not a known format", did_you_mean(to, FORMS)))
    else:
        for name in sorted(set(given) - set(FORMS[to])):
            having = [form for form, options in FORMS.items() if name in options]
            fix = f"leave it out; it is an option of {', '.join(f'--to {form}' for form in having)}"
            problems.append(Diagnostic(f"--{name.replace('_', '-')}", f"--to {to} has no such option", fix))
    if problems:
        raise ConfigError(f"cannot export {adapter}:", problems)
    written: Callable[[Export], None] = importlib.import_module(f"lorary.cli._export.{to}").write
    return written
