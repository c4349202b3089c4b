"""Resizable: the interface of a delta whose rank can change after training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from lorary.spec.interfaces import Factors, Tensors
from lorary.spec.site import Site


class Singular(NamedTuple):
    """A truncated singular value decomposition, U diag(S) V: U [out, r], S [r], V [r, in]."""

    U: Tensor
    S: Tensor
    V: Tensor


@runtime_checkable
class Resizable(Protocol):
    """A delta that keeps its form at another rank."""

    def rank_dims(self, site: Site) -> Mapping[str, tuple[int, int]]:
        """role -> (dim, n): the dimension of its tensor that counts the rank, n times over, the rank fastest."""
        ...

    def products(self, site: Site, params: Tensors) -> list[Factors]:
        """The products of which its update consists, each of rank r; empty if it is no such sum."""
        return []

    def from_products(self, site: Site, products: Sequence[Singular]) -> dict[str, Tensor]:
        """role -> tensor: the inverse of `products`, for a delta that has some."""
        return {}


class PairsOfFactors(Resizable):
    """B [out, r] and A [r, in], or several such pairs side by side: one for each part, and for each of its blocks."""

    blocks = 1

    def rank_dims(self, site: Site) -> Mapping[str, tuple[int, int]]:
        return {"A": (0, len(site.rows) * self.blocks), "B": (1, 1)}

    def products(self, site: Site, params: Tensors) -> list[Factors]:
        rows = [size // self.blocks for size in site.rows for _ in range(self.blocks)]
        return list(zip(params["B"].split(rows), params["A"].chunk(len(rows)), strict=True))

    def from_products(self, site: Site, products: Sequence[Singular]) -> dict[str, Tensor]:
        return {
            "B": torch.cat([U * S.sqrt() for U, S, _ in products]),
            "A": torch.cat([S.sqrt()[:, None] * V for _, S, V in products]),
        }
