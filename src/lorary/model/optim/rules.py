"""rules: the training-time rules of a method (AdaLoRA, Delta-LoRA, O-LoRA, GLoRA) in any training loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import InitVar, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorary.errors import ConfigError, Diagnostic, StateError
from lorary.layers.adapted import Adapted, adapted_layers
from lorary.layers.dtensor import distribute_like
from lorary.model.ambient import mode_independent
from lorary.model.optim.automatic import AutomaticRules
from lorary.model.rank_pruning import prune_directions
from lorary.model.state import AttachedState, require_attached, state_of
from lorary.spec.interfaces import Rule


@dataclass
class Rules:
    """The rules of a method in a training run. Without rules every call does nothing.

    Args:
        model: with a method attached.
        steps: the number of optimizer steps of the run.
        optimizer: the run's optimizer, for rules that change its state.
        state: from `state_dict`, to resume a run.

    Attributes:
        step: optimizer steps done.
        layers: the adapted layers.
        rules: the method's rules; those of each method, if there are several.
        states: one per rule, its tensors by name.
        groups: one per rule, the layers that have it.
        hooks: what calls the rules if they are automatic; None otherwise.
    """

    model: nn.Module = field(repr=False)
    steps: int
    optimizer: torch.optim.Optimizer | None = field(default=None, repr=False)
    state: InitVar[Mapping[str, Tensor] | None] = None
    step: int = field(default=0, init=False)
    layers: list[Adapted] = field(init=False, repr=False)
    rules: tuple[Rule, ...] = field(init=False)
    states: list[dict[str, Tensor]] = field(init=False, repr=False)
    groups: list[list[Adapted]] = field(init=False, repr=False)
    hooks: AutomaticRules | None = field(default=None, init=False, repr=False)
    _attached: AttachedState | None = field(default=None, init=False, repr=False)

    def __post_init__(self, state: Mapping[str, Tensor] | None) -> None:
        layers = adapted_layers(self.model).values()
        self.rules = tuple(dict.fromkeys(rule for layer in layers for rule in layer.method.rules))
        self._find_layers()
        what, fix = "changes the optimizer's state", "lorary.rules(model, steps, optimizer)"
        names = [type(rule).__name__ for rule in self.rules if rule.needs_optimizer and self.optimizer is None]
        if names:
            problems = [Diagnostic(name, what, fix) for name in names]
            raise StateError("the method's rules need the optimizer:", problems)
        self.states = [rule.start(group, self.steps) for rule, group in zip(self.rules, self.groups, strict=True)]
        if state is None:
            self._before_step()
        else:  # the rules have done their work before the first step
            self.load_state_dict(state)

    def _find_layers(self) -> None:
        """Find the adapted layers: others hold the same tensors once `switch` has gone to another adapter and back."""
        self._attached = state_of(self.model)
        self.layers = list(adapted_layers(self.model).values())
        self.groups = [[layer for layer in self.layers if rule in layer.method.rules] for rule in self.rules]

    @property
    def _each(self) -> Iterator[tuple[Rule, list[Adapted], dict[str, Tensor]]]:
        """Every rule with its layers and its state."""
        if state_of(self.model) is not self._attached:
            self._find_layers()
        return zip(self.rules, self.groups, self.states, strict=True)

    def _before_step(self) -> None:
        for rule, layers, state in self._each:
            rule.before_step(layers, state, self.step + 1)

    @mode_independent
    def penalty(self) -> Tensor | float:
        """The sum of the rules' terms of the training loss."""
        terms = [rule.penalty(layers, state) for rule, layers, state in self._each]
        return sum(terms[1:], start=terms[0]) if terms else 0.0

    @mode_independent
    def after_backward(self) -> None:
        """Call when the gradients of an optimizer step are complete, before clipping."""
        for rule, layers, state in self._each:
            rule.after_backward(layers, state, self.step + 1)

    @torch.no_grad()
    @mode_independent
    def after_step(self) -> None:
        """Call after the optimizer has stepped, before the gradients are cleared."""
        self.step += 1
        require_attached(self.model, "train").rules_ran = True
        for rule, layers, state in self._each:
            rule.after_step(layers, state, self.step, self)
        self._before_step()

    @mode_independent
    def report(self) -> dict[str, Any]:
        """Metrics of the rules for the log: numbers, or numbers by site."""
        reports = [rule.report(layers, state) for rule, layers, state in self._each]
        return {name: value for report in reports for name, value in report.items()}

    @mode_independent
    def prune_directions(self, keep: Mapping[str, Tensor]) -> bool:
        """Remove all other rank directions (keep: site -> bool [R]); see `lorary.spec.interfaces.Run`.

        DDP and FSDP keep references to parameters: with them the adapter is pruned when it is saved.
        """
        single = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        return single and self.optimizer is not None and prune_directions(self.model, keep, self.optimizer)

    @mode_independent
    def state_dict(self) -> dict[str, Tensor]:
        """Tensors by name, for a checkpoint; under FSDP they may be sharded."""
        flat = {f"{i}.{name}": t for i, state in enumerate(self.states) for name, t in state.items()}
        return flat | {"step": torch.tensor(self.step)}

    @mode_independent
    def load_state_dict(self, flat: Mapping[str, Tensor]) -> None:
        """Load the result of `state_dict`: full tensors, also if the state is sharded here.

        Raises:
            StateError: it belongs to another method or run.
        """
        self._check_state(flat)
        self.step = int(flat["step"])
        for i, state in enumerate(self.states):
            for name, mine in state.items():
                value = flat[f"{i}.{name}"]
                fits = value.shape == mine.shape
                state[name] = distribute_like(mine, value.clone()) if fits else value.to(mine.device, copy=True)
        self._before_step()

    def _check_state(self, flat: Mapping[str, Tensor]) -> None:
        if not isinstance(flat, Mapping) or not all(isinstance(t, Tensor) for t in flat.values()):
            what = "is not a mapping from names to tensors"
            problem = Diagnostic("state", what, "pass the result of Rules.state_dict")
            raise StateError("invalid training state:", [problem])
        mine = self.state_dict()
        wrong = sorted(set(mine) ^ set(flat), key=str)
        # a rule empties the tensors that it no longer needs
        wrong += [k for k in mine.keys() & flat.keys() if mine[k].shape != flat[k].shape and flat[k].numel()]
        if wrong:
            problems = [Diagnostic(key, "is missing, unknown or of another shape") for key in wrong]
            raise StateError("the training state belongs to another method:", problems)
        if not 0 <= (step := float(flat["step"])) <= self.steps or step != int(step):
            what = f"is {step:g}, but the run has {self.steps} steps"
            problem = Diagnostic("step", what, "pass the steps of the saved run")
            raise StateError("the training state belongs to another run:", [problem])


