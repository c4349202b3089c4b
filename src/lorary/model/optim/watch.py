"""Warnings about a training loop that leaves out a part of the method: learning-rate ratios, rules, an adapted head.

In somebody else's loop nothing of lorary runs between `attach` and `save`. PyTorch calls a hook before every step of
every optimizer; the first step of one that trains an adapter is checked there, and later ones cost a look-up.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lorary.errors import caller_stacklevel
from lorary.layers.adapted import Adapted, adapted_layers
from lorary.model.state import state_of

_WATCHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_CHECKED: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


class MethodWarning(UserWarning):
    """A part of the method that a training loop leaves out."""


def watch(model: nn.Module) -> None:
    """Check the first step of every optimizer that trains the adapters of this model."""
    if adapted_layers(model):
        _WATCHED.add(model)
        _install_hook()


@functools.cache
def _install_hook() -> None:
    """One hook for all optimizers of the process."""
    register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if optimizer in _CHECKED:
        return
    _CHECKED.add(optimizer)
    groups = [(group.get("initial_lr", group.get("lr")), group["params"]) for group in optimizer.param_groups]
    rates = {id(p): rate for rate, parameters in groups for p in parameters}  # None: the optimizer has no such thing
    for model in list(_WATCHED):
        state, layers = state_of(model), adapted_layers(model)
        if state is None or not any(id(p) in rates for layer in layers.values() for p in layer.params.values()):
            continue
        state.stepped = True
        for text in filter(None, (_lost_rates(layers, rates), _idle_head(model, layers), _no_gradient(layers))):
            _warn(text)


def _warn(text: str) -> None:
    warnings.warn(text, MethodWarning, stacklevel=caller_stacklevel())


def _lost_rates(layers: dict[str, Adapted], rates: dict[int, Any]) -> str | None:
    """Why the learning rates of a layer's tensors do not have the ratio that its method demands."""
    for name, layer in layers.items():
        here = {
            role: float(rates[id(p)])
            for role, p in layer.params.items()
            if rates.get(id(p)) is not None and p.requires_grad
        }
        units = {role: rate / layer.method.rate(role) for role, rate in here.items()}
        if not layer.method.rates or len(units) < 2 or max(units.values()) <= min(units.values()) * (1 + 1e-6):
            continue
        wanted = ", ".join(f"{role} x{rate:g}" for role, rate in layer.method.rates.items())
        found = ", ".join(f"{role} {rate:g}" for role, rate in sorted(here.items()))
        return (
            f"the optimizer does not have the method's learning-rate ratios ({wanted}): at {name} it has {found}; "
            "make it with lorary.optimizer(model, lr=...) or from lorary.param_groups(model, lr=...)"
        )
    return None


def _idle_head(model: nn.Module, layers: dict[str, Adapted]) -> str | None:
    """Why an adapter on the language-model head trains nothing: some trainers multiply by its weight themselves."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if not isinstance(head, Adapted) or any(p.grad is not None for p in head.params.values()):
        return None
    if all(p.grad is None for layer in layers.values() for p in layer.params.values()):
        return None
    return (
        f"no gradient has reached the adapter at {head.site.name}: this trainer computes its loss from the weight of "
        f"the head and not through the layer; plan again with exclude={head.site.name!r}, or use `lorary train`"
    )


def _no_gradient(layers: dict[str, Adapted]) -> str | None:
    """Why an optimizer's step cannot train an adapter: the gradients are in another model than the optimizer's."""
    if _has_gradient(layers) or not any(_has_gradient(adapted_layers(model)) for model in list(_WATCHED)):
        return None
    return (
        f"the optimizer steps, and no gradient has reached the adapter at {next(iter(layers))} nor any other: it is "
        "that of another model than the one that trains, perhaps of a copy; make it from the model of the loss"
    )


def _has_gradient(layers: dict[str, Adapted]) -> bool:
    return any(p.grad is not None for layer in layers.values() for p in layer.params.values())


def warn_of_idle_rules(model: nn.Module) -> None:
    """Warn, once, that an adapter was trained without the rules of its method."""
    state = state_of(model)
    rules = sorted({type(rule).__name__ for layer in adapted_layers(model).values() for rule in layer.method.rules})
    if state is None or not rules or not state.stepped or state.rules_ran:
        return
    state.rules_ran = True
    _warn(
        f"the adapter was trained without its method's rules ({', '.join(rules)}), so it is not what the method makes: "
        "pass callbacks=[lorary.TrainerCallback(model)] to the trainer, or call lorary.rules(model, steps, optimizer, "
        "automatic=True) in your own loop"
    )
