"""Training progress: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback

from lorary.model.plan import human_bytes
from lorary.train.trainer import process_memory


class ProgressLines(TrainerCallback):  # type: ignore[misc]  # Transformers has no types
    """Step, loss, learning rate, tokens per second, remaining time and memory of a running training.

    Args:
        stream: a bar if it is a terminal, else one line for each record of the log.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.console = Console(file=self.stream, highlight=False)
        self.bar: Progress | None = None
        self.task = TaskID(0)
        self.loss = self.rate = float("nan")
        self.tokens = self.tokens_seen = 0.0  # per second; so far
        self.spent = self.spent_before = self.began = 0.0  # seconds in steps, without evaluations and checkpoints
        self.first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.first_step = state.global_step
        if state.is_world_process_zero and self.console.is_terminal:
            columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.description}"))
            self.bar = Progress(*columns, TimeElapsedColumn(), console=self.console)
            self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step)
            self.bar.start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.spent += time.monotonic() - self.began
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step, description=self._status(state))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logs = logs or {}
        if not state.is_world_process_zero or "train_loss" in logs:
            return
        place = f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
        if "eval_loss" in logs:
            accuracy = f"  accuracy {logs['eval_accuracy']:.1%}" if "eval_accuracy" in logs else ""
            self._print(f"{place}  held-out loss {logs['eval_loss']:.4f}{accuracy}")
        elif "loss" in logs:
            self._update(logs)
            if self.bar is None:
                self._print(f"{place}  {self._status(state)}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Stop the bar; also after an error, so that the message appears below it."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _update(self, logs: dict[str, Any]) -> None:
        self.loss, self.rate = logs["loss"], logs["learning_rate"]
        seen, seconds = float(logs.get("num_tokens", 0)), self.spent - self.spent_before
        if seconds > 0 and (self.tokens_seen or not self.first_step):  # a resumed run counts older tokens
            self.tokens = (seen - self.tokens_seen) / seconds
        self.tokens_seen, self.spent_before = seen, self.spent

    def _status(self, state: Any) -> str:
        done = state.global_step - self.first_step
        left = (state.max_steps - state.global_step) * self.spent / max(done, 1)
        parts = [
            f"loss {self.loss:.4f}" if self.loss == self.loss else "",
            f"lr {self.rate:.2e}" if self.rate == self.rate else "",
            f"{self.tokens:,.0f} tokens/s" if self.tokens else "",
            f"eta {timedelta(seconds=int(left))}",
            human_bytes(process_memory.current_bytes()),
        ]
        return "  ".join(part for part in parts if part)

    def _print(self, text: str) -> None:
        if self.bar is not None:
            self.bar.console.print(text, markup=False)
        else:
            print(text, file=self.stream, flush=True)
