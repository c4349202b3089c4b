"""LoHa: y = W x + b + s ((B1 A1) * (B2 A2)) x, * element by element, with s = alpha / r.

Two low-rank products, multiplied element by element, reach a rank of up to r^2 with the parameters of rank 2 r. In the
Tucker form the kernel of a convolution has a core for its window, so that its width does not multiply the parameters.

Hyeon-Woo et al. 2021, arXiv:2108.06098, propositions 1 and 3 (FedPara); as an adapter of a frozen weight Yeh et al.
2023, arXiv:2309.14859 (LyCORIS), whose start and defaults these are.

Differs from PEFT's start: there A2 is zero and the other three are uniform. A fused site has one product for all of its
parts.
"""

from __future__ import annotations

import math
from dataclasses import field
from typing import Any

import torch
from torch import Tensor, nn

from lorary.kernels.hadamard import add_hadamard
from lorary.kernels.low_rank import add_low_rank
from lorary.methods.lora import AlphaOverRank
from lorary.spec.fields import COUNT, FLAG
from lorary.spec.interfaces import Delta, Factors, Init, Layer, Shapes, Tensors, component
from lorary.spec.presets import preset
from lorary.spec.site import Site


@component
class LowRankHadamard(Delta):
    """B1, B2 [out, r] and A1, A2 [r, in]; in the Tucker form A1, A2 [r, channels] and T1, T2 [r, r, window]."""

    r: int = field(metadata=COUNT)
    tucker: bool = field(default=False, metadata=FLAG)

    roles = frozenset({"B1", "A1", "B2", "A2", "T1", "T2"})
    batched = True
    chains = (("A1", "B1"), ("A2", "B2"))
    chains_meet = "\N{CIRCLED DOT OPERATOR}"

    def shapes(self, site: Site) -> Shapes:
        window = math.prod(site.kernel_size) if has_core(site, self.tucker) else 1
        found: Shapes = {}
        for i in "12":
            found |= {f"A{i}": (self.r, site.in_features // window), f"B{i}": (sum(site.rows), self.r)}
            found |= {f"T{i}": (self.r, self.r, window)} if window > 1 else {}
        return found

    def factors(self, site: Site, params: Tensors) -> Factors:
        one, two = _pairs(params)
        if self.r * self.r < min(site.in_features, sum(site.rows)):
            B, A = _khatri_rao(one, two)
        else:
            B, A = matrix_factors((one[0] @ one[1]) * (two[0] @ two[1]))
        return site.place_rows(B), A

    def add(self, layer: Layer, y: Tensor, x: Tensor, dropout: float) -> Tensor:
        out, into = layer.site.out_features, layer.site.in_features
        one, two = _pairs(layer.params)
        if self.r * self.r * (out + into) < out * into:
            B, A = _khatri_rao(one, two)
            return add_low_rank(y, x, A, B, layer.scale, dropout)
        return add_hadamard(y, x, *one, *two, layer.scale, dropout)


def has_core(site: Site, tucker: bool) -> bool:
    """Whether the factors of a site have a core for its window: a window of one element needs none."""
    return tucker and math.prod(site.kernel_size) > 1


def with_core(A: Tensor, T: Tensor | None) -> Tensor:
    """A [r, in] of a matrix: A [r, channels] and its core T [r, r, window], multiplied."""
    return A if T is None else torch.einsum("...ijk,...jc->...ick", T, A).flatten(-2)


def _pairs(params: Tensors) -> tuple[Factors, Factors]:
    """(B1, A1), (B2, A2) of a matrix."""
    one, two = ((params[f"B{i}"], with_core(params[f"A{i}"], params.get(f"T{i}"))) for i in (1, 2))
    return one, two


def _khatri_rao(one: Factors, two: Factors) -> Factors:
    """The factors of rank r^2 of (B1 A1) * (B2 A2): all products of a column of B1 and one of B2; so the rows of A."""
    (B1, A1), (B2, A2) = one, two
    B = (B1[..., :, None] * B2[..., None, :]).flatten(-2)
    return B, (A1[..., :, None, :] * A2[..., None, :, :]).flatten(-3, -2)


def matrix_factors(M: Tensor) -> Factors:
    """The factors (M, 1) or (1, M) of a matrix, whichever are smaller."""
    rows, columns = M.shape[-2:]
    small = min(rows, columns)
    identity = torch.eye(small, dtype=M.dtype, device=M.device).expand(*M.shape[:-2], small, small)
    return (identity, M) if rows < columns else (M, identity)


@component
class HadamardInit(Init):
    """B1 ~ N(0, 0.01), B2 = 0, A1, A2 ~ N(0, 1); T1, T2 ~ N(0, 0.01)."""

    fills = frozenset({"B1", "A1", "B2", "A2", "T1", "T2"})

    def zeros(self, site: Site) -> frozenset[str]:
        return frozenset({"B2"})

    def __call__(self, params: Tensors, W: Tensor, site: Site, scale: float, generator: torch.Generator) -> None:
        for role, tensor in params.items():
            nn.init.normal_(tensor, std=1.0 if role in ("A1", "A2") else 0.1, generator=generator)
        nn.init.zeros_(params["B2"])


@preset(
    "loha",
    citation="Hyeon-Woo et al. 2021, arXiv:2108.06098",
    when="For a high rank from few parameters, and for the files of diffusion tools.",
)
def loha(r: int = 4, alpha: float = 1.0, tucker: bool = False) -> dict[str, Any]:
    """y = W x + b + s ((B1 A1) * (B2 A2)) x, * element by element

    Args:
        r: the rank of both products; that of the update is up to its square.
        alpha: s = alpha / r.
        tucker: convolutions have cores for their windows, and so fewer parameters.
    """
    return {"delta": LowRankHadamard(r, tucker), "init": HadamardInit(), "scale": AlphaOverRank(alpha)}
