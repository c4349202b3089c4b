"""Optimizers by their names in a configuration, where Transformers has another name for them or cannot have them."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from lorary.errors import Diagnostic, TrainingError

_BITSANDBYTES = ("adamw_bnb_8bit", "paged_adamw", "paged_adamw_32bit")


def transformers_name(name: str) -> str:
    """The name that Transformers' arguments take.

    Raises:
        TrainingError: the optimizer is bitsandbytes', and bitsandbytes or the device that it needs is missing.
    """
    if name in _BITSANDBYTES:
        _check(name)
    return "paged_adamw_32bit" if name == "paged_adamw" else name


def paged_adamw(params: Any, lr: float = 1e-3, **words: Any) -> torch.optim.Optimizer:
    """What `lorary.PagedAdamW` was: bitsandbytes' `PagedAdamW32bit`. Use that one directly.

    Raises:
        TrainingError: bitsandbytes is not installed, or there is no CUDA device.
    """
    _check("paged_adamw")
    import bitsandbytes

    optimizers: Any = bitsandbytes.optim
    made: torch.optim.Optimizer = optimizers.PagedAdamW32bit(params, lr=lr, **words)
    return made


def _check(name: str) -> None:
    fix = "set training.optimizer: adamw_torch"
    problems = []
    if find_spec("bitsandbytes") is None:
        what = f"{name} is in bitsandbytes, which is not installed"
        problems.append(Diagnostic("training.optimizer", what, f"install bitsandbytes, or {fix}"))
    if name.startswith("paged") and not torch.cuda.is_available():
        what = f"{name} pages memory with CUDA, and there is no CUDA device"
        problems.append(Diagnostic("training.optimizer", what, fix))
    if problems:
        raise TrainingError("this optimizer is not available here:", problems)
