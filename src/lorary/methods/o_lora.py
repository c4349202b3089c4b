"""O-LoRA: y = W x + b + s (B_1 A_1 + ... + B_t A_t) x, with A_t kept orthogonal to the A of the tasks before.

Tasks are trained one after another, and only A_t and B_t train. If the rows of A_t are orthogonal to those of A_i, the
new task changes nothing for inputs in the row space of A_i. B is not constrained: orthogonality of B is neither
necessary nor sufficient.

Wang et al. 2023, arXiv:2310.14152, equations 7 and 8.

Differs from the paper: its penalty is on the raising matrix, which it calls A; in the authors' code, and in both forms
here, it is on the input side. The penalty is a mean over its entries, so that its weight does not depend on the number
of layers and tasks (`mean=False` for the sum). Dropout never acts on the earlier tasks. `hard` is ours: A_t is
projected onto the complement of the earlier A's after every step, together with the optimizer's momentum, so that the
penalty is always zero.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import field
from typing import Any

import torch
from torch import Tensor

from lorary.kernels.low_rank import add_low_rank
from lorary.layers.dtensor import full_tensor, local_shard
from lorary.methods.lora import Add, LowRank
from lorary.spec.fields import AMOUNT, COUNT, FLAG, SIZES, one_of
from lorary.spec.interfaces import Delta, Factors, Layer, Rule, Run, Shapes, Tensors, component
from lorary.spec.presets import Restriction, preset
from lorary.spec.resizable import PairsOfFactors
from lorary.spec.site import Site

_MOMENTA = ("exp_avg", "momentum_buffer")  # an optimizer's running means of gradients


@component
class SequentialLoRA(PairsOfFactors, Delta):
    """B [out, r] and A [r, in] of this task; B_past [out, R] and A_past [R, in] of all earlier ones.

    Args:
        r: the rank of this task.
        past: the ranks of the earlier tasks, in order; R is their sum.
    """

    r: int = field(metadata=COUNT)
    past: tuple[int, ...] = field(default=(), metadata=SIZES)

    fused_for_all_kinds = True
    batched = True

    @property
    def roles(self) -> frozenset[str]:
        return frozenset({"A", "B"}) | self.fixed_roles

    @property
    def fixed_roles(self) -> frozenset[str]:  # type: ignore[override]  # a constant of most deltas
        return frozenset({"A_past", "B_past"} if self.past else ())

    @property
    def task_index(self) -> int:  # type: ignore[override]  # a constant of most deltas
        return len(self.past) if isinstance(self.past, tuple) else 0  # its field has not been checked yet

    def shapes(self, site: Site) -> Shapes:
        now = LowRank(self.r).shapes(site)
        before: Shapes = {"A_past": (sum(self.past), site.in_features), "B_past": (site.out_features, sum(self.past))}
        return now | (before if self.past else {})

    def factors(self, site: Site, params: Tensors) -> Factors:
        B, A = site.place(params["B"]), params["A"]
        return (torch.cat([B, params["B_past"]], -1), torch.cat([A, params["A_past"]], -2)) if self.past else (B, A)

    def add(self, layer: Layer, y: Tensor, x: Tensor, dropout: float) -> Tensor:
        params, add = layer.tensors, layer.kind.add
        B = layer.site.place(params["B"])
        if self.past and layer.kind.rowwise and not dropout:
            return add_low_rank(y, x, params["A"], B, layer.scale, frozen=(params["A_past"], params["B_past"]))
        if self.past:  # separately: dropout never acts on the earlier tasks
            y = add(layer.base, y, x, params["A_past"], params["B_past"], layer.scale, 0.0)
        return add(layer.base, y, x, params["A"], B, layer.scale, dropout)

    def after(self, past: Sequence[Factors], scale: float) -> tuple[Delta, dict[str, Tensor]]:
        delta = dataclasses.replace(self, past=tuple(A.shape[-2] for _, A in past))
        B, A = torch.cat([B for B, _ in past], -1), torch.cat([A for _, A in past], -2)
        return delta, {"A_past": A, "B_past": B / scale}

    def tasks(self, B: Tensor, A: Tensor) -> list[Factors]:
        sizes = [A.shape[-2] - sum(self.past), *self.past]
        now, *before = zip(B.split(sizes, -1), A.split(sizes, -2), strict=True)
        return [*before, now]

    def problems(self, site: Site) -> list[str]:
        rank = self.r * len(site.rows)
        left = site.in_features - sum(self.past)
        if not self.past or rank <= left:
            return []
        taken = f"of its {site.in_features} input directions {len(self.past)} earlier tasks have taken {sum(self.past)}"
        return [f"{taken}: there is no room for {rank} more that are orthogonal to them"]


@component
class OrthogonalToPast(Rule):
    """The orthogonality of A to A_past: a penalty on the products of their rows, or a projection.

    Args:
        weight: of the penalty, lambda_1 in the paper.
        form: `authors`: absolute products, as in their code; `paper`: squared products.
        mean: the mean over all products of all layers, instead of their sum.
        hard: no penalty; A and the optimizer's momentum stay in the orthogonal complement of A_past.
        norms: lambda_2 of the authors' code, the weight of the sum of the norms of A and B, in the first task as well.
    """

    weight: float = field(default=0.5, metadata=AMOUNT)
    form: str = field(default="authors", metadata=one_of("authors", "paper"))
    mean: bool = field(default=True, metadata=FLAG)
    hard: bool = field(default=False, metadata=FLAG)
    norms: float = field(default=0.0, metadata=AMOUNT)

    needs = frozenset({"A", "B"})
    per_expert = True

    @property
    def needs_optimizer(self) -> bool:  # type: ignore[override]  # a constant of most rules
        return self.hard

    def problems(self, method: Any) -> list[str]:
        found = []
        if not isinstance(method.join, Add):
            found.append(f"O-LoRA adds up the updates of its tasks, and {type(method.join).__name__} is not additive")
        if "A" not in method.trained and not self.hard:
            found.append("the penalty is on A, which is frozen; hard=True lets A start in the complement instead")
        return found

    def start(self, layers: Sequence[Layer], steps: int) -> dict[str, Tensor]:
        if not self.hard:
            return {}
        return {f"basis|{layer.site.name}": _basis_of(layer) for layer in _layers_with_past(layers)}

    def state_bytes(self, shapes: Shapes) -> int:
        return 4 * math.prod(shapes["A_past"]) if self.hard and "A_past" in shapes else 0  # the basis

    def before_step(self, layers: Sequence[Layer], state: dict[str, Tensor], step: int) -> None:
        """A starts in the complement; B is still zero, so nothing moves."""
        if self.hard and step == 1:
            for layer in _layers_with_past(layers):
                _project(layer.params["A"], state[f"basis|{layer.site.name}"])

    def penalty(self, layers: Sequence[Layer], state: dict[str, Tensor]) -> Tensor | float:
        value: Tensor | float = 0.0
        if self.norms:
            value = self.norms * _sum(
                torch.linalg.matrix_norm(full_tensor(layer.params[r])).sum() for layer in layers for r in "AB"
            )
        later = _layers_with_past(layers)
        if self.hard or not later or not self.weight:
            return value
        products = [full_tensor(layer.params["A_past"]) @ full_tensor(layer.params["A"]).mT for layer in later]
        total = _sum(P.abs().sum() if self.form == "authors" else P.square().sum() for P in products)
        return value + self.weight * total / (sum(P.numel() for P in products) if self.mean else 1)

    def after_backward(self, layers: Sequence[Layer], state: dict[str, Tensor], step: int) -> None:
        """Project the gradients as well, so that an optimizer's second moment matches its projected momentum.

        For an input that is always zero the gradient is zero too; projecting the momentum alone would divide the
        momentum of other inputs by a second moment of zero there.
        """
        if self.hard:
            for layer in _layers_with_past(layers):
                if layer.params["A"].grad is not None:
                    _project(layer.params["A"].grad, state[f"basis|{layer.site.name}"])

    def after_step(self, layers: Sequence[Layer], state: dict[str, Tensor], step: int, run: Run) -> None:
        if not self.hard:
            return
        for layer in _layers_with_past(layers):
            A, Q = layer.params["A"], state[f"basis|{layer.site.name}"]
            if not A.requires_grad:
                continue
            _project(A, Q)
            moments = run.optimizer.state.get(A, {}) if run.optimizer is not None else {}
            for name in _MOMENTA:
                if isinstance(moments.get(name), Tensor):
                    _project(moments[name], Q)


def _layers_with_past(layers: Sequence[Layer]) -> list[Layer]:
    """The layers with factors of earlier tasks."""
    return [layer for layer in layers if "A_past" in layer.params]


def _sum(terms: Iterable[Tensor]) -> Tensor:
    """The sum, on the device of the first term."""
    first, *others = terms
    return sum((term.to(first.device) for term in others), start=first)


def _basis_of(layer: Layer) -> Tensor:
    """An orthonormal basis of the row space of all earlier A's of a layer, in at least fp32.

    Those of experts are stacked, [E, k, in], with rows of zeros where one has fewer than k.
    """
    A = full_tensor(layer.params["A_past"]).detach()
    A = A.to(torch.promote_types(A.dtype, torch.float32))
    found = []
    for one in A if A.dim() == 3 else A[None]:
        Q = A.new_zeros(0, A.shape[-1])
        for rows in one.split(layer.method.delta.past):
            Q = basis(rows, Q)
        found.append(Q)
    return torch.nn.utils.rnn.pad_sequence(found, batch_first=True) if A.dim() == 3 else found[0]


@torch.no_grad()
def basis(A: Tensor, Q: Tensor) -> Tensor:
    """An orthonormal basis [k, in] of the rows of Q [., in], which it begins with, and of A [R, in]."""
    rest = A - (A @ Q.T) @ Q
    rest = rest - (rest @ Q.T) @ Q  # twice is enough (Kahan)
    _, sizes, rows = torch.linalg.svd(rest, full_matrices=False)
    longest = torch.linalg.vector_norm(A, dim=1).max() if len(A) else 0.0
    new = rows[sizes > 10 * max(A.shape) * torch.finfo(A.dtype).eps * longest]
    return torch.cat([Q, new])


def _project(tensor: Tensor, Q: Tensor) -> None:
    """Project every row onto the complement of the orthonormal rows Q, in place.

    Copies are multiplied, since rounding depends on the alignment of the factors in memory, which differs after a
    checkpoint was loaded.
    """
    with torch.no_grad():
        rows, Q = local_shard(tensor), Q.clone()
        rows.sub_((rows.to(Q, copy=True) @ Q.mT @ Q).to(rows))  # paged momenta are on another device


@preset(
    "o-lora",
    citation="Wang et al. 2023, arXiv:2310.14152",
    aliases=("orthogonal-lora",),
    when="For one task after another on the same model, if the earlier ones must not be forgotten.",
    answers={"tasks=sequence": {}},
    restrictions={
        "lora-fa": Restriction(
            "only with hard=True: A is frozen at its start, which is in the complement of the earlier tasks",
            options={"hard": True},
        )
    },
)
def o_lora(
    r: int = 8, weight: float = 0.5, form: str = "authors", mean: bool = True, hard: bool = False, norms: float = 0.0
) -> dict[str, Any]:
    """y = W x + b + s (B_1 A_1 + ... + B_t A_t) x, A_t orthogonal to A_1 ... A_(t-1)

    Args:
        r: the rank of every task.
        weight: the weight of the penalty on the products of A_t with earlier A's.
        form: of the penalty: `authors` takes absolute products, `paper` squared ones.
        mean: the mean of the products instead of their sum.
        hard: instead of a penalty, project A_t onto the orthogonal complement of the earlier A's.
        norms: lambda_2, the weight of the sum of the norms of A_t and B_t; the authors' scripts use 0 to 0.3.
    """
    return {"delta": SequentialLoRA(r), "rules": (OrthogonalToPast(weight, form, mean, hard, norms),)}
