"""What the papers claim, one row each: what is compared, by which measure, and what would speak for the claim."""

from __future__ import annotations

from dataclasses import dataclass

import arms
import continual
from continual import both, forgotten, forgotten_equally_good, learned
from measures import Measure, loss, speed
from protocol import Bench, Difference, paired
from training import Arm

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
    """

    claim: str
    method: Arm
    against: Arm
    what: str
    measure: Measure
    unit: str = "nats"
    equal: bool = False

    def horizon(self, bench: Bench) -> int:
        """After how many optimizer steps the two are compared."""
        return min(self.method.steps(bench.size), self.against.steps(bench.size))

    def difference(self, bench: Bench) -> Difference:
        """The method's figure less the other's, each at its own best learning rate."""
        horizon = self.horizon(bench)
        runs = list(zip(bench.runs(self.method, horizon), bench.runs(self.against, horizon), strict=False))
        return paired(*self.measure([ours for ours, _ in runs], [theirs for _, theirs in runs], horizon))

    def verdict(self, found: Difference) -> str:
        """Whether the claim holds at this size."""
        if found.high < 0 or (self.equal and found.high <= MARGIN):
            return "yes"
        return "no" if found.low > 0 else "no difference seen"


def _faster(claim: str, method: Arm, *against: Arm) -> list[Row]:
    rows = []
    for other in against:
        rows.append(Row(claim, method, other, "steps to a loss", speed, unit="steps"))
        rows.append(Row(claim, method, other, "loss in the end", loss))
    return rows


def _continual(claim: str, method: Arm, against: Arm) -> list[Row]:
    return [
        Row(claim, method, against, "loss of both tasks", both),
        Row(claim, method, against, "first task forgotten", forgotten),
        Row(claim, method, against, "first task forgotten, second equally good", forgotten_equally_good),
        Row("... and learns the new task as well", method, against, "loss of the second task", learned, equal=True),
    ]


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
