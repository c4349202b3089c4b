"""Training: configurations, data, the trainers, runs. The only room that touches TRL."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorary.train.runner.result import Run as Run
    from lorary.train.runner.run import run as run

__all__ = ["Run", "run"]


def __getattr__(name: str) -> object:
    """`run` and `Run`, imported on first use: they need Transformers and TRL."""
    if name not in __all__:
        raise AttributeError(f"module 'lorary.train' has no attribute {name!r}")
    from lorary.train.runner import run

    return getattr(run, name)
