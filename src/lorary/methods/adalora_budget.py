"""AdaLoRA's rank budget: the rule that prunes directions (see `adalora`)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import field
from typing import Any

import torch
from torch import Tensor

from lorary.errors import ConfigError, Diagnostic
from lorary.layers.dtensor import distribute_like, full_tensor, local_shard
from lorary.spec.fields import COUNT, SHARE, STEPS, as_steps
from lorary.spec.interfaces import Layer, Rule, Run, Shapes, component

ROLES = ("P", "E", "Q")


@component
class RankBudget(Rule):
    """The global rank budget, which falls from all directions to an average of `target` per layer, and per expert.

    Time is counted in optimizer steps. All directions stay during the first `start_at` steps; then the budget falls
    along a cubic curve; during the last `final` steps the choice is final, and the scores are freed. A masked direction
    keeps its P and Q to the end, because the penalty on P and Q couples the directions of a layer. After the last step
    the masked directions are removed from the tensors and the optimizer's state (with several ranks: when the adapter
    is saved).

    Args:
        target: the directions that remain, on average over the layers.
        start_at: t_i, steps before the first mask: a share of the run below 1, or their number.
        final: t_f, steps at the end during which the choice is final, likewise.
        every: Delta T, steps between two masks.
        beta1: the smoothing of the sensitivity.
        beta2: the smoothing of its uncertainty.
    """

    target: int = field(metadata=COUNT)
    start_at: float = field(default=0.1, metadata=STEPS)
    final: float = field(default=0.3, metadata=STEPS)
    every: int = field(default=1, metadata=COUNT)
    beta1: float = field(default=0.85, metadata=SHARE)
    beta2: float = field(default=0.85, metadata=SHARE)

    needs = frozenset(ROLES)
    per_expert = True

    def problems(self, method: Any) -> list[str]:
        found = []
        if not method.join.adds_apart:
            name = type(method.join).__name__
            found.append(
                f"{name} depends on the norm of the joined weight, which changes whenever a direction is masked"
            )
        if sum(isinstance(rule, RankBudget) for rule in method.rules) > 1:
            found.append("there can be one budget only: two would undo each other's masks")
        if frozen := self.needs - method.trained:
            found.append(f"the scores need the gradients of P, E and Q, and {', '.join(sorted(frozen))} is frozen")
        if self.target > method.delta.r:
            found.append(f"a target of {self.target} is more than the {method.delta.r} directions of the start")
        return found

    def resized(self, r: int) -> Rule:
        return dataclasses.replace(self, target=min(self.target, r))

    def times(self, steps: int) -> tuple[int, int]:
        """(t_i, t_f) of a run of `steps` optimizer steps."""
        return as_steps(self.start_at, steps), as_steps(self.final, steps)

    def budget(self, step: int, steps: int, ranks: Sequence[int]) -> int:
        """b(t): the directions of the whole model after an optimizer step (from 1).

        Args:
            step: t.
            steps: T, of the run.
            ranks: the rank of every layer at the start.
        """
        (t_i, t_f), most, least = self.times(steps), sum(ranks), min(self.target * len(ranks), sum(ranks))
        if step <= t_i:
            return most
        if step >= steps - t_f:
            return least
        return int(least + (most - least) * (1 - (step - t_i) / (steps - t_i - t_f)) ** 3)

    def start(self, layers: Sequence[Layer], steps: int) -> dict[str, Tensor]:
        t_i, t_f = self.times(steps)
        if t_i + t_f >= steps:
            what = f"{t_i} steps before and {t_f} after leave none of the run's {steps} for the budget to fall"
            raise ConfigError(
                "AdaLoRA's budget does not fit this run:", [Diagnostic("rules", what, "lower start or final")]
            )
        state = {"steps": torch.tensor(steps)}
        for layer in layers:
            name = layer.site.name
            for role in ROLES:
                for mean in "IU":  # smoothed sensitivity, and its uncertainty
                    state[f"{mean}|{name}|{role}"] = torch.zeros_like(layer.params[role], dtype=torch.float32)
            state[f"alive|{name}"] = torch.ones(layer.params["E"].shape, dtype=torch.bool)
        return state

    def state_bytes(self, shapes: Shapes) -> int:
        return sum(2 * 4 * math.prod(shapes[role]) for role in ROLES)  # I and U, in 32 bits

    def after_backward(self, layers: Sequence[Layer], state: dict[str, Tensor], step: int) -> None:
        if not self._is_final(state, step - 1):
            self._update_importance(layers, state)

    def after_step(self, layers: Sequence[Layer], state: dict[str, Tensor], step: int, run: Run) -> None:
        steps = int(state["steps"])
        t_i, t_f = self.times(steps)
        if self._is_final(state, step - 1):
            self._mask(layers, state)
        elif step == steps - t_f or (step > t_i and step % self.every == 0):
            ranks = [layer.method.delta.r for layer in layers for _ in range(max(layer.site.adapters, 1))]
            self._select(layers, state, self.budget(step, steps, ranks))
            self._mask(layers, state)
        if self._is_final(state, step):
            for name in [name for name in state if name[0] in "IU"]:  # the scores
                state[name] = torch.zeros(0)
        if step == steps:
            self._prune(layers, state, run)

    def report(self, layers: Sequence[Layer], state: dict[str, Tensor]) -> dict[str, Any]:
        ranks = {layer.site.name: int(state[f"alive|{layer.site.name}"].sum()) for layer in layers}
        return {"rank_budget": sum(ranks.values()), "ranks": ranks}

    def _is_final(self, state: dict[str, Tensor], step: int) -> bool:
        """Whether the choice of directions is final after `step` steps."""
        steps = int(state["steps"])
        return step >= steps - self.times(steps)[1]

    @torch.no_grad()
    def _update_importance(self, layers: Sequence[Layer], state: dict[str, Tensor]) -> None:
        """Equations 9-11: I <- b1 I + (1 - b1) |w g|, then U <- b2 U + (1 - b2) | |w g| - I |."""
        places = [(layer, role) for layer in layers for role in ROLES if layer.params[role].grad is not None]
        if not places:
            return
        weights = [local_shard(layer.params[role]).float() for layer, role in places]
        gradients = [local_shard(layer.params[role].grad).float() for layer, role in places]
        means, doubts = ([local_shard(state[f"{m}|{layer.site.name}|{role}"]) for layer, role in places] for m in "IU")
        now = torch._foreach_mul(weights, gradients)
        torch._foreach_abs_(now)
        torch._foreach_lerp_(means, now, 1 - self.beta1)
        torch._foreach_sub_(now, means)
        torch._foreach_abs_(now)
        torch._foreach_lerp_(doubts, now, 1 - self.beta2)

    def scores(self, layer: Layer, state: dict[str, Tensor]) -> Tensor:
        """[R]: the importance of every direction: its E's, plus the means over its column of P and row of Q (eq. 8).

        Of experts it is [E, R].
        """
        name = layer.site.name
        s = {role: state[f"I|{name}|{role}"] * state[f"U|{name}|{role}"] for role in ROLES}  # equation 12
        out, inp = layer.site.out_features, layer.site.in_features
        return full_tensor(s["E"]) + full_tensor(s["P"].sum(-2)) / out + full_tensor(s["Q"].sum(-1)) / inp

    def _select(self, layers: Sequence[Layer], state: dict[str, Tensor], budget: int) -> None:
        """The best `budget` directions of the whole model; of equal ones those that come first."""
        shapes = [layer.params["E"].shape for layer in layers]
        sizes = [shape.numel() for shape in shapes]
        found = [self.scores(layer, state).flatten() for layer in layers]
        scores = torch.cat([score.to(found[0].device) for score in found]).cpu()  # waits for the device once
        best = torch.sort(scores, descending=True, stable=True).indices[:budget]
        alive = torch.zeros(sum(sizes), dtype=torch.bool).index_fill(0, best, True)
        for layer, own_part, shape in zip(layers, alive.split(sizes), shapes, strict=True):
            state[f"alive|{layer.site.name}"] = own_part.reshape(shape).clone()

    @staticmethod
    def _mask(layers: Sequence[Layer], state: dict[str, Tensor]) -> None:
        """E = 0 in every masked direction."""
        E = [layer.params["E"] for layer in layers]
        alive = torch.cat([state[f"alive|{layer.site.name}"].flatten() for layer in layers])
        masks = alive.to(E[0].device, E[0].dtype).split([e.numel() for e in E])  # copied to the device at once
        sharded = [distribute_like(e, mask.to(e.dtype).view(e.shape)) for e, mask in zip(E, masks, strict=True)]
        torch._foreach_mul_([local_shard(e) for e in E], [local_shard(mask) for mask in sharded])

    @staticmethod
    def _prune(layers: Sequence[Layer], state: dict[str, Tensor], run: Run) -> None:
        """Remove the masked directions: the run is over."""
        own = {layer.site.name: state[f"alive|{layer.site.name}"] for layer in layers}
        alive = {site: mask.flatten(0, -2).any(0) if mask.dim() == 2 else mask for site, mask in own.items()}
        if not all(bool(mask.all()) for mask in alive.values()) and run.prune_directions(alive):
            for site, mask in alive.items():
                state[f"alive|{site}"] = own[site][..., mask]
