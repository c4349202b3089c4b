"""What a run folder hears of the training loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from lorary.files.atomic import refused
from lorary.train.run.folder import METRICS, RunFolder, line


class Recorder(TrainerCallback):  # type: ignore[misc]  # Transformers has no types
    """Writes every record of the log to `metrics.jsonl`, as soon as there is one.

    Args:
        folder: of the run.

    Attributes:
        figures: gives what the method's rules report; it stands beside the training loss.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.path = folder / METRICS
        self.figures: Callable[[], dict[str, Any]] = dict

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if state.is_world_process_zero and logs:
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(line({"step": state.global_step, **logs, **(self.figures() if "loss" in logs else {})}))
            except OSError as error:
                raise refused(self.path, error) from error


class LastEvaluation(TrainerCallback):  # type: ignore[misc]  # Transformers has no types
    """Evaluates after the last step too, where evaluations go by steps and it is not their turn."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.eval_strategy == "steps" and state.global_step >= state.max_steps:
            control.should_evaluate = True
