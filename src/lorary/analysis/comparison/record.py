"""The record of a comparison: what was trained, what was measured of it. Plain values, kept as one JSON file.

A trial is one training run: a method at a learning rate, with a seed of the data's order and one of its own start.
Rates are chosen on the validation rows; a method is judged at its best rate on test rows, which no choice has seen, and
which are the same for all methods and seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# why a trial has no more steps; one that a budget or a signal cuts has not ended, and is not recorded
Ending = Literal["finished", "diverged", "hopeless"]
Merge = Literal["exactly", "to rounding", "with an error", "no"]


@dataclass(frozen=True)
class Arm:
    """A method that takes part.

    Args:
        name: as the user calls it; unique in a comparison.
        method: its section of a configuration: presets, rank, targets and the like.
        rates: the learning rates that are tried, rising, around the method's own.
    """

    name: str
    method: Mapping[str, Any]
    rates: tuple[float, ...]


@dataclass(frozen=True)
class Scores:
    """The measurements of a model on rows, row by row, so that two models can be compared in pairs.

    Args:
        nats: the summed cross entropy of each row's labelled tokens; of a classifier's label.
        tokens: their number; 1 for each row of a classifier.
        right: how many of them were the most likely ones.
    """

    nats: tuple[float, ...]
    tokens: tuple[int, ...]
    right: tuple[int, ...]

    @property
    def loss(self) -> float:
        """Mean cross entropy per token, in nats."""
        return sum(self.nats) / sum(self.tokens)

    @property
    def accuracy(self) -> float:
        """Share of the tokens, or labels, that were the most likely ones."""
        return sum(self.right) / sum(self.tokens)


@dataclass(frozen=True)
class Trial:
    """A training run.

    Args:
        arm: name of its `Arm`.
        lr: peak learning rate.
        seed: of the order of the data: the same ones for all arms.
        steps: optimizer steps done.
        curve: (optimizer step, validation loss), from step 0 on.
        ending: why it has no more steps.
        test: the scores on the test rows; None unless it is one of the runs that are judged.
        general: the scores on general text, whose change from the base's is what was forgotten; likewise.
        folder: of the run, below the comparison's folder.
        init_seed: of the adapter's initialisation and dropout: the arm's own. None: `seed`, as in earlier records.
    """

    arm: str
    lr: float
    seed: int
    steps: int
    curve: tuple[tuple[int, float], ...]
    ending: Ending = "finished"
    test: Scores | None = None
    general: Scores | None = None
    folder: str = ""
    init_seed: int | None = None


@dataclass(frozen=True)
class Cost:
    """The cost of a method, at its best rate.

    Args:
        trained: numbers that train.
        file_bytes: of the saved adapter.
        peak_bytes: of a training step, counted.
        step_seconds: of each timed optimizer step, the methods taking turns.
        merge: how it merges into the base.
        merge_note: why it does not, or how large the error is; else empty.
        engines: engine -> "" if it serves the adapter, or why not.
        context: tokens of the context that it takes.
        forward: of each timed forward pass over a test row, the seconds over those of the base beside it.
        merged_forward: the same once merged; empty: it does not merge.
    """

    trained: int
    file_bytes: int
    peak_bytes: int
    step_seconds: tuple[float, ...]
    merge: Merge
    engines: Mapping[str, str] = field(default_factory=dict)
    context: int = 0
    merge_note: str = ""
    forward: tuple[float, ...] = ()
    merged_forward: tuple[float, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Everything that a comparison has measured so far.

    Args:
        settings: what is needed to repeat it: base, data, targets, steps, batch, seeds, budget, command, versions,
            machine, the fingerprint of the base, digests of the rows.
        task: "sft", or "classification", where accuracy is reported beside the loss.
        arms: the methods, in the order in which they were asked for, with the rates that were tried.
        trials: the runs that have ended, by arm, seed and rate.
        base_test: the base's scores on the test rows, without an adapter; None for a classifier, whose head is new.
        base_general: its scores on general text.
        costs: name of an arm -> its cost.
        left_out: name of an arm, or a trial in words -> why it was not run.
    """

    settings: Mapping[str, Any]
    task: Literal["sft", "classification"]
    arms: tuple[Arm, ...]
    trials: tuple[Trial, ...] = ()
    base_test: Scores | None = None
    base_general: Scores | None = None
    costs: Mapping[str, Cost] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)

    def of(self, arm: str) -> list[Trial]:
        """The trials of an arm."""
        return [trial for trial in self.trials if trial.arm == arm]
