"""AdaLoRA: W' = W + s P diag(E) Q, pruned so that the rank goes to the layers that need it most.

P [out, r], E [r] and Q [r, in] have the shape of a singular value decomposition; a penalty keeps P and Q close to
orthonormal. The importance of a direction is the sensitivity of the loss to its entries, smoothed, times its
uncertainty. The least important directions of the whole model are masked (their E is zero) until the current budget is
met. A masked direction keeps its P and Q, which the penalty still trains, and may return until the last phase, in which
the choice is final.

Zhang et al. 2023, arXiv:2303.10512, equations 2, 8-12 and algorithm 1.

Differs from the paper: the penalty is by default that of the authors' code: Frobenius norms, not squared, averaged over
all P and Q (`form="paper"`: squared and summed); the scale is the authors', alpha / (r + 1e-5). Differs from the
authors' code: scores are computed before the optimizer step, from the weights that the unclipped gradients belong to,
as in the paper; steps count from 1, as in algorithm 1 (their trainer counts from 0, so that its budget falls one step
later); exactly as many directions remain as the budget says, with ties or without; and after the last step the masked
directions are removed from the tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

import torch
from torch import Tensor, nn

from lorary.layers.dtensor import full_tensor
from lorary.methods.adalora_budget import ROLES, RankBudget
from lorary.spec.fields import AMOUNT, COUNT, POSITIVE, WHOLE, one_of, optional
from lorary.spec.interfaces import Delta, Factors, Init, Layer, PrunableDelta, Rule, Shapes, Tensors, component
from lorary.spec.presets import preset
from lorary.spec.resizable import Resizable, Singular
from lorary.spec.site import Site


@component
class SVDDelta(Resizable, Delta, PrunableDelta):
    """P [out, R], E [R] and Q [R, in], with B = P diag(E) and A = Q.

    Args:
        r: the number of directions at the start, which sets s.
        kept: R, the number that remains once the choice is final; it may be 0.
    """

    r: int = field(metadata=COUNT)
    kept: int | None = field(default=None, metadata=optional(WHOLE))

    roles = frozenset(ROLES)
    decayed_vectors = frozenset({"E"})
    role_aliases = {"A": "Q", "B": "P"}  # noqa: RUF012 (never written)
    directions = {"P": -1, "E": -1, "Q": -2}  # noqa: RUF012
    batched = True

    @property
    def R(self) -> int:  # noqa: N802 (as in the shapes)
        """The current number of directions."""
        return self.r if self.kept is None else self.kept

    def shapes(self, site: Site) -> Shapes:
        return {"P": (site.out_features, self.R), "E": (self.R,), "Q": (self.R, site.in_features)}

    def factors(self, site: Site, params: Tensors) -> Factors:
        return params["P"] * params["E"].unsqueeze(-2), params["Q"]

    def rank_dims(self, site: Site) -> Mapping[str, tuple[int, int]]:
        return {"P": (1, 1), "E": (0, 1), "Q": (0, 1)}

    def products(self, site: Site, params: Tensors) -> list[Factors]:
        return [self.factors(site, params)]

    def from_products(self, site: Site, products: Sequence[Singular]) -> dict[str, Tensor]:
        ((U, S, V),) = products
        return {"P": U, "E": S, "Q": V}

    def with_directions(self, R: int) -> Delta:
        return dataclasses.replace(self, kept=R)

    def active_directions(self, params: Tensors) -> Tensor:
        return params["E"] != 0

    def problems(self, site: Site) -> list[str]:
        found = [f"{self.kept} of {self.r} directions cannot remain"] if self.r < self.R else []
        if site.parts:
            found.append("its projections cannot have separate spectra: adapt the fused weight as a whole")
        return found


@component
class SVDDeltaInit(Init):
    """P, Q ~ N(0, std^2), E = 0."""

    std: float = field(default=0.02, metadata=POSITIVE)

    fills = frozenset(ROLES)

    def zeros(self, site: Site) -> frozenset[str]:
        return frozenset({"E"})

    def __call__(self, params: Tensors, W: Tensor, site: Site, scale: float, generator: torch.Generator) -> None:
        nn.init.normal_(params["P"], std=self.std, generator=generator)
        nn.init.normal_(params["Q"], std=self.std, generator=generator)
        nn.init.zeros_(params["E"])


@component
class AlphaOverInitialRank:
    """s = alpha / (r + 1e-5) with the rank at the start: pruning does not change it."""

    alpha: float = field(metadata=POSITIVE)

    def __call__(self, r: int) -> float:
        return self.alpha / (r + 1e-5)


@component
class OrthogonalityPenalty(Rule):
    """The penalty ||P^T P - I|| and ||Q Q^T - I|| of every layer, which keeps P and Q close to orthonormal.

    Args:
        weight: gamma.
        form: `paper`: the sum of the squared Frobenius norms; `authors`: the mean of the norms.
    """

    weight: float = field(default=0.1, metadata=AMOUNT)
    form: str = field(default="authors", metadata=one_of("authors", "paper"))

    needs = frozenset({"P", "Q"})
    per_expert = True

    def penalty(self, layers: Sequence[Layer], state: dict[str, Tensor]) -> Tensor | float:
        if not layers or not self.weight:
            return 0.0
        alike: dict[tuple[Any, ...], list[Tensor]] = {}  # matrices of one shape are multiplied at once
        for layer in layers:
            for M in (full_tensor(layer.params["P"]).mT, full_tensor(layer.params["Q"])):
                matrices = M if M.dim() == 3 else M[None]  # of every expert
                alike.setdefault((*M.shape[-2:], M.device, M.dtype), []).append(matrices)
        gaps = [self._gaps(torch.cat(several)) for several in alike.values()]
        of_all = torch.cat([gap.to(gaps[0]) for gap in gaps])
        return self.weight * (of_all.mean() if self.form == "authors" else of_all.sum())

    def _gaps(self, M: Tensor) -> Tensor:
        """[n]: how far the rows of each of n matrices [n, R, .] are from orthonormal."""
        G = M @ M.mT
        G = G - torch.eye(G.shape[1], dtype=G.dtype, device=G.device)
        return torch.linalg.matrix_norm(G) if self.form == "authors" else G.square().sum((1, 2))


@preset(
    "adalora",
    citation="Zhang et al. 2023, arXiv:2303.10512",
    lr=5e-4,
    when="When layers differ in how much rank they need, and the total must be small.",
    answers={"layers=differ": {}},
    restrictions={
        "lora+": "the ratio is between P and Q, and was derived for B = 0 at the start: retune it; E learns at Q's rate"
    },
)
def adalora(
    r: int = 12,
    target: int = 8,
    start: float = 0.1,
    final: float = 0.3,
    every: int = 1,
    alpha: float = 32.0,
    orthogonality: float = 0.1,
    form: str = "authors",
) -> dict[str, Any]:
    """y = W x + b + s P diag(E) Q x

    Args:
        r: directions per layer at the start; 1.5 times the target in the paper.
        target: directions per layer that remain, on average.
        start: optimizer steps before the first pruning: a share of the run below 1, or their number.
        final: optimizer steps at the end during which the choice is final, likewise.
        every: optimizer steps between two prunings.
        alpha: s = alpha / (r + 1e-5) with the r of the start.
        orthogonality: the weight of the penalty on P and Q.
        form: of the penalty: `authors`, norms averaged, or `paper`, squared norms summed.
    """
    return {
        "delta": SVDDelta(r),
        "init": SVDDeltaInit(),
        "scale": AlphaOverInitialRank(alpha),
        "rules": (RankBudget(target, start, final, every), OrthogonalityPenalty(orthogonality, form)),
    }
