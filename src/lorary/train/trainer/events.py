"""The events of the training loop, forwarded to the trainer; and whether a run is over.

A run is over when its last step is done or early stopping has ended it. Both can be read from a checkpoint: the step,
and the counter of early stopping in Transformers' own record. A signal or a callback that stops a run does not end it.
"""

from __future__ import annotations

from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_utils import IntervalStrategy


def why_over(trainer: Any) -> str:
    """Why a trainer's run has no further step; empty if it has."""
    step, steps = trainer.state.global_step, trainer.state.max_steps
    if step >= steps:
        return f"all {steps:,} steps are done"
    return f"early stopping ended it at step {step:,} of {steps:,}" if stopped_early(trainer) else ""


def stopped_early(trainer: Any) -> bool:
    """Whether the patience of early stopping is at its end."""
    callbacks = [c for c in trainer.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
    return any(c.early_stopping_patience_counter >= c.early_stopping_patience for c in callbacks)


class Events(TrainerCallback):  # type: ignore[misc]  # Transformers has no types
    """The loop's events, forwarded to the trainer."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.save_after_epoch = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.start_rules(state.max_steps)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.start_epoch(state.epoch or 0)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.rules.after_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save and stop after a signal. A checkpoint waits for the evaluation of an epoch that ends with this step.

        A run that resumed from one before that evaluation would not repeat it.
        """
        stop = self.trainer.guard.stop
        ends_epoch = _ends_epoch(state) or control.should_training_stop
        if stop:
            control.should_save = control.should_training_stop = True
        self.save_after_epoch = control.should_save and ends_epoch and args.eval_strategy == IntervalStrategy.EPOCH
        if self.save_after_epoch:
            control.should_save = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save after the evaluation; an epoch that a signal cuts short is neither evaluated nor saved again."""
        if self.save_after_epoch:
            control.should_save = True
        elif self.trainer.guard.stop and not _ends_epoch(state) and not why_over(self.trainer):
            control.should_evaluate = control.should_save = False
        self.save_after_epoch = False


def _ends_epoch(state: Any) -> bool:
    """Whether the present step is the last one of an epoch."""
    return float(state.epoch or 0).is_integer()
