"""Delta-LoRA: W_(t+1) = W_t + lambda s (B_(t+1) A_(t+1) - B_t A_t), so that the weight follows the product B A.

This happens in every optimizer step t > K, with t counted from 0 as in algorithm 1: in the first K + 1 steps W stays as
it is. As lambda is constant the sum telescopes: with the product after these steps kept as B_K A_K, the update of the
untouched base is s (1 + lambda) B A - lambda s B_K A_K. `mode="closed"` computes exactly that: no weight is written, so
the base may be quantised or shared, and the update has at most rank 2r (r with K = -1, if W follows from the first
step). The gradients of A and B are those of the paper's model, s B A beside W_t: the factor 1 + lambda is divided out.

`mode="paper"` writes the weights step by step, as algorithm 1 does, for comparison.

Zi et al. 2023, arXiv:2309.02411, algorithm 1. The authors have published no code.

Differs from the paper: its claim that the accumulated update has full rank does not hold for a constant lambda; with
K = -1 and an optimizer that is invariant to the scale of gradients, Delta-LoRA is LoRA with (1 + lambda) alpha.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any, cast

import torch
from torch import Tensor

from lorary.errors import ConfigError, Diagnostic, MethodError
from lorary.kernels.low_rank import add_low_rank
from lorary.layers.dtensor import copy_into, full_tensor
from lorary.methods.lora import LowRank
from lorary.spec.fields import COUNT, FLAG, POSITIVE, WHOLE
from lorary.spec.interfaces import Delta, Factors, Layer, Rule, Run, Shapes, Tensors, component
from lorary.spec.presets import preset
from lorary.spec.resizable import PairsOfFactors
from lorary.spec.site import Site


@component
class DeltaLoRADelta(PairsOfFactors, Delta):
    """(1 + lambda) B A - lambda B_K A_K of B [out, r] and A [r, in].

    Args:
        r: the rank of B A, which sets s.
        ratio: lambda.
        late: whether the weight begins to follow after the first step. The factors at that step are kept as A_K [r, in]
            and B_K [out, r], with lam [1]: zero before it, lambda from then on.
    """

    r: int = field(metadata=COUNT)
    ratio: float = field(metadata=POSITIVE)
    late: bool = field(default=True, metadata=FLAG)

    batched = True

    @property
    def roles(self) -> frozenset[str]:
        return frozenset({"A", "B"}) | self.fixed_roles

    @property
    def fixed_roles(self) -> frozenset[str]:  # type: ignore[override]  # a constant of most deltas
        return frozenset({"A_K", "B_K", "lam"} if self.late else ())

    def shapes(self, site: Site) -> Shapes:
        now = LowRank(self.r).shapes(site)
        return now | ({"A_K": now["A"], "B_K": now["B"], "lam": (1,)} if self.late else {})

    def rank_dims(self, site: Site) -> Mapping[str, tuple[int, int]]:
        now = super().rank_dims(site)
        return {**now, "A_K": now["A"], "B_K": now["B"]} if self.late else now

    def products(self, site: Site, params: Tensors) -> list[Factors]:
        return [] if self.late else super().products(site, params)

    def factors(self, site: Site, params: Tensors) -> Factors:
        if not self.late:
            return (1 + self.ratio) * site.place(params["B"]), params["A"]
        lam = params["lam"].unsqueeze(-1)
        B, B_K = (1 + lam) * params["B"], -lam * params["B_K"]
        return torch.cat([site.place(B), site.place(B_K)], -1), torch.cat([params["A"], params["A_K"]], -2)

    def add(self, layer: Layer, y: Tensor, x: Tensor, dropout: float) -> Tensor:
        if self.late:
            B, A = layer.factors()
            return add_low_rank(y, x, A, B, layer.scale, dropout)
        return add_low_rank(y, x, layer.params["A"], layer.params["B"], layer.scale * (1 + self.ratio), dropout)


def _common_problems(method: Any) -> list[str]:
    where = ["with dropout: set dropout=0"] if method.dropout else []
    apart = method.join.adds_apart and method.join.acts_everywhere
    where += [] if apart else [f"under {type(method.join).__name__}"]
    problems = [f"Delta-LoRA takes the gradient of B A for that of W, and they differ {text}" for text in where]
    if sum(isinstance(rule, DeltaLoRARule | DeltaLoRAPaperRule) for rule in method.rules) > 1:
        problems.append("the weight can follow the product once only")
    return problems


@component
class DeltaLoRARule(Rule):
    """The weight follows the product B A after every optimizer step except the first K + 1: in closed form.

    Args:
        ratio: lambda.
        after: the optimizer steps before the weight follows: K + 1.
    """

    ratio: float = field(metadata=POSITIVE)
    after: int = field(default=0, metadata=WHOLE)

    needs = frozenset({"A", "B"})
    per_expert = True

    def problems(self, method: Any) -> list[str]:
        found = _common_problems(method)
        delta = method.delta
        if not isinstance(delta, DeltaLoRADelta) or (delta.ratio, delta.late) != (self.ratio, self.after > 0):
            found.append(
                f"{self} goes with DeltaLoRADelta(r, ratio={self.ratio}, late={self.after > 0}), not with {delta}"
            )
        return found

    def start(self, layers: Sequence[Layer], steps: int) -> dict[str, Tensor]:
        _check_start(self.after, steps)
        return {}

    @torch.no_grad()
    def after_backward(self, layers: Sequence[Layer], state: dict[str, Tensor], step: int) -> None:
        """The paper's gradients, which are those of s B A, while forward has s (1 + lambda) B A."""
        if self._follows(layers, step):
            gradients = [g for layer in layers for role in "AB" if (g := layer.params[role].grad) is not None]
            if gradients:
                torch._foreach_mul_(gradients, 1 / (1 + self.ratio))

    def after_step(self, layers: Sequence[Layer], state: dict[str, Tensor], step: int, run: Run) -> None:
        if step == self.after and not self._follows(layers, step):
            for layer in layers:
                for role in "AB":
                    layer.params[f"{role}_K"].detach().copy_(layer.params[role])
                layer.params["lam"].detach().fill_(self.ratio)

    def _follows(self, layers: Sequence[Layer], step: int) -> bool:
        """Whether the weight follows in this step.

        In step K + 1 it does if an older version, which began one step earlier, has taken the snapshot already.
        """
        return step > self.after or (step == self.after and bool(full_tensor(layers[0].params["lam"].detach()).any()))


