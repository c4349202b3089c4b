"""MoSLoRA: y = W x + b + s B M A x, where the mixer M [r, r] trains between A and B.

LoRA adds r subspaces one by one, B's column i with A's row i; the mixer weighs every column with every row.

Wu et al. 2024, arXiv:2406.11909, section 3.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any

import torch
from torch import Tensor, nn

from lorary.methods.lora import Kaiming, LowRank
from lorary.spec.fields import COUNT
from lorary.spec.interfaces import Delta, Factors, Init, Shapes, Tensors, component
from lorary.spec.presets import preset
from lorary.spec.site import Site


@component
class Mixed(Delta):
    """B [out, r], M [r, r] and A [r, in]; every part of a fused site has its own three."""

    r: int = field(metadata=COUNT)

    roles = frozenset({"A", "B", "M"})

    def shapes(self, site: Site) -> Shapes:
        return LowRank(self.r).shapes(site) | {"M": (self.r * len(site.rows), self.r)}

    def factors(self, site: Site, params: Tensors) -> Factors:
        return site.place(params["B"]) @ torch.block_diag(*params["M"].split(self.r)), params["A"]


@component
class Mixer(Init):
    """A and B as LoRA's, M orthogonal."""

    fills = frozenset({"A", "B", "M"})

    def zeros(self, site: Site) -> frozenset[str]:
        return Kaiming().zeros(site)

    def __call__(self, params: Tensors, W: Tensor, site: Site, scale: float, generator: torch.Generator) -> None:
        Kaiming()(params, W, site, scale, generator)
        for M in params["M"].split(params["M"].shape[1]):
            nn.init.orthogonal_(M, generator=generator)


@preset(
    "moslora",
    citation="Wu et al. 2024, arXiv:2406.11909",
    lr=3e-4,
    when="For more from the same rank, at r * r numbers more in a layer.",
    answers={"quality=best": {}},
    restrictions={"lora+": "the ratio is between B and A; M learns at A's rate"},
)
def moslora(r: int = 16) -> dict[str, Any]:
    """y = W x + b + s B M A x

    Args:
        r: the rank; the mixer has r * r numbers.
    """
    return {"delta": Mixed(r), "init": Mixer()}
