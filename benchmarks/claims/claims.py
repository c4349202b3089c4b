"""What the papers claim, one row each: what is compared, by which measure, and what would speak for the claim."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import arms
from ledger import Record
from protocol import Bench, Difference, loss_at, paired, steps_to
from tasks import HEADERS
from training import Arm

MARGIN = 0.02  # nats; "as good as" means worse by no more


@dataclass(frozen=True)
class Row:
    """One comparison of a method with another one.

    Args:
        claim: what the paper says.
        source: the paper.
        method, against: the arms compared.
        measure: (bench, the method's runs, the other's) -> a figure of each run, less is better.
        unit: of the figure.
        what: the figure in words.
        equal: whether "as good as" is claimed, within MARGIN; otherwise "better" is.
    """

    claim: str
    source: str
    method: Arm
    against: Arm
    measure: Callable[[Bench, list[Record], list[Record]], tuple[list[float], list[float]]]
    unit: str
    what: str
    equal: bool = False

    def runs(self, bench: Bench) -> tuple[list[Record], list[Record]]:
        """The method's runs and the other's, each at its own best learning rate for the shorter horizon."""
        horizon = self.horizon(bench)
        return bench.runs(self.method, horizon), bench.runs(self.against, horizon)

    def horizon(self, bench: Bench) -> int:
        """After how many optimizer steps the two are compared."""
        return min(self.method.steps(bench.size), self.against.steps(bench.size))

    def difference(self, bench: Bench) -> Difference:
        """The method's figure less the other's."""
        return paired(*self.measure(bench, *self.runs(bench)))

    def verdict(self, found: Difference) -> str:
        """Whether the claim holds at this size."""
        if self.equal and found.high <= MARGIN:
            return "yes"
        if found.high < 0:
            return "yes"
        return "no" if found.low > 0 else "no difference seen"


def loss(bench: Bench, method: list[Record], against: list[Record]) -> tuple[list[float], list[float]]:
    """Held-out loss after as many steps."""
    horizon = min(method[0]["steps"], against[0]["steps"])
    return [loss_at(r, HEADERS, horizon) for r in method], [loss_at(r, HEADERS, horizon) for r in against]


def speed(bench: Bench, method: list[Record], against: list[Record]) -> tuple[list[float], list[float]]:
    """Steps to the mean loss that the other one has after two thirds of the steps."""
    horizon = min(method[0]["steps"], against[0]["steps"])
    target = sum(loss_at(r, HEADERS, horizon * 2 / 3) for r in against) / len(against)
    return [steps_to(r, HEADERS, target, horizon) for r in method], [
        steps_to(r, HEADERS, target, horizon) for r in against
    ]


def _faster(method: Arm, claim: str, source: str) -> list[Row]:
    return [
        Row(claim, source, method, arms.LORA, speed, "steps", "steps to a loss"),
        Row(claim, source, method, arms.LORA, loss, "nats", "loss after 60 steps"),
    ]


ROWS: dict[str, list[Row]] = {
    "lora+": _faster(
        arms.LORA_PLUS, "up to twice as fast at the same cost, and 1 to 2 % more accurate", "arXiv:2402.12354"
    ),
    "pissa": _faster(arms.PISSA, "converges faster than LoRA, to a better end", "arXiv:2404.02948"),
    "olora": _faster(arms.OLORA, "converges faster than LoRA", "arXiv:2406.01775"),
    "lora-fa": [
        Row(
            "as good as LoRA, for less memory",
            "arXiv:2308.03303",
            arms.LORA_FA,
            arms.LORA,
            loss,
            "nats",
            "loss after 120 steps",
            equal=True,
        )
    ],
}
