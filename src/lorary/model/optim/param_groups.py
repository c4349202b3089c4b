"""Optimizer groups of a method: one for every learning-rate multiplier."""

from __future__ import annotations

from numbers import Real
from typing import Any

from torch import nn

from lorary.errors import ConfigError, Diagnostic, StateError
from lorary.layers.adapted import adapted_layers
from lorary.model.state import base_parameter, require


def param_groups(model: nn.Module, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Optimizer groups that cover the trainable set exactly: one for each learning-rate multiplier and decay.

    Args:
        model: a model with a method attached.
        lr: the learning rate of a role with multiplier 1, per optimizer step.
        weight_decay: decoupled decay; vectors (biases, norms, magnitudes) take none.

    Returns:
        Groups as torch.optim takes them, each with a `name` that says what is in it.

    Raises:
        StateError: nothing is attached, nothing of it trains, or some parameter that requires a gradient is neither
            an adapter's nor planned.
        ConfigError: the rate or the decay is out of range.
    """
    state = require(model, "train")
    problems = []
    if not (_number(lr) and 0 < lr < float("inf")):
        problems.append(Diagnostic("lr", f"{lr!r} is not a positive finite number"))
    if not (_number(weight_decay) and 0 <= weight_decay < float("inf")):
        problems.append(Diagnostic("weight_decay", f"{weight_decay!r} is not a finite number of at least 0"))
    if problems:
        raise ConfigError("invalid optimizer settings:", problems)
    rows: dict[tuple[float, float], dict[str, Any]] = {}

    def put(role: str, parameter: nn.Parameter, rate: float) -> None:
        decay = weight_decay if parameter.dim() > 1 else 0.0
        row = rows.setdefault((rate, decay), {"params": [], "lr": lr * rate, "weight_decay": decay, "roles": {}})
        row["params"].append(parameter)
        row["roles"][role] = None

    seen: set[int] = set()  # layers may train one set of tensors in common
    for layer in adapted_layers(model).values():
        for role, parameter in layer.params.items():
            if parameter.requires_grad and id(parameter) not in seen:
                put(role, parameter, layer.method.rate(role))
                seen.add(id(parameter))
    for parameter in {id(p): p for p in (base_parameter(model, name) for name in state.full)}.values():
        if parameter.requires_grad:
            put("full", parameter, 1.0)
    _check_cover(model, [p for row in rows.values() for p in row["params"]])
    for (rate, decay), row in rows.items():
        row["name"] = " ".join(row.pop("roles")) + (f" x{rate:g}" if rate != 1 else "") + (" decayed" if decay else "")
    return list(rows.values())


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_cover(model: nn.Module, grouped: list[nn.Parameter]) -> None:
    """Every parameter that trains is in exactly one group."""
    ids = {id(p) for p in grouped}
    what, fix = "requires a gradient, but no plan trains it", "freeze it, or name it in `full`"
    stray = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in ids]
    if stray:
        problems = [Diagnostic(name, what, fix) for name in stray]
        raise StateError("the parameter groups do not match what trains:", problems)
    if not grouped:
        what, fix = "no parameter requires a gradient", "load the adapter with trainable=True"
        raise StateError("nothing to train:", [Diagnostic("model", what, fix)])
