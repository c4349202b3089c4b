"""param_groups and rules: a method in an optimizer and in any training loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import InitVar, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorary.errors import ConfigError, Diagnostic, StateError
from lorary.layers.adapted import Adapted, adapted_layers
from lorary.layers.dtensor import distribute_like
from lorary.model.rank_pruning import shrink
from lorary.model.state import require
from lorary.spec.interfaces import Rule


@dataclass
class Rules:
    """A method's rules at work in a training run. Without rules every call does nothing.

    Args:
        model: with a method attached.
        steps: how many optimizer steps the run has.
        optimizer: the one that trains, for the rules that reach into its state.
        state: what `state_dict` gave, to go on from there.

    Attributes:
        step: optimizer steps done.
        layers: the adapted layers.
        rules: the method's.
        states: one for each rule, its tensors by name.
    """

    model: nn.Module = field(repr=False)
    steps: int
    optimizer: torch.optim.Optimizer | None = field(default=None, repr=False)
    state: InitVar[Mapping[str, Tensor] | None] = None
    step: int = field(default=0, init=False)
    layers: list[Adapted] = field(init=False, repr=False)
    rules: tuple[Rule, ...] = field(init=False)
    states: list[dict[str, Tensor]] = field(init=False, repr=False)

    def __post_init__(self, state: Mapping[str, Tensor] | None) -> None:
        self.layers = list(adapted_layers(self.model).values())
        self.rules = self.layers[0].method.rules if self.layers else ()
        _check_optimizer(self.rules, self.optimizer)
        self.states = [rule.start(self.layers, self.steps) for rule in self.rules]
        if state is None:
            self._before_step()
        else:  # what a rule does before the first step it has done
            self.load_state_dict(state)

    @property
    def _at_work(self) -> Iterator[tuple[Rule, dict[str, Tensor]]]:
        return zip(self.rules, self.states, strict=True)

    def _before_step(self) -> None:
        for rule, state in self._at_work:
            rule.before_step(self.layers, state, self.step + 1)

    def penalty(self) -> Tensor | float:
        """What the rules add to the training loss."""
        terms = [rule.penalty(self.layers, state) for rule, state in self._at_work]
        return sum(terms[1:], start=terms[0]) if terms else 0.0

    def after_backward(self) -> None:
        """Call when the gradients of an optimizer step are complete, before they are clipped."""
        for rule, state in self._at_work:
            rule.after_backward(self.layers, state, self.step + 1)

    @torch.no_grad()
    def after_step(self) -> None:
        """Call after the optimizer has stepped, before the gradients are cleared."""
        self.step += 1
        for rule, state in self._at_work:
            rule.after_step(self.layers, state, self.step, self)
        self._before_step()

    def report(self) -> dict[str, Any]:
        """Figures of the rules for the log: numbers, or numbers by site."""
        return {name: value for rule, state in self._at_work for name, value in rule.report(self.layers, state).items()}

    def shrink(self, keep: Mapping[str, Tensor]) -> bool:
        """Keep these directions alone (site -> bool [R]); see `lorary.spec.interfaces.Run`.

        DDP and FSDP hold on to the parameters that they were given: with them the adapter shrinks when it is saved.
        """
        alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        return alone and self.optimizer is not None and shrink(self.model, keep, self.optimizer)

    def state_dict(self) -> dict[str, Tensor]:
        """Flat tensors, for a checkpoint; under FSDP they may be sharded."""
        flat = {f"{i}.{name}": t for i, state in enumerate(self.states) for name, t in state.items()}
        return flat | {"step": torch.tensor(self.step)}

    def load_state_dict(self, flat: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` gave, whole tensors also where the state is sharded here.

        Raises:
            StateError: it was another method's: names or shapes differ.
        """
        if not isinstance(flat, Mapping) or not all(isinstance(t, Tensor) for t in flat.values()):
            problem = Diagnostic("state", "is no mapping of names to tensors", "pass the result of Rules.state_dict")
            raise StateError("invalid training state:", [problem])
        mine = self.state_dict()
        wrong = sorted(set(mine) ^ set(flat), key=str)
        # what a rule needs no more it gives back: nothing is left of it
        wrong += [k for k in mine.keys() & flat.keys() if mine[k].shape != flat[k].shape and flat[k].numel()]
        if wrong:
            problems = [Diagnostic(key, "is missing, unknown or of another shape") for key in wrong]
            raise StateError("the training state belongs to another method:", problems)
        if not 0 <= (step := float(flat["step"])) <= self.steps or step != int(step):
            problem = Diagnostic(
                "step", f"is {step:g}, and the run has {self.steps} steps", "pass the steps of the saved run"
            )
            raise StateError("the training state belongs to another run:", [problem])
        self.step = int(step)
        for i, state in enumerate(self.states):
            for name in state:
                value = flat[f"{i}.{name}"]
                fits = value.shape == state[name].shape
                state[name] = (
                    distribute_like(state[name], value.clone()) if fits else value.to(state[name].device, copy=True)
                )
        self._before_step()


def _check_optimizer(rules: tuple[Rule, ...], optimizer: torch.optim.Optimizer | None) -> None:
    what, fix = "reaches into the optimizer's state", "lorary.rules(model, steps, optimizer)"
    problems = [
        Diagnostic(type(rule).__name__, what, fix) for rule in rules if rule.needs_optimizer and optimizer is None
    ]
    if problems:
        raise StateError("the method's rules need the optimizer:", problems)


def rules(
    model: nn.Module,
    steps: int,
    optimizer: torch.optim.Optimizer | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> Rules:
    """The rules of the attached method, for a run of so many optimizer steps.

    Args:
        model: with a method attached, as it is at the start of the run, or where the run was left.
        steps: optimizer steps of the whole run.
        optimizer: the one that trains. Some rules need it (O-LoRA's hard mode), and AdaLoRA takes less memory with it.
        state: what `Rules.state_dict` gave, to go on from there.

    Raises:
        StateError: nothing is attached; a rule needs the optimizer; the state is another method's.
        ConfigError: so many steps leave no room for a rule.
    """
    require(model, "train")
    if type(steps) is not int or steps < 0:
        problem = Diagnostic("steps", f"{steps!r} is no number of optimizer steps")
        raise ConfigError("invalid number of steps:", [problem])
    return Rules(model, steps, optimizer, state)
