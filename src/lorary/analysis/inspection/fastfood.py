"""Fastfood: a random projection from d to D dimensions in O(D log d), whose matrix is never formed or stored.

    P = sqrt(b/d) · [ H G Π H B ]      b: the next power of two from d on; blocks of b rows, stacked to D rows

H is the orthonormal Walsh-Hadamard matrix, B random signs, Π a permutation, G Gaussian (Le, Sarlos & Smola 2013;
Aghajanyan et al. 2020, arXiv:2012.13255, use it for intrinsic dimensions). Signs and Gaussians are drawn from the seed
whenever they are needed. Rows have a norm of 1 on average, so that a learning rate means about the same for every d:
Adam moves each of the D numbers by about as much as it moves each of the d.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 2**22  # numbers that are projected at once
_FACTOR = 128  # H is applied as a product of matrices of at most this size


class Projection(Protocol):
    """A linear map from [d] to [D], and its transpose."""

    def __call__(self, x: Tensor) -> Tensor:
        """P x [D] of x [d]."""
        ...

    def transpose(self, g: Tensor) -> Tensor:
        """P^T g [d] of g [D]."""
        ...


class Fastfood:
    """The projection P [D, d], determined by its sizes and the seed.

    Args:
        d: the dimension of the subspace.
        size: D.
        seed: of the draw.
    """

    def __init__(self, d: int, size: int, seed: int = 0) -> None:
        self.d, self.size, self.seed = d, size, seed
        self.block = 1 << (d - 1).bit_length()
        self.scale = math.sqrt(self.block / d)
        self.permutation = torch.randperm(self.block, generator=torch.Generator().manual_seed(seed))
        self.inverse = self.permutation.argsort()

    def __call__(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (0, self.block - self.d))
        out = x.new_empty(self.size)
        for rows, signs, gauss in self._blocks(x):
            mixed = walsh_hadamard(signs * padded)[:, self.permutation.to(x.device)] * gauss
            part = out[rows]
            part.copy_(walsh_hadamard(mixed).flatten()[: len(part)])
        return out.mul_(self.scale)

    def transpose(self, g: Tensor) -> Tensor:
        total = g.new_zeros(self.block)
        for rows, signs, gauss in self._blocks(g):
            part = F.pad(g[rows], (0, signs.numel() - len(g[rows]))).view_as(signs)
            mixed = (walsh_hadamard(part) * gauss)[:, self.inverse.to(g.device)]
            total += (walsh_hadamard(mixed) * signs).sum(0)
        return total[: self.d] * self.scale

    def _blocks(self, like: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(rows of P, signs [n, b], Gaussians [n, b]) of a few blocks at a time."""
        count = -(-self.size // self.block)
        each = max(_CHUNK // self.block, 1)
        for first in range(0, count, each):
            n = min(each, count - first)
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + first + 1)
            gauss = torch.randn(n, self.block, generator=generator)
            signs = torch.randint(0, 2, (n, self.block), generator=generator, dtype=torch.int8) * 2 - 1
            rows = slice(first * self.block, min((first + n) * self.block, self.size))
            yield rows, signs.to(like), gauss.to(like)


def walsh_hadamard(x: Tensor) -> Tensor:
    """H x of every row of x [n, b], with the orthonormal symmetric H of a power of two b.

    H of size a·c is the Kronecker product of those of a and c: a few small matrix products in place of log2(b) passes.
    """
    n, size = x.shape
    done = 1  # the part of the last dimensions to which H has been applied
    while done < size:
        m = min(size // done, _FACTOR)
        H = _hadamard(m).to(x)
        x = x.reshape(-1, m) @ H if done == 1 else H @ x.reshape(-1, m, done)
        done *= m
    return x.reshape(n, size)


@cache
def _hadamard(m: int) -> Tensor:
    """The orthonormal Walsh-Hadamard matrix [m, m] of a power of two."""
    H = torch.ones(1, 1)
    while len(H) < m:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)]) / math.sqrt(2)
    return H
