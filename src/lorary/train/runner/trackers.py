"""The trackers of a run: TensorBoard, W&B, trackio."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from lorary.errors import ConfigError, Diagnostic

_EXTRAS = {"tensorboard": "track"}  # tracker -> the extra that installs it; the others have their own names


def require_trackers(names: Iterable[str]) -> None:
    """Refuse trackers that are not installed, before anything is loaded.

    Raises:
        ConfigError: every one.
    """
    problems = [
        Diagnostic("training.report_to", f"{name} is not installed", f'pip install "lorary[{_EXTRAS.get(name, name)}]"')
        for name in names
        if name != "none" and importlib.util.find_spec(name) is None
    ]
    if problems:
        raise ConfigError("cannot log this run:", problems)
