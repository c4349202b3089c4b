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
    "dora": ("W' = m (W + s B A) / ||W + s B A||", "Liu et al. 2024, arXiv:2402.09353"),
    "glora": ("W' = W + W A + B, b' = b + b D + E + W C", "Chavan et al. 2023, arXiv:2306.07967"),
    "pissa": ("B A starts at W's principal part", "Meng et al. 2024, arXiv:2404.02948"),
    "olora": ("B A starts at W's orthonormal part", "Buyukakyuz 2024, arXiv:2406.01775"),
    "adalora": ("W' = W + s P E Q, with a budget for the rank", "Zhang et al. 2023, arXiv:2303.10512"),
    "vera": ("W' = W + diag(b) B diag(d) A, B and A shared", "Kopiczko et al. 2023, arXiv:2310.11454"),
    "melora": ("W' = W + s diag(B1 A1, ..., Bn An)", "Ren et al. 2024, arXiv:2402.17263"),
    "multilora": ("W' = W + the sum of gamma_i B_i A_i", "Wang et al. 2023, arXiv:2311.11501"),
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
) -> None:
    """Show every method, its equation and its options.

    Methods combine: --method lora,rslora,lora+ takes the words of all three.
    """
    rows = table()
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    width = max(shutil.get_terminal_size((100, 24)).columns, 40)
    for row in rows:
        name = row["name"] if row["available"] else f"{row['name']} (planned)"
        print(name)
        options = ", ".join(f"{key}={value}" for key, value in row["options"].items())
        for line in (row["equation"], row["citation"], f"options: {options}" if options else ""):
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
            "citation": preset.citation,
            "options": preset.parameters,
            "lr": preset.lr,
        }
        for name, preset in presets.items()
    ]
    planned: list[dict[str, Any]] = [
        {"name": name, "available": False, "equation": equation, "citation": citation, "options": {}, "lr": None}
        for name, (equation, citation) in PLANNED.items()
        if name not in presets
    ]
    return ready + planned
