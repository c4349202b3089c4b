"""LoKr's update `y + s·drop(x)·(C⊗D)ᵀ`, computed without forming the Kronecker product.

With x as a matrix X [c2, d2] for each row, (C⊗D)·x is C·X·Dᵀ. Each of C and D is a matrix or a product of two; C acts
in the narrow middle of D. Backward keeps `x` itself and the factors, and computes the rest again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lorary.kernels.elementwise import recomputed
from lorary.kernels.low_rank import (
    dropout_and_seed,
    dropped_plainly,
    dropped_rows,
    is_small,
    needs_plain_operations,
    without_autocast,
)

Chain = tuple[Tensor, ...]  # a matrix, or the factors of a product from left to right


def add_kronecker(y: Tensor, x: Tensor, C: Chain, D: Chain, s: float, dropout: float = 0.0) -> Tensor:
    """A layer's output plus `s·drop(x)·(C⊗D)ᵀ`, computed in the output's dtype.

    Args:
        y: [..., c1 d1] the frozen layer's output.
        x: [..., c2 d2] the layer's input.
        C: [c1, c2], or (Cb [c1, r], Ca [r, c2]).
        D: [d1, d2], or (Db [d1, r], Da [r, d2]).
        s: scale of the product.
        dropout: probability in [0, 1) of dropping an element of `x`, as in `add_low_rank`.

    Returns:
        [..., c1 d1] the sum, in `y`'s dtype.
    """
    dtype, parts = y.dtype, len(C)
    with without_autocast(y.device):
        if needs_plain_operations():
            rows = dropped_plainly(x, dtype, dropout).reshape(-1, x.shape[-1])
            return y + s * kronecker_product(rows, C, D).view(y.shape)
        dropout, seed = dropout_and_seed(dropout)

        def product(x: Tensor, *factors: Tensor) -> Tensor:
            return kronecker_product(dropped_rows(x, dtype, dropout, seed), factors[:parts], factors[parts:])

        update = product(x, *C, *D) if is_small(y) else recomputed(product, x, *C, *D)
        return torch.add(y, update.view(y.shape), alpha=s / (1.0 - dropout))


def kronecker_product(rows: Tensor, C: Chain, D: Chain) -> Tensor:
    """[T, c1 d1] the rows [T, c2 d2] times (C⊗D)ᵀ, in their dtype."""
    C, D = (tuple(factor.to(rows.dtype) for factor in chain) for chain in (C, D))
    (c1, c2), (d1, d2) = ((chain[0].shape[0], chain[-1].shape[1]) for chain in (C, D))
    first, last = D[1:], D[:1]
    if not first and c1 * d2 * (c2 + d1) > c2 * d1 * (d2 + c1):  # D is whole, and narrows more than C
        first, last = last, first
    X = _times(rows.view(-1, c2, d2), first).mT  # [T, d2 or the middle of D, c2]
    X = _times(X, C[::-1]).mT
    return _times(X, last).reshape(len(rows), c1 * d1)


def _times(X: Tensor, factors: Chain) -> Tensor:
    """X times the transposed factors, one after the other."""
    rows = X.reshape(-1, X.shape[-1])  # for three dimensions the product taken depends on what needs a gradient
    for factor in factors:
        rows = F.linear(rows, factor)
    return rows.view(*X.shape[:-1], rows.shape[-1])
