"""param_groups: optimizer groups of a method, one per learning-rate multiplier."""

from __future__ import annotations

from numbers import Real
from typing import Any

from torch import nn

from lorary.errors import ConfigError, Diagnostic, StateError
from lorary.layers.adapted import adapted_layers
from lorary.model.ambient import mode_independent
from lorary.model.state import base_parameter, require_attached
from lorary.spec.placement import adaptation


@mode_independent
def param_groups(model: nn.Module, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Optimizer groups that cover the trainable set exactly, one per learning-rate multiplier and weight decay.

    Args:
        model: a model with a method attached.
        lr: the learning rate of a role with multiplier 1, per optimizer step.
        weight_decay: decoupled weight decay. Vectors (biases, norms, DoRA's m, VeRA's b and d, MultiLoRA's gamma) have
            none, except those that the authors' code decays: AdaLoRA's E and all of GLoRA's.

    Returns:
        Groups for torch.optim, each with a `name` such as "B x16 decayed".

    Raises:
        StateError: nothing is attached, no adapter trains, or a parameter that requires a gradient belongs neither to
            an adapter nor to the plan.
        ConfigError: the rate or the decay is out of range.
    """
    state = require_attached(model, "train")
    problems = []
    if not (_number(lr) and 0 < lr < float("inf")):
        problems.append(Diagnostic("lr", f"{lr!r} is not a positive finite number"))
    if not (_number(weight_decay) and 0 <= weight_decay < float("inf")):
        problems.append(Diagnostic("weight_decay", f"{weight_decay!r} is not a finite number of at least 0"))
    if problems:
        raise ConfigError("invalid optimizer settings:", problems)
    trained = [
        (
            parameter,
            role,
            layer.method.rate(role),
            role in adaptation(layer.method).delta.decayed_vectors,
            parameter.dim() - bool(layer.site.adapters),
        )
        for layer in adapted_layers(model).values()
        for role, parameter in layer.params.items()
    ]
    trained += [(p := base_parameter(model, name), "full", 1.0, False, p.dim()) for name in state.full]
    groups: dict[tuple[float, float, bool], dict[str, Any]] = {}
    seen: set[nn.Parameter] = set()  # layers may share tensors, and base parameters be tied
    for parameter, role, rate, decayed_vector, dims in trained:
        if not parameter.requires_grad or parameter in seen:
            continue
        seen.add(parameter)
        vector = dims < 2  # a vector of each expert is a vector
        decay = 0.0 if vector and not decayed_vector else weight_decay
        # decayed vectors have a group of their own, as before they had a decay: older runs can be resumed
        key = rate, decay, vector and decay > 0
        group = groups.setdefault(key, {"params": [], "lr": lr * rate, "weight_decay": decay, "roles": {}})
        group["params"].append(parameter)
        group["roles"][role] = None
    _check_cover(model, seen)
    for (rate, decay, _), group in groups.items():
        suffix = (f" x{rate:g}" if rate != 1 else "") + (" decayed" if decay else "")
        group["name"] = " ".join(group.pop("roles")) + suffix
    return list(groups.values())


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_cover(model: nn.Module, grouped: set[nn.Parameter]) -> None:
    """Refuse parameters that require a gradient outside of the groups, and empty groups.

    Raises:
        StateError: every such parameter.
    """
    what, fix = "requires a gradient, but no plan trains it", "freeze it, or name it in `full`"
    stray = [name for name, p in model.named_parameters() if p.requires_grad and p not in grouped]
    if stray:
        problems = [Diagnostic(name, what, fix) for name in stray]
        raise StateError("the parameter groups do not match the trainable parameters:", problems)
    if not grouped:
        what, fix = "no parameter requires a gradient", "load the adapter with trainable=True"
        raise StateError("nothing to train:", [Diagnostic("model", what, fix)])
