"""No update of the weight: the delta and the init of methods whose join alone trains.

(IA)³ scales outputs, bottleneck adapters transform them, prefixes stand before them. Their tensors are the join's, and
B A has rank 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorary.spec.interfaces import Delta, Factors, Init, Shapes, Tensors, component
from lorary.spec.site import Site


@component
class NoUpdate(Delta):
    """B [out, 0], A [0, in]."""

    r = 0
    roles = frozenset()

    def shapes(self, site: Site) -> Shapes:
        return {}

    def factors(self, site: Site, params: Tensors) -> Factors:
        like = next(iter(params.values()))  # the join's
        return like.new_zeros(site.out_features, 0), like.new_zeros(0, site.in_features)


@component
class NoInit(Init):
    """Nothing to fill: the join fills its own tensors."""

    fills = frozenset()

    def __call__(self, params: Tensors, W: Tensor, site: Site, scale: float, generator: torch.Generator) -> None:
        return None
