"""MultiLoRA: y = W x + b + s (diag(gamma_1) B_1 A_1 + ... + diag(gamma_n) B_n A_n) x.

n parallel LoRAs of full width have a trained scale per output. A and B start at random and gamma at zero, so that
several directions carry equal weight, whereas a few singular values dominate the update of one LoRA.

Wang et al. 2023, arXiv:2311.11501, section 3.2. The authors have published no code: gamma as a vector over the outputs
is our reading.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import field
from typing import Any

import torch
from torch import Tensor, nn

from lorary.spec.fields import COUNT
from lorary.spec.interfaces import Delta, Factors, Init, Shapes, Tensors, component
from lorary.spec.presets import preset
from lorary.spec.resizable import Resizable
from lorary.spec.site import Site


@component
class ParallelLowRank(Resizable, Delta):
    """A_i [r, in], B_i [out, r] and gamma_i [out], stacked: A [n r, in], B [out, n r], gamma [out n], row by row."""

    r: int = field(metadata=COUNT)
    n: int = field(metadata=COUNT)

    roles = frozenset({"A", "B", "gamma"})

    def shapes(self, site: Site) -> Shapes:
        rows = sum(site.rows)
        wide = self.n * self.r
        return {"A": (len(site.rows) * wide, site.in_features), "B": (rows, wide), "gamma": (rows * self.n,)}

    def rank_dims(self, site: Site) -> Mapping[str, tuple[int, int]]:
        return {"A": (0, len(site.rows) * self.n), "B": (1, self.n)}

    def factors(self, site: Site, params: Tensors) -> Factors:
        gamma = params["gamma"].view(-1, self.n, 1)
        B = params["B"].view(-1, self.n, self.r) * gamma
        return site.place(B.flatten(1)), params["A"]


@component
class MultiLoRAInit(Init):
    """A_i ~ U(-1/sqrt(in), 1/sqrt(in)), B_i ~ U(-1/sqrt(r), 1/sqrt(r)), gamma = 0."""

    fills = frozenset({"A", "B", "gamma"})

    def zeros(self, site: Site) -> frozenset[str]:
        return frozenset({"gamma"})

    def __call__(self, params: Tensors, W: Tensor, site: Site, scale: float, generator: torch.Generator) -> None:
        n = params["gamma"].numel() // params["B"].shape[0]
        nn.init.kaiming_uniform_(params["A"], a=math.sqrt(5), generator=generator)
        bound = 1 / math.sqrt(params["B"].shape[1] // n)
        nn.init.uniform_(params["B"], -bound, bound, generator=generator)
        nn.init.zeros_(params["gamma"])


@preset(
    "multilora",
    citation="Wang et al. 2023, arXiv:2311.11501",
    when="For a mixture of many tasks in one adapter.",
    answers={"tasks=mixed": {}},
    restrictions={"lora+": "the ratio was derived for B = 0 at the start: retune it; gamma learns at A's rate"},
)
def multilora(r: int = 16, n: int = 3) -> dict[str, Any]:
    """y = W x + b + s (diag(gamma_1) B_1 A_1 + ... + diag(gamma_n) B_n A_n) x

    Args:
        r: the rank of each LoRA, which sets s.
        n: the number of LoRAs.
    """
    return {"delta": ParallelLowRank(r, n), "init": MultiLoRAInit()}
