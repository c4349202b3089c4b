"""groups and tuning: how the words meet an optimizer and a training loop, any loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from lorary.adapted import Adapted, adapted
from lorary.errors import ConfigError, Problem, StateError
from lorary.state import base_parameter, require
from lorary.words import Rule


def groups(model: nn.Module, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
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
        problems.append(Problem("lr", f"{lr!r} is not a positive finite number"))
    if not (_number(weight_decay) and 0 <= weight_decay < float("inf")):
        problems.append(Problem("weight_decay", f"{weight_decay!r} is not a finite number of at least 0"))
    if problems:
        raise ConfigError("these are no optimizer settings:", problems)
    rows: dict[tuple[float, float], dict[str, Any]] = {}

    def put(role: str, parameter: nn.Parameter, rate: float) -> None:
        decay = weight_decay if parameter.dim() > 1 else 0.0
        row = rows.setdefault((rate, decay), {"params": [], "lr": lr * rate, "weight_decay": decay, "roles": {}})
        row["params"].append(parameter)
        row["roles"][role] = None

    for layer in adapted(model).values():
        for role, parameter in layer.p.items():
            if parameter.requires_grad:
                put(role, parameter, layer.method.rate(role))
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
    what, fix = "requires a gradient, but no plan trains it", "freeze it, or say it in `full`"
    stray = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in ids]
    if stray:
        problems = [Problem(name, what, fix) for name in stray]
        raise StateError("the groups would not cover what trains exactly:", problems)
    if not grouped:
        what, fix = "no parameter requires a gradient", "load the adapter with trainable=True"
        raise StateError("there is nothing to train:", [Problem("model", what, fix)])


@dataclass
class Tuning:
    """A method's rules at work in a training run. Without rules every call does nothing.

    Args:
        layers: the adapted layers.
        steps: how many optimizer steps the run has.

    Attributes:
        step: optimizer steps done.
        rules: the method's.
        states: one for each rule, its tensors by name.
    """

    layers: list[Adapted] = field(repr=False)
    steps: int
    step: int = field(default=0, init=False)
    rules: tuple[Rule, ...] = field(init=False)
    states: list[dict[str, Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.rules = self.layers[0].method.rules if self.layers else ()
        self.states = [rule.start(self.layers, self.steps) for rule in self.rules]
        self._before_step()

    def _before_step(self) -> None:
        for rule, state in zip(self.rules, self.states, strict=True):
            rule.before_step(self.layers, state, self.step + 1)

    def penalty(self) -> Tensor | float:
        """What the rules add to the training loss."""
        terms = [rule.penalty(self.layers, state) for rule, state in zip(self.rules, self.states, strict=True)]
        return sum(terms[1:], start=terms[0]) if terms else 0.0

    def after_backward(self) -> None:
        """Call when the gradients of an optimizer step are complete, before they are clipped."""
        for rule, state in zip(self.rules, self.states, strict=True):
            rule.after_backward(self.layers, state, self.step + 1)

    @torch.no_grad()
    def after_step(self) -> None:
        """Call after the optimizer has stepped, before the gradients are cleared."""
        self.step += 1
        for rule, state in zip(self.rules, self.states, strict=True):
            rule.after_step(self.layers, state, self.step)
        self._before_step()

    def state_dict(self) -> dict[str, Tensor]:
        """Flat tensors, for a checkpoint."""
        flat = {f"{i}.{name}": t for i, state in enumerate(self.states) for name, t in state.items()}
        return flat | {"step": torch.tensor(self.step)}

    def load_state_dict(self, flat: dict[str, Tensor]) -> None:
        """Put back what `state_dict` gave.

        Raises:
            StateError: it was another method's: names or shapes differ.
        """
        mine = self.state_dict()
        wrong = sorted(set(mine) ^ set(flat)) + [k for k in mine.keys() & flat.keys() if mine[k].shape != flat[k].shape]
        if wrong:
            problems = [Problem(key, "is missing, unknown or of another shape") for key in wrong]
            raise StateError("this is another method's training state:", problems)
        self.step = int(flat["step"])
        for i, state in enumerate(self.states):
            for name in state:
                state[name] = flat[f"{i}.{name}"].to(state[name].device, copy=True)
        self._before_step()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode inside, without dropout; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def tuning(model: nn.Module, steps: int) -> Tuning:
    """The rules of the attached method, for a run of so many optimizer steps.

    Raises:
        StateError: nothing is attached.
    """
    require(model, "train")
    return Tuning(list(adapted(model).values()), steps)
