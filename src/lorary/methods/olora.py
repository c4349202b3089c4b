"""OLoRA: B starts at the first r columns of Q and A at the first r rows of R, where W = Q R.

The base becomes W - s B A. Without pivoting B spans the first r columns of W, so that B A = B B^T W: only those
columns are decomposed, and one product gives A.

Buyukakyuz 2024, arXiv:2406.01775, section 3; the residual with s is that of the author's code in PEFT.

Differs from the authors' code: it works on transposed weights, convolutions and embeddings; there, a transposed
weight fails, or moves the output where it is square.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorary.fields import COUNT, FLAG, later
from lorary.methods.pissa import start_by_parts, too_small
from lorary.preset import preset
from lorary.sites import Site
from lorary.words import Init, Tensors, word


@word
@dataclass(frozen=True)
class Orthonormal(Init):
    """B starts with orthonormal columns, A upper trapezoidal; a fused weight's parts are taken one by one.

    Args:
        divide: start with s B A = Q_r R_r, by dividing A by s, instead of s Q_r R_r: with a large s the latter makes
            the base and the delta large terms that cancel.
        rounds: as for PiSSA's `Principal`; more than one with `divide` alone: what is lost would grow by s in each.
    """

    divide: bool = field(default=False, metadata=FLAG)
    rounds: int = field(default=1, metadata=later(COUNT))

    fills = frozenset({"A", "B"})
    moves_base = True

    @property
    def within(self) -> bool:  # type: ignore[override]  # a plain attribute of the others
        return self.divide

    def __call__(self, p: Tensors, W: Tensor, site: Site, scale: float, generator: torch.Generator) -> None:
        r = p["B"].shape[1]

        def orthonormal(part: Tensor) -> tuple[Tensor, Tensor]:
            Q, _ = torch.linalg.qr(part[:, :r])
            return Q, Q.T @ part / (scale if self.divide else 1.0)

        start_by_parts(p, W, site, orthonormal)

    def problems(self, site: Site, r: int) -> list[str]:
        return too_small(site, r, "orthonormal columns")


@preset(
    "olora",
    citation="Buyukakyuz 2024, arXiv:2406.01775",
    when="As PiSSA, where decomposing every weight takes too long.",
)
def olora(divide: bool = False, rounds: int = 1) -> dict[str, Any]:
    """y = (W - s B0 A0) x + b + s B A x, B0 = Q_r, A0 = R_r of W = Q R

    Args:
        divide: start A at R_r / s, so that the start does not grow with alpha.
        rounds: with qlora, how often the columns are looked for in what packing loses.
    """
    return {"init": Orthonormal(divide, rounds)}