@mode_independent
def rules(
    model: nn.Module,
    steps: int,
    optimizer: torch.optim.Optimizer | None = None,
    state: Mapping[str, Tensor] | None = None,
    *,
    automatic: bool = False,
) -> Rules:
    """The rules of the attached method for a training run.

    Args:
        model: with a method attached, at the start of the run or at the checkpoint to resume.
        steps: the number of optimizer steps of the whole run.
        optimizer: the run's optimizer. Some rules need it (O-LoRA's hard mode); AdaLoRA takes less memory with it.
        state: from `Rules.state_dict`, to resume.
        automatic: let the rules follow the gradients and the optimizer by hooks, so that the loop makes none of their
            calls. Needs the optimizer. Gradients must not be scaled (float16), nor the model be sharded by FSDP.

    Raises:
        StateError: nothing is attached; a rule needs the optimizer; the state belongs to another method or run; the
            model is sharded, and `automatic`.
        ConfigError: the number of steps is invalid, or too small for a rule; `optimizer` is not one.
    """
    require_attached(model, "train")
    if type(steps) is not int or steps < 0:
        problem = Diagnostic("steps", f"{steps!r} is not a number of optimizer steps")
        raise ConfigError("invalid number of steps:", [problem])
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        problem = Diagnostic("optimizer", f"is a {type(optimizer).__name__}, not an optimizer")
        raise ConfigError("invalid optimizer:", [problem])
    if automatic and optimizer is None:
        what, fix = "is missing, and automatic rules follow it", "lorary.rules(model, steps, optimizer)"
        problem = Diagnostic("optimizer", what, fix)
        raise ConfigError("invalid optimizer:", [problem])
    made = Rules(model, steps, optimizer, state)
    made.hooks = AutomaticRules(made) if automatic and made.rules else None
    return made
