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
    "qlora": ("y = NF4(W) x + b + s B A x", "Dettmers et al. 2023, arXiv:2305.14314"),
    "adalora": ("W' = W + s P E Q, with a budget for the rank", "Zhang et al. 2023, arXiv:2303.10512"),
    "delta-lora": ("W itself follows the change of B A", "Zi et al. 2023, arXiv:2309.02411"),
    "o-lora": ("A stays orthogonal to earlier tasks' A", "Wang et al. 2023, arXiv:2310.14152"),
    "lora-drop": ("B A only where its output is large", "Zhou et al. 2024, arXiv:2402.07721"),
    "longlora": ("shifted sparse attention, norms and embeddings in full", "Chen et al. 2023, arXiv:2309.12307"),
    "lorahub": (
        "the weighted sum of many adapters, weights found without gradients",
        "Huang et al. 2023, arXiv:2307.13269",
    ),
    "s-lora": ("thousands of adapters served on one base", "Sheng et al. 2023, arXiv:2311.03285"),
}


def methods(
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
    rows = table()
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
        for line in (*lines, f"options: {options}" if options else ""):
            if line:
                print(textwrap.fill(line, width, initial_indent="    ", subsequent_indent="        "))
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
            "options": preset.parameters,
            "lr": preset.lr,
        }
        for name, preset in presets.items()
    ]
    silent: dict[str, Any] = {"changes": [], "when": "", "options": {}, "lr": None}
    planned = [
        {"name": name, "available": False, "equation": equation}
        | {"year": lorary.Preset(name, dict, citation).year, "citation": citation}
        | silent
        for name, (equation, citation) in PLANNED.items()
        if name not in presets
    ]
    return ready + planned


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
        raise ConfigError("these answers cannot be read:", problems)
    return {key.strip(): answer.strip() for key, _, answer in pairs}
