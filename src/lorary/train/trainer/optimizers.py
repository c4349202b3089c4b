"""Optimizers that differ from Transformers' in their name, need bitsandbytes, or cannot train adapters."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from lorary.errors import Diagnostic, TrainingError
from lorary.layers.transformers_internals import is_optimizer_factory
from lorary.train.config.optimization import OPTIMIZERS


def transformers_name(name: str) -> str:
    """The optimizer's name in Transformers' arguments.

    Raises:
        TrainingError: the optimizer needs bitsandbytes or a CUDA device, and it is missing.
    """
    if OPTIMIZERS.get(name, "").startswith("bitsandbytes"):
        _check_available(name)
    return "paged_adamw_32bit" if name == "paged_adamw" else name


def paged_adamw(params: Any, lr: float = 1e-3, **options: Any) -> torch.optim.Optimizer:
    """bitsandbytes' `PagedAdamW32bit`, the replacement of `lorary.PagedAdamW`; prefer bitsandbytes' own class.

    Raises:
        TrainingError: bitsandbytes is not installed, or there is no CUDA device.
    """
    _check_available("paged_adamw")
    import bitsandbytes

    optimizers: Any = bitsandbytes.optim
    optimizer: torch.optim.Optimizer = optimizers.PagedAdamW32bit(params, lr=lr, **options)
    return optimizer


def refuse_own_groups(name: Any, kind: Any, settings: dict[str, Any]) -> None:
    """Refuse an optimizer that makes its own parameter groups.

    Args:
        name: Transformers' name of it.
        kind: its class, or what makes it.
        settings: its arguments.

    Raises:
        TrainingError: the method's learning rates would be lost.
    """
    if is_optimizer_factory(kind) or {"params", "model", "optimizer_dict"} & settings.keys():
        what = f"{getattr(name, 'value', name)} makes its own groups: the method's learning rates would be lost"
        raise TrainingError("this optimizer cannot train adapters:", [Diagnostic("optim", what, "use adamw_torch")])


def _check_available(name: str) -> None:
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
