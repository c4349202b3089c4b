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

WIDTH = 4096  # of the layer for which costs are shown: an attention projection of LLaMA-2-7B


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

    Methods combine: --method lora,rslora,lora+ takes the components of all three. Not sure? lorary methods --choose
    """
    if choosing or answers is not None:
        from lorary.cli._method_chooser import choose

        print(choose(_ask() if answers is None else _parse_answers(answers)).yaml(), end="")
        return
    rows = table() if name is None else [_find(name, table())]
    if markdown:
        print(_page(name), end="")
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
        lines += [f"use: {row['say']}" if row["say"] != row["name"] else "", f"options: {options}" if options else ""]
        for line in filter(None, lines):
            print(textwrap.fill(line, width, initial_indent="    ", subsequent_indent="        "))


def table() -> list[dict[str, Any]]:
    """One entry per method, in the order of their files; functions at the end."""
    import lorary
    from lorary.spec.presets import FUNCTIONS

    presets = [
        _row(preset, preset.changes, preset.name)
        | {"options": preset.parameters, "lr": preset.lr}
        | _size(lorary.method(preset.name, **preset.example))
        for preset in lorary.presets().values()
    ]
    no_costs: dict[str, Any] = {"options": {}, "lr": None, "numbers": None, "bytes": None}
    return presets + [_row(found, (found.changes,), found.say) | no_costs for found in FUNCTIONS.values()]


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


def _page(name: str | None) -> str:
    """The documentation page of one method."""
    from lorary.cli.method_page import method_page
    from lorary.errors import ConfigError, Diagnostic
    from lorary.spec.presets import FUNCTIONS

    if name is None:
        raise ConfigError("--markdown prints one page:", [Diagnostic("NAME", "is missing", "name a method")])
    name = _find(name, table())["name"]
    if name in FUNCTIONS:
        what = "is a function, not a preset; its page is written by hand"
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
    site = AdaptedSite(Site("layer", "linear", WIDTH, WIDTH, False), method)
    unshared = [shape for role, shape in site.shapes.items() if role not in site.delta.shared]
    stored = sum(math.prod(shape) for shape in (*unshared, *site.starts.values()))
    state = sum(rule.state_bytes(site.shapes) for rule in method.rules)
    return {"numbers": site.trainable, "bytes": 4 * stored + 12 * site.trainable + state}


def _costs(row: dict[str, Any]) -> str:
    size = f"{row['bytes'] / 2**20:.2f} MiB with gradients, AdamW and rules"
    return f"trains: {row['numbers']:,} parameters for a {WIDTH} x {WIDTH} weight; {size}"


def _find(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of one method, by its name or an earlier one."""
    from lorary.errors import ConfigError, Diagnostic, did_you_mean
    from lorary.spec.presets import resolve

    by_name = {row["name"]: row for row in rows}
    normalised = name.lower().replace("_", "-").replace(" ", "-")
    unknown: list[Diagnostic] = []
    found = resolve([name], unknown)
    if normalised not in by_name and not unknown:
        normalised = found[-1].name
    if normalised not in by_name:
        raise ConfigError("unknown method:", [Diagnostic(name, "not found", did_you_mean(normalised, by_name))])
    return by_name[normalised]


def _ask() -> dict[str, str]:
    """Answers typed on the terminal. Questions go to standard error: standard output holds the configuration alone."""
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


def _parse_answers(text: str) -> dict[str, str]:
    """`memory=tight,quality=best` as question -> answer."""
    from lorary.errors import ConfigError, Diagnostic

    answers: dict[str, str] = {}
    problems = []
    for part in filter(None, map(str.strip, text.split(","))):
        key, equals, answer = part.partition("=")
        if not equals:
            problems.append(Diagnostic("--answers", f"{key!r} has no answer", f"write {key}=..."))
        elif key in answers:
            problems.append(Diagnostic("--answers", f"{key!r} is answered twice"))
        answers[key.strip()] = answer.strip()
    if problems:
        raise ConfigError("invalid answers:", problems)
    return answers
