"""intrinsic_dimension: how few numbers suffice to fine-tune a model on a task.

The intrinsic dimension d90 is the smallest d for which training in a random subspace of dimension d reaches 90 % of
what full fine-tuning reaches (Li et al. 2018; Aghajanyan et al. 2020, arXiv:2012.13255).

Differs from the paper: it compares accuracies. Here it is the improvement of the held-out loss over the base's, so
that tasks without an accuracy have one too: (L_base − L_d) / (L_base − L_full).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lorary.analysis.inspection.subspace import SubspaceAdam, layers_of
from lorary.errors import Diagnostic, PlanError, TrainingError
from lorary.files.strict_json import finite
from lorary.model.ambient import mode_independent
from lorary.model.text_table import aligned

SHARE = 0.9
HEAD = ("d", "share of D", "held-out loss", "of full fine-tuning", "lr")
_HEADLINE = "cannot measure the intrinsic dimension:"


@dataclass(frozen=True)
class SubspaceRun:
    """One training in a subspace.

    Args:
        d: its dimension.
        loss: the held-out loss, with the best of the learning rates.
        lr: that learning rate.
    """

    d: int
    loss: float
    lr: float


@dataclass(frozen=True)
class IntrinsicDimension:
    """The held-out loss by the dimension of the subspace. Prints as a table.

    Args:
        size: D, the parameters of full fine-tuning.
        said: whether every layer had a scale of its own.
        base: the held-out loss of the base.
        full: that of full fine-tuning.
        runs: the trainings, by ascending d.
        seed: of the projections.
    """

    size: int
    said: bool
    base: float
    full: float
    runs: tuple[SubspaceRun, ...] = field(repr=False)
    seed: int = 0

    def reached(self, run: SubspaceRun) -> float:
        """The share of full fine-tuning's improvement."""
        return (self.base - run.loss) / (self.base - self.full)

    @property
    def d90(self) -> int | None:
        """The smallest measured dimension that reaches 90 %; None if none does."""
        return next((run.d for run in self.runs if self.reached(run) >= SHARE), None)

    @property
    def verdict(self) -> str:
        """The intrinsic dimension in a sentence, with the largest measured dimension below it."""
        if self.d90 is None:
            return f"no measured dimension reaches {SHARE:.0%} of full fine-tuning: d90 is above {self.runs[-1].d:,}"
        below = [run.d for run in self.runs if run.d < self.d90]
        bracket = f"between {below[-1]:,} and {self.d90:,}" if below else f"at most {self.d90:,}"
        return f"d90 is {bracket}, {self.d90 / self.size:.2%} of {self.size:,} parameters"

    def rows(self) -> list[tuple[str, ...]]:
        """Rows of a table under `HEAD`: the base, each dimension, full fine-tuning."""
        runs = [
            (f"{r.d:,}", f"{r.d / self.size:.3%}", f"{r.loss:.4f}", f"{self.reached(r):.1%}", f"{r.lr:g}")
            for r in self.runs
        ]
        full = (f"{self.size:,}", "all", f"{self.full:.4f}", "100.0%", "")
        return [("0", "base", f"{self.base:.4f}", "0.0%", ""), *runs, full]

    def to_dict(self) -> dict[str, Any]:
        """The measurement in JSON types."""
        runs = [{"d": r.d, "loss": r.loss, "lr": r.lr, "reached": self.reached(r)} for r in self.runs]
        record = {"size": self.size, "structure_aware": self.said, "base_loss": self.base, "full_loss": self.full}
        return finite(record) | {"d90": self.d90, "seed": self.seed, "runs": [finite(run) for run in runs]}

    def __str__(self) -> str:
        return "\n".join([*aligned([HEAD, *self.rows()]), self.verdict])


