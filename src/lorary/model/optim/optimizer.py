"""optimizer: any optimizer class over a method's parameter groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lorary.errors import ConfigError, Diagnostic
from lorary.model.ambient import mode_independent
from lorary.model.optim.param_groups import param_groups


@mode_independent
def optimizer(
    model: nn.Module,
    lr: float,
    *,
    weight_decay: float = 0.0,
    cls: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    **settings: Any,
) -> torch.optim.Optimizer:
    """An optimizer over `param_groups`, with the method's learning-rate ratios (LoRA+).

    Args:
        model: with a method attached.
        lr: the learning rate of a role with multiplier 1.
        weight_decay: as for `param_groups`.
        cls: the optimizer's class, which takes groups of parameters.
        settings: further arguments of the class: betas, eps.

    Raises:
        StateError, ConfigError: as `param_groups`; or `cls` does not make an optimizer.

    Example:
        >>> trainer = SFTTrainer(model, args=args, optimizers=(lorary.optimizer(model, lr=2e-4), None))
    """
    if not callable(cls) or (isinstance(cls, type) and not issubclass(cls, torch.optim.Optimizer)):
        what = f"{getattr(cls, '__name__', repr(cls))} is not an optimizer class"
        raise ConfigError("invalid optimizer:", [Diagnostic("cls", what, "pass one, such as torch.optim.AdamW")])
    groups = param_groups(model, lr=lr, weight_decay=weight_decay)
    try:
        return cls(groups, **settings)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError("invalid optimizer:", [Diagnostic("settings", str(error))]) from error
