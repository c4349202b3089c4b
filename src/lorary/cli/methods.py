"""lorary methods: the table of methods, from their presets."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lorary.spec.presets import PlanFunction, Preset

# A layer to count at: an attention projection of LLaMA-2-7B.
WIDE = 4096


def methods(
    name: Annotated[str | None, typer.Argument(help="A method; empty: all of them.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every option and its default.")] = False,
    choosing: Annotated[bool, typer.Option("--choose", help="Ask a few questions; print a configuration.")] = False,
    answers: Annotated[
        str | None, typer.Option("--answers", help="Answers to --choose, such as memory=tight,quality=best.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the documentation page of NAME.")] = False,
) -> None:
    """Show every method: its equation, what it changes, when to use it, its options.

    Methods combine: --method lora,rslora,lora+ takes the words of all three. Not sure? lorary methods --choose
    """
    if choosing or answers is not None:
        from lorary.cli._method_chooser import choose

        print(choose(_asked() if answers is None else _given(answers)).yaml(), end="")
        return
    rows = table() if name is None else [_named(name, table())]
    if markdown:
        print(_page(rows), end="")
    elif as_json:
        print(json.dumps(rows, indent=2))
    else:
        _print(rows)
        if name is None:
            print(f"{len(rows)} methods", file=sys.stderr)


def _print(rows: list[dict[str, Any]]) -> None:
    width = max(shutil.get_terminal_size((100, 24)).columns, 40)
    for row in rows:
        print(f"{row['name']} ({row['year'] or 'the baseline'})")
        options = ", ".join(f"{key}={value}" for key, value in row["options"].items())
        lines = [row["equation"], row["when"], row["citation"] if row["year"] else ""]
        lines += [f"changes: {', '.join(row['changes'])}", _costs(row) if row["numbers"] else ""]
        lines += [f"say: {row['say']}" if row["say"] != row["name"] else "", f"options: {options}" if options else ""]
        for line in filter(None, lines):
            print(textwrap.fill(line, width, initial_indent="    ", subsequent_indent="        "))


def table() -> list[dict[str, Any]]:
    """One entry per method, in the order of their files; functions of a plan at the end."""
    import lorary
    from lorary.spec.presets import FUNCTIONS

    presets = [
        _row(preset, preset.changes, preset.name)
        | {"options": preset.parameters, "lr": preset.lr}
        | _size(lorary.method(preset.name))
        for preset in lorary.presets().values()
    ]
    silent: dict[str, Any] = {"options": {}, "lr": None, "numbers": None, "bytes": None}
    return presets + [_row(found, (found.changes,), found.say) | silent for found in FUNCTIONS.values()]


def _row(found: Preset | PlanFunction, changes: Sequence[str], say: str) -> dict[str, Any]:
    return {
        "name": found.name,
        "equation": found.summary,
        "year": found.year,
        "citation": found.citation,
        "changes": list(changes),
        "when": found.when,
        "say": say,
    }


def _page(rows: list[dict[str, Any]]) -> str:
    """The documentation page of one method."""
    import lorary
    from lorary.cli.method_page import method_page
    from lorary.errors import ConfigError, Diagnostic

    if len(rows) != 1:
        raise ConfigError("--markdown prints one page:", [Diagnostic("NAME", "is missing", "name a method")])
    name = rows[0]["name"]
    if name not in lorary.presets():
        what = "is a function of a plan; its page is written by hand"
        raise ConfigError("this page cannot be generated:", [Diagnostic(name, what)])
    return method_page(name)


def _size(method: Any) -> dict[str, int | None]:
    """The trainable parameters at a square linear layer, and the bytes of its adapter in training.

    In fp32: parameters, gradients and AdamW's two moments; the layer's frozen tensors, such as its start; and the state
    of the rules. Tensors shared by all layers are left out.
    """
    import math

    from lorary.spec.placement import AdaptedSite
    from lorary.spec.site import Site

    if method.delta is None:
        return {"numbers": None, "bytes": None}
    placed = AdaptedSite(Site("layer", "linear", WIDE, WIDE, False), method)
    own = [shape for role, shape in placed.shapes.items() if role not in placed.delta.shared]
    held = sum(math.prod(shape) for shape in (*own, *placed.starts.values()))
    state = sum(rule.state_bytes(placed.shapes) for rule in method.rules)
    return {"numbers": placed.trainable, "bytes": 4 * held + 12 * placed.trainable + state}


def _costs(row: dict[str, Any]) -> str:
    held = f"{row['bytes'] / 2**20:.2f} MiB with gradients, AdamW and rules"
    return f"trains: {row['numbers']:,} numbers beside a weight of {WIDE} x {WIDE}; {held}"


def _named(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of one method."""
    from lorary.errors import ConfigError, Diagnostic, did_you_mean

    said = name.lower().replace("_", "-").replace(" ", "-")
    for row in rows:
        if row["name"] == said:
            return row
    hint = did_you_mean(said, [row["name"] for row in rows])
    raise ConfigError("unknown method:", [Diagnostic(name, "is no method that lorary knows", hint)])


def _asked() -> dict[str, str]:
    """The answers, asked for on standard error, so that standard output holds the configuration alone."""
    from lorary.cli._method_chooser import QUESTIONS

    answers = {}
    for key, question in QUESTIONS.items():
        print(question.text, file=sys.stderr)
        for answer, meaning in question.answers.items():
            print(f"    {answer:<9} {meaning}", file=sys.stderr)
        answer = ""
        while answer not in question.answers:
            print(f"{key} [{question.default}]: ", end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
            if not line:
                raise typer.Abort
            answer = line.strip() or question.default
        answers[key] = answer
    return answers


def _given(text: str) -> dict[str, str]:
    """`memory=tight,quality=best` as answers by question."""
    from lorary.errors import ConfigError, Diagnostic

    pairs = [part.strip().partition("=") for part in text.split(",") if part.strip()]
    problems = [
        Diagnostic("--answers", f"{key!r} has no answer", f"write {key}=...") for key, is_, _ in pairs if not is_
    ]
    twice = sorted({key for key, _, _ in pairs if [k for k, _, _ in pairs].count(key) > 1})
    problems += [Diagnostic("--answers", f"{key!r} is answered twice") for key in twice]
    if problems:
        raise ConfigError("invalid answers:", problems)
    return {key.strip(): answer.strip() for key, _, answer in pairs}
