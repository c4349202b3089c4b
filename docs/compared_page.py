"""The page of the stored comparisons: the tables of `lorary compare`, made again from the recorded runs."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import yaml
from numbers_page import table

from lorary.analysis.comparison.pictures import differences_svg
from lorary.analysis.comparison.statistics import Findings, findings
from lorary.analysis.comparison.store import read
from lorary.analysis.comparison.tables import TextTable, costs, quality, serving
from lorary.analysis.comparison.words import remarks, verdict
from lorary.cli.method_page import cell

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
RECORDS = BENCHMARKS / "results" / "comparisons"

HEAD = """# Comparisons

With the learning rate tuned for each of them, which methods differ? On the built-in base of 3,049,920 parameters:

{answers}

Everything here but the last table was measured by `lorary compare`, in float32, on a CPU. Every method had the same
search for its learning rate. Losses are in nats per token, with 95 % intervals, on test rows that were not used to
choose anything. Differences are paired row by row, and the intervals beside the verdicts hold jointly for all pairs of
a table. A rate marked "not tuned" is the lowest or the highest that was tried. "Forgotten" is the rise in the loss on
Python code, which the base was trained on. Times are those of one small CPU, so compare them with each other only:
training steps were timed in turns, and a forward pass (one test row, a batch of one) beside one of the base.

This is how methods behave at a small size. It does not tell which one is best for a model of seven billion parameters;
[what is known about that](how-to/choose-a-method.md) comes from larger runs by others.
"""

# record -> its heading, and what is asked
ASKED = {
    "baselines": ("LoRA and what came before it, on C headers", "CPython's C headers."),
    "baselines-prose": ("LoRA and what came before it, on English prose", "Pages of the language reference."),
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
BASELINES = {"baselines": "C headers", "baselines-prose": "prose"}
SIZES = ("trained numbers", "file", "context taken", "forward pass / base", "merged / base")
BEFORE = """
## LoRA and what came before it

Full fine-tuning, bottleneck adapters (Houlsby), BitFit, (IA)³, prefix tuning and prompt tuning beside LoRA, on {tasks}.
BitFit trains biases, and the built-in base has none. In these runs the base has a bias of zeros in every linear
layer, the same function of the same weights. "sd" is the standard deviation of the held-out loss over the seeds, which
three seeds tell roughly; "merged" is the time of a forward pass after merging, where a method merges.

"""
CLAIMS = """
## What papers claim

`benchmarks/claims` asks the same question differently: with more seeds and the loss during training, it measures how
many steps a method takes to reach a loss, and what a second task does to the first. The joint intervals decide;
`benchmarks/README.md` describes the runs.

"""


def compared_page() -> str:
    """The page of all comparisons that are stored."""
    found = stored()
    answers = "\n".join(f"* **{ASKED[name][0]}:** {verdict(of)}" for name, of in found.items())
    first = [name for name in BASELINES if name in found]
    sections = [_baselines({name: found[name] for name in first})] if first else []
    sections += [_section(name, of) for name, of in found.items() if name not in BASELINES]
    return "".join([HEAD.format(answers=answers), *sections, CLAIMS, _claims()])


def stored() -> dict[str, Findings]:
    """name -> the results of each comparison that is stored."""
    return _results_in(RECORDS)


@cache
def _results_in(folder: Path) -> dict[str, Findings]:
    return {name: findings(read(file)) for name in ASKED if (file := folder / f"{name}.json").exists()}


def picture(name: str) -> str:
    """The differences of a comparison's methods from its first one."""
    return differences_svg(stored()[name], stored()[name].against_reference)


def _claims() -> str:
    """The table of the claims benchmark, which its own page has from the stored runs."""
    page = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    between = page.partition("<!-- claims: written by benchmarks/claims -->")[2]
    return between.strip().partition("\n\n")[0] + "\n"


def _section(name: str, of: Findings) -> str:
    title, asked = ASKED[name]
    return f"\n## {title}\n\n{asked} {_size(of)}\n\n{_results(name, of)}\n{_costs(of)}"


def _results(name: str, of: Findings) -> str:
    """The table of quality, the picture of the differences, the verdicts in words."""
    text = f"The held-out loss of each method minus that of {of.reference}"
    notes = " ".join([verdict(of), *remarks(of)])
    return f"{_markdown(quality(of))}\n\n![{text}](pictures/compared-{name}.svg)\n\n{notes}\n"


def _costs(of: Findings, heading: str = "") -> str:
    if not of.comparison.costs:
        return ""
    return f"{heading}\n{_markdown(costs(of))}\n\n{_markdown(serving(of))}\n"


def _baselines(found: dict[str, Findings]) -> str:
    """All tasks beside each other in one table, and the details of each below."""
    first = next(iter(found.values()))
    parts = [_columns(costs(first), {name: name for name in SIZES})]
    for name, of in found.items():
        own = {"held-out loss": "held-out loss", "verdict": "against LoRA", "seeds, sd": "seeds, sd"}
        parts.append(_columns(quality(of), {head: f"{BASELINES[name]}: {here}" for head, here in own.items()}))
    methods = [s.arm for s in first.standings]
    heads = ["method", *(head for part in parts for head in part[methods[0]])]
    rows = [[cell(method), *(text for part in parts for text in part.get(method, {}).values())] for method in methods]
    details = [
        f"\n### {ASKED[name][0]}\n\n{ASKED[name][1]} {_size(of)}\n\n{_results(name, of)}" for name, of in found.items()
    ]
    heading = "\n### Costs\n"
    tasks = " and ".join(BASELINES[name] for name in found)
    return f"{BEFORE.format(tasks=tasks)}{table(heads, rows)}\n{''.join(details)}{_costs(first, heading)}"


def _columns(of: TextTable, named: dict[str, str]) -> dict[str, dict[str, str]]:
    """method -> the cells of some columns, by their names here; of columns with one head, the first."""
    places = {head: list(of.head).index(head) for head in named if head in of.head}
    return {row[0]: {named[head]: cell(row[i]) or "–" for head, i in places.items()} for row in of.rows}


def _size(of: Findings) -> str:
    """What was trained, and how the comparison is repeated."""
    settings = of.comparison.settings
    training = yaml.safe_load(settings["config"])["training"]
    rows = settings["rows"]
    return (
        f"{settings['steps']} steps of {training['batch_size']} rows each, {len(of.comparison.trials)} runs; rates "
        f"chosen on {rows['validation']} rows, methods judged on {rows['test']} rows with {settings['seeds']} seeds "
        f"each. `{settings['command']}`"
    )


def _markdown(of: TextTable) -> str:
    return table(of.head, [[cell(text) for text in row] for row in of.rows])
