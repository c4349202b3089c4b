"""What the papers claim, one row each: what is compared, by which measure, and what would speak for the claim."""

from __future__ import annotations

from dataclasses import dataclass

import arms
import continual
from continual import both, forgotten, forgotten_equally_good, learned
from measures import Figures, Measure, loss, speed
from protocol import Bench, Missing
from training import Arm

from lorary.analysis.comparison.over_seeds import differences_over_seeds
from lorary.analysis.comparison.statistics import Difference

MARGIN = 0.02  # nats; "as good as" means worse by no more


@dataclass(frozen=True)
class Row:
    """One comparison of a method with another one.

    Args:
        claim: what the paper says.
        method, against: the arms compared.
        what: the figure in words, less is better.
        measure: the figure of each run.
        unit: of the figure.
        equal: whether "as good as" is claimed, within MARGIN; otherwise "better" is.
        paired: whether the runs with one seed begin from one adapter, and are compared in pairs.
    """

    claim: str
    method: Arm
    against: Arm
    what: str
    measure: Measure
    unit: str = "nats"
    equal: bool = False
    paired: bool = False

    def horizon(self, bench: Bench) -> int:
        """After how many optimizer steps the two are compared."""
        return min(self.method.steps(bench.size), self.against.steps(bench.size))

    def figures(self, bench: Bench) -> Figures:
        """The figures of the method's runs and of the other's, each at its own best learning rate."""
        horizon = self.horizon(bench)
        ours, theirs = bench.runs(self.method, horizon), bench.runs(self.against, horizon)
        most = min(len(ours), len(theirs)) if self.paired else None
        return self.measure(ours[:most], theirs[:most], horizon)

    def verdict(self, found: Difference) -> str:
        """Whether the claim holds at this size."""
        if found.joint.high < 0 or (self.equal and found.joint.high <= MARGIN):
            return "yes"
        return "no" if found.joint.low > 0 else "no difference shown"


def _faster(claim: str, method: Arm, *against: Arm) -> list[Row]:
    rows = []
    for other in against:
        rows.append(Row(claim, method, other, "steps to a loss", speed, unit="steps"))
        rows.append(Row(claim, method, other, "loss in the end", loss))
    return rows


def _continual(claim: str, method: Arm, against: Arm) -> list[Row]:
    return [
        Row(claim, method, against, "loss of both tasks", both, paired=True),
        Row(claim, method, against, "first task forgotten", forgotten, paired=True),
        Row(claim, method, against, "first task forgotten, second equally good", forgotten_equally_good, paired=True),
        Row(_AS_WELL, method, against, "loss of the second task", learned, equal=True, paired=True),
    ]


_AS_WELL = "... and learns the new task as well"
_PLUS = "up to twice as fast at the same cost, and better in the end (arXiv:2402.12354)"
_PISSA = "converges faster than LoRA, and to a better end (arXiv:2404.02948)"
_OLORA = "converges faster than LoRA (arXiv:2406.01775)"
_FA = "as good as LoRA, for less memory (arXiv:2308.03303)"
_O = "forgets less, so all tasks together end better (arXiv:2310.14152)"
_HARD = "none: ours. Keeping A away altogether forgets less than a penalty"
_ADA = "better than LoRA at the same final budget (arXiv:2303.10512)"
_DROP = "as good as LoRA everywhere with half of its numbers (arXiv:2402.07721)"
_DROP_SAME = "none: better than to spend the same numbers everywhere"
_FULL = "as good as full fine-tuning (arXiv:2106.09685)"

ROWS: dict[str, list[Row]] = {
    "lora+": _faster(_PLUS, arms.LORA_PLUS, arms.LORA),
    "pissa": _faster(_PISSA, arms.PISSA, arms.LORA, arms.LORA_SAME),
    "olora": _faster(_OLORA, arms.OLORA, arms.LORA, arms.LORA_SAME),
    "o-lora": [
        *_continual(_O, continual.SOFT, continual.SAME),
        *_continual(_O, continual.SOFT, continual.ANOTHER),
        *_continual(_HARD, continual.HARD, continual.SOFT),
        *_continual(_O, continual.STRONG, continual.SAME),
    ],
    "adalora": [Row(_ADA, arms.ADALORA, arms.LORA, "loss in the end", loss)],
    "lora-drop": [
        Row(_DROP, arms.LORA_DROP, arms.LORA_WIDE, "loss in the end", loss, equal=True),
        Row(_DROP_SAME, arms.LORA_DROP, arms.LORA, "loss in the end", loss),
    ],
    "lora-fa": [Row(_FA, arms.LORA_FA, arms.LORA, "loss in the end", loss, equal=True)],
    "lora": [Row(_FULL, arms.LORA, arms.FULL_TUNING, "loss in the end", loss, equal=True)],
}


Judged = tuple[Row, Figures, Difference]


def judged(bench: Bench) -> list[Judged]:
    """The rows whose runs are all there. The joint intervals of all rows with one measure hold together."""
    families: dict[tuple[str, int, bool], list[tuple[Row, Figures]]] = {}
    for row in (row for rows in ROWS.values() for row in rows):
        try:
            figures = row.figures(bench)
        except Missing:
            continue
        families.setdefault((row.what, row.horizon(bench), row.paired), []).append((row, figures))
    found = [one for (_, _, paired), rows in families.items() for one in _family(rows, paired)]
    order = [row for rows in ROWS.values() for row in rows]
    return sorted(found, key=lambda one: order.index(one[0]))


def _family(rows: list[tuple[Row, Figures]], paired: bool) -> list[Judged]:
    """Rows whose joint intervals hold together.

    An arm is known by its figures as well, since some of them depend on what it is compared with.
    """
    figures, pairs = {}, []
    for row, both_sides in rows:
        pair = tuple(f"{arm.name} {of}" for arm, of in zip((row.method, row.against), both_sides, strict=True))
        figures |= dict(zip(pair, both_sides, strict=True))
        pairs.append((pair[0], pair[1]))
    found = differences_over_seeds(figures, pairs, paired=paired)
    return [(row, both_sides, found[pair]) for (row, both_sides), pair in zip(rows, pairs, strict=True)]