@component
class DeltaLoRAPaperRule(Rule):
    """The weight follows the product B A after every optimizer step except the first K + 1: written, as in the paper.

    Args:
        ratio: lambda.
        after: the optimizer steps before the weight follows: K + 1.
    """

    ratio: float = field(metadata=POSITIVE)
    after: int = field(default=0, metadata=WHOLE)

    needs = frozenset({"A", "B"})
    writes_base = True

    def problems(self, method: Any) -> list[str]:
        found = _common_problems(method)
        if others := method.delta.roles - self.needs:
            found.append(f"the product of A and B is written, and {', '.join(sorted(others))} would have a part in it")
        if isinstance(method.delta, DeltaLoRADelta):
            found.append("DeltaLoRADelta follows the product already: to write the weight, use LowRank")
        return found

    def start(self, layers: Sequence[Layer], steps: int) -> dict[str, Tensor]:
        _check_start(self.after, steps)
        coarse = [layer for layer in layers if cast(Tensor, layer.base.weight).dtype.itemsize < 4]
        if coarse:
            what = f"is {coarse[0].base.weight.dtype} by now: rounding would lose most of what is added to it"
            problems = [Diagnostic(layer.site.name, what, "keep the base in float32") for layer in coarse]
            raise ConfigError("Delta-LoRA cannot write these weights:", problems)
        return {f"{role}|{layer.site.name}": layer.params[role].detach().clone() for layer in layers for role in "AB"}

    def state_bytes(self, shapes: Shapes) -> int:
        return sum(4 * math.prod(shapes[role]) for role in "AB")

    def before_step(self, layers: Sequence[Layer], state: dict[str, Tensor], step: int) -> None:
        with torch.no_grad():
            for layer in layers:
                for role in "AB":
                    state[f"{role}|{layer.site.name}"].copy_(layer.params[role])

    @torch.no_grad()
    def after_step(self, layers: Sequence[Layer], state: dict[str, Tensor], step: int, run: Run) -> None:
        if step <= self.after:
            return
        for layer in layers:
            before = {role: full_tensor(state[f"{role}|{layer.site.name}"]) for role in "AB"}
            W, W_t = layer.kind.matrix(layer.base), cast(Tensor, layer.base.weight)
            B, A = layer.method.delta.factors(
                layer.site, {role: full_tensor(layer.params[role].detach()) for role in "AB"}
            )
            B_t, A_t = layer.method.delta.factors(layer.site, before)
            change = torch.addmm(B @ A, B_t, A_t, alpha=-1).to(W.dtype)
            moved = full_tensor(W_t.detach()) + layer.kind.weight(layer.base, self.ratio * layer.scale * change)
            copy_into(W_t, moved)


def _check_start(after: int, steps: int) -> None:
    if steps <= after:
        what = f"the weight would begin to follow after step {after}, and the run has {steps}: it would be LoRA"
        raise ConfigError("Delta-LoRA does not fit this run:", [Diagnostic("rules", what, "use a smaller start")])


@preset(
    "delta-lora",
    citation="Zi et al. 2023, arXiv:2309.02411",
    when="To see whether a weight that follows its update helps; with Adam it is close to LoRA with a larger alpha.",
)
def delta_lora(r: int = 16, ratio: float = 2.0, start: int = 500, mode: str = "closed") -> dict[str, Any]:
    """y = W x + b + s ((1 + lambda) B A - lambda B_K A_K) x

    Args:
        r: the rank of B A.
        ratio: lambda, the share of the product's change that is added to the weight.
        start: K: the weight follows in every optimizer step t > K, counted from 0; -1 for all steps.
        mode: `closed` leaves the weights alone; `paper` writes them, in fp32.
    """
    problems = []
    if mode not in ("closed", "paper"):
        problems.append(Diagnostic("mode", f"is {mode!r}; it takes closed or paper"))
    if type(start) is not int or start < -1:
        problems.append(Diagnostic("start", f"is {start!r}; it takes a whole number of at least -1"))
    if problems:
        raise MethodError("invalid method:", problems)
    if mode == "paper":
        return {"delta": LowRank(r), "rules": (DeltaLoRAPaperRule(ratio, start + 1),)}
    return {"delta": DeltaLoRADelta(r, ratio, late=start >= 0), "rules": (DeltaLoRARule(ratio, start + 1),)}
