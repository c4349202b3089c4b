"""How it is run: configurations, data, the loop, runs. The only room that touches TRL."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorary.train.run.run import Run as Run
    from lorary.train.run.run import run as run

__all__ = ["Run", "run"]


def __getattr__(name: str) -> object:
    """`run` and `Run`, when they are first asked for: they bring Transformers and TRL along."""
    if name not in __all__:
        raise AttributeError(f"module 'lorary.train' has no attribute {name!r}")
    from lorary.train.run import run

    return getattr(run, name)
