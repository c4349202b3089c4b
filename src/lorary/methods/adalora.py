"""AdaLoRA: W' = W + s P diag(E) Q, with directions dropped one by one, so that the rank goes where it is worth most.

P [out, r], E [r] and Q [r, inp] have the shape of a singular value decomposition; a penalty keeps P and Q near to
orthonormal. A direction is worth what its numbers would change the loss by (sensitivity, smoothed, times how unsure
that is), and the least valuable ones of the whole model are masked (their E set to zero) until the budget of the
moment is met. A masked direction keeps its P and Q and may come back, until the last phase, when the choice stands.

Zhang et al. 2023, arXiv:2303.10512, equations 2, 8-12 and algorithm 1.

Differs from the paper: the penalty is by default the one of the authors' code: Frobenius norms, not squared, averaged
over all P and Q (`form="paper"`: squared and summed). Differs from the authors' code: scores are taken before the
optimizer steps, of the weights that the gradients belong to, as the paper has it; exactly as many directions stay as
the budget says, ties or not; and when the choice stands, the masked directions are taken out of the tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorary.fields import AMOUNT, COUNT, POSITIVE, WHOLE, one_of, optional
from lorary.methods.adalora_budget import ROLES, RankBudget
from lorary.preset import preset
from lorary.shards import together
from lorary.sites import Site
from lorary.words import Delta, Init, Layer, Rule, Shapes, Tensors, word


@word
@dataclass(frozen=True)
class Spectral(Delta):
    """P [out, R], E [R] and Q [R, inp], with B = P diag(E) and A = Q.

    Args:
        r: how many directions there are at the start; s is taken of it.
        kept: how many are left (R), once the choice stands; none of them may be left.
    """

    r: int = field(metadata=COUNT)
    kept: int | None = field(default=None, metadata=optional(WHOLE))

    roles = frozenset(ROLES)
    known_as = {"A": "Q", "B": "P"}  # noqa: RUF012 (never written)
    directions = {"P": 1, "E": 0, "Q": 0}  # noqa: RUF012

    @property
    def R(self) -> int:  # noqa: N802 (as in the shapes)
        """How many directions there are now."""
        return self.r if self.kept is None else self.kept

    def shapes(self, site: Site) -> Shapes:
        return {"P": (site.out, self.R), "E": (self.R,), "Q": (self.R, site.inp)}

    def factors(self, site: Site, p: Tensors) -> tuple[Tensor, Tensor]:
        return p["P"] * p["E"], p["Q"]

    def left(self, R: int) -> Delta:
        """The same with R directions left."""
        return dataclasses.replace(self, kept=R)

    def alive(self, p: Tensors) -> Tensor:
        """[R] of which directions the update consists."""
        return p["E"] != 0

    def problems(self, site: Site) -> list[str]:
        found = [f"{self.kept} of {self.r} directions cannot be left"] if self.r < self.R else []
        if site.parts:
            found.append("its projections cannot have a spectrum each: adapt the fused weight as a whole")
        return found


@word
@dataclass(frozen=True)
class SmallNormal(Init):
    """P, Q ~ N(0, std^2), E = 0."""

    std: float = field(default=0.02, metadata=POSITIVE)

    fills = frozenset(ROLES)

    def zeros(self, site: Site) -> frozenset[str]:
        return frozenset({"E"})

    def __call__(self, p: Tensors, W: Tensor, site: Site, scale: float, generator: torch.Generator) -> None:
        nn.init.normal_(p["P"], std=self.std, generator=generator)
        nn.init.normal_(p["Q"], std=self.std, generator=generator)
        nn.init.zeros_(p["E"])


@word
@dataclass(frozen=True)
class ByStartRank:
    """s = alpha / (r + 1e-5), r being the rank at the start: what is dropped later does not change it."""

    alpha: float = field(metadata=POSITIVE)

    def __call__(self, r: int) -> float:
        return self.alpha / (r + 1e-5)


@word
@dataclass(frozen=True)
class Orthogonal(Rule):
    """P and Q are kept near to orthonormal: by ||P^T P - I|| and ||Q Q^T - I|| of every layer.

    Args:
        weight: gamma.
        form: `paper`: the sum of the squared Frobenius norms; `authors`: the mean of the norms.
    """

    weight: float = field(default=0.1, metadata=AMOUNT)
    form: str = field(default="authors", metadata=one_of("authors", "paper"))

    needs = frozenset({"P", "Q"})
    writes_base = False

    def penalty(self, layers: Sequence[Layer], state: dict[str, Tensor]) -> Tensor | float:
        alike: dict[tuple[Any, ...], list[Tensor]] = {}  # matrices of one shape are multiplied at once
        for layer in layers:
            for M in (together(layer.p["P"]).T, together(layer.p["Q"])):
                rows = M if layer.chosen is None else M[layer.chosen]
                if len(rows):
                    alike.setdefault((*rows.shape, rows.device, rows.dtype), []).append(rows)
        gaps = [self._gaps(torch.stack(several)) for several in alike.values()]
        if not gaps or not self.weight:
            return 0.0
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
    when="When the layers differ in how much rank they need, and the sum of it has to be small.",
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
        r: directions of each layer at the start; 1.5 times the target in the paper.
        target: directions of each layer that are left, on average.
        start: optimizer steps before any is dropped: a share of the run below 1, or their number.
        final: optimizer steps for which the choice stands, likewise.
        every: optimizer steps between two choices.
        alpha: s = alpha / r, with the r of the start.
        orthogonality: the weight of the penalty on P and Q.
        form: of the penalty: `authors`, norms averaged, or `paper`, squared norms summed.
    """
    return {
        "delta": Spectral(r),
        "init": SmallNormal(),
        "scale": ByStartRank(alpha),
        "rules": (RankBudget(target, start, final, every), Orthogonal(orthogonality, form)),
    }
