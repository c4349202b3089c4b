"""Extending a run: the same run with a later end, from its last checkpoint."""

from __future__ import annotations

from pathlib import Path

from lorary.errors import ConfigError, Diagnostic
from lorary.train.config.config import Config
from lorary.train.runner.folder import CHECKPOINTS
from lorary.train.trainer.checkpoint import newest, step_of


def check_longer(config: Config, steps: int) -> None:
    """Refuse to extend a run that has no checkpoint, or that would not become longer; nothing is written.

    Args:
        config: the resolved configuration.
        steps: the optimizer steps that it asks for in all.

    Raises:
        ConfigError: with the length to ask for.
    """
    headline, t = "cannot extend this run:", config.training
    last, _ = newest(Path(config.output) / CHECKPOINTS)
    if last is None:
        what, fix = "holds no run with a complete checkpoint", "train it first, without --extend"
        raise ConfigError(headline, [Diagnostic(f"output: {config.output}", what, fix)])
    if steps > (done := step_of(last)):
        return
    key, value = ("epochs", t.epochs) if t.max_steps is None else ("max_steps", t.max_steps)
    what = f"{value:g} is {steps:,} steps in all, and the run has done {done:,}"
    raise ConfigError(headline, [Diagnostic(f"training.{key}", what, f"set a larger number: --set training.{key}=...")])
