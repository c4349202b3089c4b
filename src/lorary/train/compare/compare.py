"""The comparison of methods: every one with the same search, the best rates judged on rows that no choice has seen."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from lorary.analysis.comparison.record import Arm, Comparison
from lorary.errors import ConfigError, Diagnostic
from lorary.train.compare.settings import Settings
from lorary.train.config.config import Config


def compare(
    config: Config,
    arms: Sequence[Arm],
    settings: Settings | None = None,
    folder: str | os.PathLike[str] = "comparison",
    *,
    progress: Callable[..., Any] = lambda **_: None,
    overwrite: bool = False,
) -> Comparison:
    """Compare methods on one base, one task, one order of the data and one number of steps.

    Args:
        config: of all runs: model, data, training. Its `method` is not used, and its `training.lr`, if it is set, moves
            the centre of every arm by the factor by which it differs from the default of that `method`.
        arms: the methods. Without rates an arm gets `settings.rates` of them around its presets' default.
        settings: of the comparison.
        folder: of the comparison: a run folder for each trial, and a record of every one that has ended. Called again
            with the same request, the comparison goes on there, after a kill too.
        progress: called with the keywords of Rich's `Progress.update`: `total`, `completed`, `description`.
        overwrite: first remove the comparison in the folder.

    Raises:
        ConfigError: the request contradicts itself or does not fit into its budget; or the folder is not free.
        DataError: the data cannot be read, or has too few held-out rows.
        LoraryError: a method cannot be trained on this model; with the name of the arm.
    """
    settings = settings or Settings()
    if not arms:
        raise ConfigError("cannot compare:", [Diagnostic("arms", "is empty", "name two methods or more")])
    raise NotImplementedError  # the next commit