@mode_independent
def intrinsic_dimension(
    model: nn.Module,
    run: Callable[[torch.optim.Optimizer | None], float],
    dimensions: Sequence[int],
    *,
    lr: Sequence[float],
    full_lr: float,
    said: bool = False,
    seed: int = 0,
    progress: Callable[[str], object] | None = None,
) -> IntrinsicDimension:
    """The held-out loss after training in random subspaces, beside full fine-tuning.

    Args:
        model: its parameters that require gradients are the D; they have their values back at the end.
        run: trains the model with an optimizer from the values it has, and returns its held-out loss; with None it
            only returns the loss.
        dimensions: the d to measure.
        lr: the learning rates to try in a subspace; the best counts.
        full_lr: that of full fine-tuning, by AdamW without weight decay.
        said: structure-aware: a trained scale for every layer.
        seed: of the projections.
        progress: called with the name of each training before it begins.

    Returns:
        The losses, and d90.

    Raises:
        PlanError: a dimension or a learning rate is out of range; every reason.
        TrainingError: a loss is not finite, or full fine-tuning does not improve the base.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    size = sum(p.numel() for p in parameters.values())
    _check(dimensions, lr, full_lr, size, len(set(layers_of(tuple(parameters)).values())) if said else 0)

    def trained(name: str, optimizer: torch.optim.Optimizer | None) -> float:
        if progress is not None:
            progress(name)
        loss = run(optimizer)
        if not math.isfinite(loss):
            what = f"the held-out loss is {loss}"
            raise TrainingError(_HEADLINE, [Diagnostic(name, what, "lower the learning rate")])
        return loss

    first = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def reset() -> None:
        for name, p in parameters.items():
            p.copy_(first[name])

    try:
        base = trained("base", None)
        full = trained("full fine-tuning", torch.optim.AdamW(parameters.values(), lr=full_lr, weight_decay=0.0))
        _check_full(base, full)
        runs = []
        for d in sorted(set(dimensions)):
            tried = []
            for rate in lr:
                reset()
                optimizer = SubspaceAdam(parameters, d, lr=rate, said=said, seed=seed)
                tried.append(SubspaceRun(d, trained(f"d = {d:,}", optimizer), rate))
            runs.append(min(tried, key=lambda one: one.loss))
    finally:
        reset()
    return IntrinsicDimension(size, said, base, full, tuple(runs), seed)


def _check(dimensions: Sequence[int], lr: Sequence[float], full_lr: float, size: int, scales: int) -> None:
    """Refuse what cannot be measured, before anything is trained.

    Raises:
        PlanError: every reason.
    """
    problems = [] if size else [Diagnostic("model", "none of its parameters requires a gradient")]
    problems += [] if dimensions else [Diagnostic("dimensions", "is empty", "give some, such as 16, 64, 256")]
    problems += [] if lr else [Diagnostic("lr", "is empty", "give at least one learning rate")]
    for d in dimensions:
        if isinstance(d, bool) or not isinstance(d, int) or not 1 <= d <= size:
            problems.append(Diagnostic("dimensions", f"{d!r} is not a whole number from 1 to {size:,}"))
        elif d <= scales:
            what = f"{d:,} leaves nothing beside the {scales:,} scales of the layers that SAID trains"
            problems.append(Diagnostic("dimensions", what, f"use more than {scales:,}"))
    for name, rate in (*(("lr", rate) for rate in lr), ("full_lr", full_lr)):
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
            problems.append(Diagnostic(name, f"{rate!r} is not a finite number above 0"))
    if problems:
        raise PlanError(_HEADLINE, problems)


def _check_full(base: float, full: float) -> None:
    """Refuse to compare with a full fine-tuning that made the model worse.

    Raises:
        TrainingError: the held-out loss has not fallen.
    """
    if full >= base:
        what = f"the held-out loss is {full:.4f} after full fine-tuning, and {base:.4f} before"
        raise TrainingError(_HEADLINE, [Diagnostic("full_lr", what, "try another learning rate, or more steps")])
