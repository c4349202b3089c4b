"""MELoRA: y = W x + b + s blockdiag(B_1 A_1, ..., B_n A_n) x.

n mini-LoRAs work side by side, each from its slice of the inputs to its slice of the outputs. B A has a rank of up to
n r with the parameters of rank r, whatever n is. s = alpha / r with the r of one mini-LoRA.

Ren et al. 2024, arXiv:2402.17263, equation 4.

Differs from the authors' code: inputs may have any number of dimensions, and merging works (theirs indexes a list of
modules by a name); sizes that n does not divide are refused, where theirs drops the remainder.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any

import torch
from torch import Tensor

from lorary.kernels.block_diagonal import add_blocks
from lorary.spec.fields import COUNT
from lorary.spec.interfaces import Delta, Factors, Layer, Shapes, Tensors, component
from lorary.spec.presets import preset
from lorary.spec.resizable import PairsOfFactors
from lorary.spec.site import Site


@component
class BlockDiagonal(PairsOfFactors, Delta):
    """A_i [r, in / n] and B_i [out / n, r], stacked: A [n r, in / n] and B [out, r]."""

    r: int = field(metadata=COUNT)
    n: int = field(metadata=COUNT)

    roles = frozenset({"A", "B"})

    @property
    def blocks(self) -> int:  # type: ignore[override]  # a constant of most deltas
        return self.n

    def shapes(self, site: Site) -> Shapes:
        return {"A": (len(site.rows) * self.n * self.r, site.in_features // self.n), "B": (sum(site.rows), self.r)}

    def factors(self, site: Site, params: Tensors) -> Factors:
        downs = params["A"].split(self.n * self.r)  # of every part of a fused site
        ups = params["B"].split(site.rows)
        A = torch.cat([torch.block_diag(*down.chunk(self.n)) for down in downs])
        B = torch.cat([torch.block_diag(*up.chunk(self.n)) for up in ups])
        return site.place(B), A

    def add(self, layer: Layer, y: Tensor, x: Tensor, dropout: float) -> Tensor:
        A = layer.params["A"].view(self.n, self.r, -1)
        B = layer.params["B"].view(self.n, -1, self.r)
        return add_blocks(y, x, A, B, layer.scale, dropout)

    def problems(self, site: Site) -> list[str]:
        sizes = {"input": [site.in_features], "output": site.rows}
        return [
            f"n = {self.n} does not divide its {size} {side} features"
            for side, each in sizes.items()
            for size in sorted(set(each))
            if size % self.n
        ]


@preset(
    "melora",
    citation="Ren et al. 2024, arXiv:2402.17263",
    lr=3e-4,
    when="For a high rank at the price of a low one.",
    restrictions={"rslora": "the rank under the root is that of one mini-LoRA"},
)
def melora(r: int = 8, n: int = 2) -> dict[str, Any]:
    """y = W x + b + s blockdiag(B_1 A_1, ..., B_n A_n) x

    Args:
        r: the rank of each mini-LoRA, which sets s.
        n: the number of mini-LoRAs; it must divide the inputs and outputs of every layer.
    """
    return {"delta": BlockDiagonal(r, n)}
