"""lorary methods: what can be learnt with, as a table."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from typing import Annotated, Any

import typer

# The rest of the family: name, equation, citation. A method moves out of here when its file arrives.
PLANNED = {
    "lorahub": (
        "the weighted sum of many adapters, weights found without gradients",
        "Huang et al. 2023, arXiv:2307.13269",
    ),
    "s-lora": ("thousands of adapters served on one base", "Sheng et al. 2023, arXiv:2311.03285"),
}

# What is here, but is a function and not words: name, equation, citation, when to use it, how it is said.
FUNCTIONS = {
    "lora-drop": (
        "g_l = sum over x of |s B_l A_l x_l|^2; layers with a small share of it share one LoRA",
        "Zhou et al. 2024, arXiv:2402.07721",
        "For fewer numbers than LoRA's, where a short probe on the same data is affordable.",
        "method: {drop: {threshold: 0.9}} in a configuration, or lorary.drop_layers(plan, importance)",
    ),
}

# A layer to count at: an attention projection of LLaMA-2-7B.
WIDE = 4096


def methods(
    name: Annotated[str | None, typer.Argument(help="A method; empty: all of them.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every option and its default.")] = False,
    choosing: Annotated[bool, typer.Option("--choose", help="Ask a few questions; print a configuration.")] = False,
    answers: Annotated[
        str | None, typer.Option("--answers", help="What --choose would ask, such as memory=tight,quality=best.")
    ] = None,
) -> None:
    """Show every method: its equation, what it changes, when to use it, its options.

    Methods combine: --method lora,rslora,lora+ takes the words of all three. Not sure? lorary methods --choose
    """
    if choosing or answers is not None:
        from lorary.cli.choosing import choose

        print(choose(_asked() if answers is None else _given(answers)).yaml(), end="")
        return
    rows = table() if name is None else [_named(name, table())]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    width = max(shutil.get_terminal_size((100, 24)).columns, 40)
    for row in rows:
        planned = "" if row["available"] else ", planned"
        print(f"{row['name']} ({row['year'] or 'the baseline'}{planned})")
        options = ", ".join(f"{key}={value}" for key, value in row["options"].items())
        lines = [row["equation"], row["when"], row["citation"] if row["year"] else ""]
        lines += [f"changes: {', '.join(row['changes'])}" if row["changes"] else ""]
        lines += [_costs(row) if row["numbers"] else "", f"say: {row['say']}" if row["say"] != row["name"] else ""]
        for line in (*lines, f"options: {options}" if options else ""):
            if line:
                print(textwrap.fill(line, width, initial_indent="    ", subsequent_indent="        "))
    if name is not None:
        return
    ready = sum(row["available"] for row in rows)
    print(f"{ready} methods, {len(rows) - ready} planned", file=sys.stderr)


def table() -> list[dict[str, Any]]:
    """One entry per method, those to come at the end."""
    import lorary

    presets = lorary.presets()
    ready = [
        {
            "name": name,
            "available": True,
            "equation": preset.summary,
            "year": preset.year,
            "citation": preset.citation,
            "changes": list(preset.changes),
            "when": preset.when,
            "say": name,
            "options": preset.parameters,
            "lr": preset.lr,
        }
        | _size(lorary.method(name))
        for name, preset in presets.items()
    ]
    silent: dict[str, Any] = {"options": {}, "lr": None, "numbers": None, "bytes": None}

    def year(citation: str) -> int | None:
        return lorary.Preset("", dict, citation).year

    functions = [
        {"name": name, "available": True, "equation": equation, "year": year(citation), "citation": citation}
        | {"changes": ["which layers share what they learn"], "when": when, "say": say}
        | silent
        for name, (equation, citation, when, say) in FUNCTIONS.items()
    ]
    planned = [
        {"name": name, "available": False, "equation": equation, "year": year(citation), "citation": citation}
        | {"changes": [], "when": "", "say": name}
        | silent
        for name, (equation, citation) in PLANNED.items()
        if name not in presets
    ]
    return ready + functions + planned


def _size(method: Any) -> dict[str, int | None]:
    """How many numbers train at a square linear layer, and the bytes that they take in training.

    In 32 bits: the number, its gradient and AdamW's two moments; what the layer has that is frozen, such as where it
    started; and the state of the rules. What all layers share is left out.
    """
    import math

    from lorary.placed import Placed
    from lorary.sites import Site

    if method.delta is None:
        return {"numbers": None, "bytes": None}
    placed = Placed(Site("layer", "linear", WIDE, WIDE, False), method)
    own = [shape for role, shape in placed.shapes.items() if role not in placed.delta.shared]
    held = sum(math.prod(shape) for shape in (*own, *placed.starts.values()))
    state = sum(rule.holds(placed.shapes) for rule in method.rules)
    return {"numbers": placed.trainable, "bytes": 4 * held + 12 * placed.trainable + state}


def _costs(row: dict[str, Any]) -> str:
    held = f"{row['bytes'] / 2**20:.2f} MiB with gradients, AdamW and rules"
    return f"trains: {row['numbers']:,} numbers beside a weight of {WIDE} x {WIDE}; {held}"


def _named(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of one method."""
    from lorary.errors import ConfigError, Problem, did_you_mean

    said = name.lower().replace("_", "-").replace(" ", "-")
    for row in rows:
        if row["name"] == said:
            return row
    hint = did_you_mean(said, [row["name"] for row in rows])
    raise ConfigError("unknown method:", [Problem(name, "is no method that lorary knows", hint)])


def _asked() -> dict[str, str]:
    """The answers, asked for on standard error, so that standard output is left to the configuration."""
    from lorary.cli.choosing import QUESTIONS

    answers = {}
    for question in QUESTIONS:
        print(question.text, file=sys.stderr)
        for answer, meaning in question.answers.items():
            print(f"    {answer:<9} {meaning}", file=sys.stderr)
        answer = ""
        while answer not in question.answers:
            print(f"{question.key} [{question.default}]: ", end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
            if not line:
                raise typer.Abort
            answer = line.strip() or question.default
        answers[question.key] = answer
    return answers


def _given(text: str) -> dict[str, str]:
    """`memory=tight,quality=best` as answers by question."""
    from lorary.errors import ConfigError, Problem

    pairs = [part.strip().partition("=") for part in text.split(",") if part.strip()]
    problems = [Problem("--answers", f"{key!r} has no answer", f"write {key}=...") for key, is_, _ in pairs if not is_]
    twice = sorted({key for key, _, _ in pairs if [k for k, _, _ in pairs].count(key) > 1})
    problems += [Problem("--answers", f"{key!r} is answered twice") for key in twice]
    if problems:
        raise ConfigError("invalid answers:", problems)
    return {key.strip(): answer.strip() for key, _, answer in pairs}
