"""PiSSA: y = (W - s B0 A0) x + b + s B A x, where s B0 A0 is the part of W in its r principal singular directions.

With W = U S V^T, B starts at U_r (S_r / s)^(1/2) and A at (S_r / s)^(1/2) V_r^T, and the base keeps the residual
W - s B0 A0. The directions that matter most train from the first step on; the update is s (B A - B0 A0).

Meng et al. 2024, arXiv:2404.02948, equations 2 to 4. The division by s, which allows any alpha, is PEFT's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Any

import torch
from torch import Tensor

from lorary.spec.fields import COUNT, added_later, optional
from lorary.spec.interfaces import Factors, Init, Tensors, component
from lorary.spec.presets import preset
from lorary.spec.site import Site

SVD = tuple[Tensor, Tensor, Tensor]  # U [out, r], S [r], Vh [r, in]


@component
class SVDInit(Init):
    """The start at the best rank-r approximation of W; the parts of a fused weight are decomposed one by one.

    Args:
        niter: power iterations of a randomised decomposition, or None for the exact one. Its error does not move the
            model at the start: exactly s B0 A0 is subtracted from the base.
        oversample: directions of the randomised decomposition beyond r.
        rounds: decompositions on a quantised base: the first of W, the others of the quantisation error of W - s B A.
    """

    niter: int | None = field(default=None, metadata=optional(COUNT))
    oversample: int = field(default=16, metadata=COUNT)
    rounds: int = field(default=1, metadata=added_later(COUNT))

    fills = frozenset({"A", "B"})
    residual_init = True

    def __call__(self, params: Tensors, W: Tensor, site: Site, scale: float, generator: torch.Generator) -> None:
        r = params["B"].shape[1]

        def principal(part: Tensor) -> tuple[Tensor, Tensor]:
            U, S, Vh = principal_directions(part, r, r + self.oversample, self.niter, generator)
            root = (S / scale).sqrt()
            return U * root, root[:, None] * Vh

        start_by_parts(params, W, site, principal)

    def problems(self, site: Site, r: int) -> list[str]:
        return too_small(site, r, "singular directions")


def randomised_svd(W: Tensor, r: int, width: int, niter: int, generator: torch.Generator) -> SVD:
    """The first r singular triplets (U [out, r], S [r], Vh [r, in]), from `width` random directions.

    Halko et al. 2011, arXiv:0909.4061, algorithms 4.4 and 5.1, on W's shorter side, with `niter` power iterations.
    """
    if W.shape[0] < W.shape[1]:
        U, S, Vh = randomised_svd(W.T, r, width, niter, generator)
        return Vh.T, S, U.T
    Q = torch.randn(W.shape[1], min(width, W.shape[1]), generator=generator).to(W)
    Q, _ = torch.linalg.qr(W @ Q)  # [out, width]
    for _ in range(niter):
        Q, _ = torch.linalg.qr(W.T @ Q)
        Q, _ = torch.linalg.qr(W @ Q)
    U, S, Vh = torch.linalg.svd(Q.T @ W, full_matrices=False)
    return Q @ U[:, :r], S[:r], Vh[:r]


def exact_svd(W: Tensor, r: int) -> SVD:
    """The first r singular triplets."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :r], S[:r], Vh[:r]


def principal_directions(W: Tensor, r: int, width: int, niter: int | None, generator: torch.Generator) -> SVD:
    """The first r singular triplets, exact where `niter` is None."""
    return exact_svd(W, r) if niter is None else randomised_svd(W, r, width, niter, generator)


def start_by_parts(params: Tensors, W: Tensor, site: Site, start: Callable[[Tensor], Factors]) -> None:
    """Fill B and A with start(part) = (B_i [rows, r], A_i [r, in]) of every part of W, computed in fp32."""
    for role, value in factors_by_parts(W.float(), site, start).items():
        params[role].copy_(value)


def factors_by_parts(W: Tensor, site: Site, start: Callable[[Tensor], Factors]) -> dict[str, Tensor]:
    """B and A of start(part) = (B_i [rows, r], A_i [r, in]) of every part of W."""
    pairs = [start(part) for part in site.split(W)]
    return {"B": torch.cat([B for B, _ in pairs]), "A": torch.cat([A for _, A in pairs])}


def too_small(site: Site, r: int, what: str, each: int = 1) -> list[str]:
    """The error of a start in r directions, or `each` times as many, of a W that has fewer."""
    most = min(*site.rows, site.in_features)
    taken = f"r is {r}" if each == 1 else f"{each} r are taken, r = {r}"
    return [f"its matrix has no more than {most} {what}, and {taken}"] if each * r > most else []


@preset(
    "pissa",
    citation="Meng et al. 2024, arXiv:2404.02948",
    when="For fast convergence, with one adapter at a time on the base.",
    answers={"convergence=fast": {}},
    restrictions={
        "lora+": "the ratio was derived for B = 0 at the start: retune it",
        "qlora": "attach to a base in full precision: the residual of each weight is quantised",
    },
)
def pissa(niter: int | None = None, rounds: int = 1) -> dict[str, Any]:
    """y = (W - s B0 A0) x + b + s B A x, s B0 A0 = W's r principal directions

    Args:
        niter: power iterations of the fast randomised decomposition (4 is plenty); None decomposes exactly.
        rounds: with qlora, decompositions of W and then of the quantisation error (the authors take 5).
    """
    return {"init": SVDInit(niter, rounds=rounds)}
