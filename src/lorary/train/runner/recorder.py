"""Trainer callbacks of a run: `metrics.jsonl`, and an evaluation at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from lorary.files.atomic import write_error
from lorary.train.runner.folder import METRICS, RunFolder, json_line


class Recorder(TrainerCallback):  # type: ignore[misc]  # Transformers has no types
    """The log as `metrics.jsonl`, written line by line.

    Args:
        folder: of the run.
        start: called once before the first record, when the run has been found fit to start or to resume.

    Attributes:
        rule_report: returns the figures of the method's rules, which are added to a training loss.
    """

    def __init__(self, folder: RunFolder, start: Callable[[], None] = lambda: None) -> None:
        self.path, self.start = folder / METRICS, start
        self.rule_report: Callable[[], dict[str, Any]] = dict

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if state.is_world_process_zero and logs:
            record = {"step": state.global_step, **logs, **(self.rule_report() if "loss" in logs else {})}
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json_line(record))
            except OSError as error:
                raise write_error(self.path, error) from error


class EvaluateAtEnd(TrainerCallback):  # type: ignore[misc]  # Transformers has no types
    """An evaluation after the last step, if evaluations are every few steps and it would have none."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.eval_strategy == "steps" and state.global_step >= state.max_steps:
            control.should_evaluate = True
