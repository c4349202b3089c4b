"""The advice behind `lorary advise`, `lorary plan --advise` and `lorary init --model`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorary.train.advice.advice import Advice
    from lorary.train.config.config import Config
    from lorary.train.config.load import Flags

RANKS = ("uniform", "gradient")


def configuration(model: str, data: str | None, sets: Sequence[str], flags: Flags | None = None) -> Config:
    """The configuration to advise on: a file, or a model with its data.

    Raises:
        ConfigError: the file cannot be read, or a key is wrong; there are no data, or two of them.
    """
    from lorary.errors import ConfigError, Diagnostic
    from lorary.train.config.load import from_dict, load

    file = Path(model).suffix in (".yaml", ".yml")
    if file and data is not None:
        what = f"`{model}` is a configuration, which names its own data, and `{data}` is named as well"
        raise ConfigError("cannot advise:", [Diagnostic("data", what, f"use --set data.train={data}")])
    if file:
        return load(model, list(sets), flags)
    if data is None:
        fix = f"name a file, a folder, a Hub id or a built-in set: lorary advise {model} builtin:docstrings"
        raise ConfigError("cannot advise:", [Diagnostic("data", "no data are named, and they decide", fix)])
    return from_dict({"model": model, "data": data}, list(sets), flags)


def advice_for(config: Config, memory: float | None, ranks: str = "uniform") -> Advice:
    """The advice on a configuration, for a GPU of so many GB or this machine.

    Raises:
        ConfigError: an unknown kind of ranks.
        LoraryError: the model or the data cannot be used.
    """
    from lorary.errors import ConfigError, Diagnostic, did_you_mean

    if ranks not in RANKS:
        problem = Diagnostic("--ranks", f"`{ranks}` is unknown", did_you_mean(ranks, RANKS))
        raise ConfigError("invalid command line:", [problem])
    from lorary.train.advice.advise import advise
    from lorary.train.advice.machine import Machine

    return advise(config, Machine.here(memory), ranks=ranks)
