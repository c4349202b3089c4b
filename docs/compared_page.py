"""The page of the stored comparisons: the tables of `lorary compare`, made again from the recorded runs."""

from __future__ import annotations

from pathlib import Path

import yaml
from numbers_page import table

from lorary.analysis.comparison.record import Comparison
from lorary.analysis.comparison.statistics import findings
from lorary.analysis.comparison.store import read
from lorary.analysis.comparison.tables import TextTable, costs, quality
from lorary.analysis.comparison.words import remarks, verdict
from lorary.cli.method_page import cell

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
RECORDS = BENCHMARKS / "results" / "comparisons"

HEAD = """# Comparisons

Measured by `lorary compare` on the built-in base: 3,049,920 parameters, in float32, on a CPU. Every method had the same
search for its learning rate. Losses are in nats per token, with 95 % intervals, on test rows that were not used to
choose anything. Differences are paired row by row, and the intervals beside the verdicts hold jointly for all pairs of a
table. A rate marked "not tuned" is the lowest or the highest that was tried. "Forgotten" is the rise in the loss on
Python code, which the base was trained on. The methods took turns on a shared machine, so compare their seconds with
each other only.

This is how methods behave at a small size. It does not tell which one is best for a model of seven billion parameters;
[what is known about that](how-to/choose-a-method.md) comes from larger runs by others.
"""

# record -> its heading, and what is asked
ASKED = {
    "baselines": (
        "LoRA and what came before it: C headers",
        "Full fine-tuning, bottleneck adapters, prefix and prompt tuning, (IA)³, and LoRA at two sizes. BitFit is not "
        "among them: the base has no biases.",
    ),
    "baselines-prose": (
        "LoRA and what came before it: English prose",
        "The same methods on pages of the language reference.",
    ),
    "layers": (
        "Which layers",
        "LoRA of about equally many numbers at different layers: at fewer layers the rank is higher.",
    ),
    "ranks": ("Which rank", "LoRA at all linear layers, with alpha = 2 r, at five ranks."),
    "claims": (
        "Members of the family",
        "Methods whose papers claim to be better than LoRA, faster, or as good for less.",
    ),
}
CLAIMS = """
## What papers claim

`benchmarks/claims` asks the same question differently: with more seeds and the loss during training, it measures how many
steps a method takes to reach a loss, and what a second task does to the first. The joint intervals decide;
`benchmarks/README.md` describes the runs.

"""


def compared_page() -> str:
    """The page of all comparisons that are stored."""
    sections = [_section(name) for name in ASKED if (RECORDS / f"{name}.json").exists()]
    return "".join([HEAD, *sections, CLAIMS, _claims()])


def _claims() -> str:
    """The table of the claims benchmark, which its own page has from the stored runs."""
    page = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    between = page.partition("<!-- claims: written by benchmarks/claims -->")[2]
    return between.strip().partition("\n\n")[0] + "\n"


def _section(name: str) -> str:
    title, asked = ASKED[name]
    comparison = read(RECORDS / f"{name}.json")
    found = findings(comparison)
    notes = " ".join([verdict(found), *remarks(found)])
    tables = "\n\n".join(_markdown(one) for one in (quality(found), costs(found)))
    return f"\n## {title}\n\n{asked} {_size(comparison)}\n\n{tables}\n\n{notes}\n"


def _size(comparison: Comparison) -> str:
    """What was trained, and how the comparison is repeated."""
    settings = comparison.settings
    training = yaml.safe_load(settings["config"])["training"]
    rows = settings["rows"]
    return (
        f"{settings['steps']} steps of {training['batch_size']} rows each, {len(comparison.trials)} runs; rates chosen "
        f"on {rows['validation']} rows, methods judged on {rows['test']} rows with {settings['seeds']} seeds each. "
        f"`{settings['command']}`"
    )


def _markdown(of: TextTable) -> str:
    return table(of.head, [[cell(text) for text in row] for row in of.rows])
