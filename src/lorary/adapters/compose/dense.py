"""Truncated SVD of a dense matrix, for updates that are not a product of thin factors.

The right singular vectors V of a tall M are the eigenvectors of M^T M, and M V V^T with the first r of them is the best
approximation of rank r (Eckart and Young 1936). In 64 bits that loses what is below 1e-8 of the largest singular value,
less than the rounding of a weight in 32 bits, and takes a tenth of the time of an SVD.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lorary.adapters.compose.truncate import Truncated, rank_of_energy

_EXACT_UP_TO = 1024  # rows or columns up to which all eigenvectors take about a second
_OVERSAMPLED, _MOST_ITERATIONS = 16, 12
_CONVERGED = 1e-3  # of the squared error: less than that is gained by one more iteration
_BLOCK, _LEAST_ROWS = 2**18, 256  # numbers of a matrix in 64 bits at once, and rows, below which products are slow
_ROUNDING = 1e-8  # of the largest singular value


def truncated_matrix(M: Tensor, *, rank: int | None = None, energy: float | None = None) -> Truncated:
    """The best approximation of a matrix by rank, or by the share of its squared Frobenius norm to keep.

    Of a large matrix and a small rank, the singular vectors come from a randomised subspace iteration (Halko et al.
    2011), which takes seconds instead of minutes. It runs until one more iteration would change the squared error by
    less than a thousandth; if it does not converge, all eigenvectors are computed after all.

    Args:
        M: [out, in], in fp32.
        rank: the most directions to keep.
        energy: the share of the squared norm to keep, instead of a rank.

    Returns:
        The factors, balanced and in fp32, with the error that they have.
    """
    tall = M if M.shape[0] >= M.shape[1] else M.T
    norm = frobenius_norm(tall)
    found = None
    if rank is not None and min(M.shape) > _EXACT_UP_TO and 4 * (rank + _OVERSAMPLED) <= min(M.shape):
        found = _iterated(tall, rank, norm**2)
    S, V = found or _eigenvectors(tall)
    most = rank if rank is not None else rank_of_energy(S, 1.0 if energy is None else energy)
    r = max(min(most, int(S.gt(_ROUNDING * S[0]).sum())), 1)
    root = S[:r].sqrt()
    V = V[:, :r]
    U = torch.cat([rows @ V for rows in _blocks(tall)]) / root.clamp_min(torch.finfo(torch.float64).tiny)  # U sqrt(S)
    left, right = U.float().contiguous(), (root[:, None] * V.T).float().contiguous()
    lost = sum(
        float((rows - near.double() @ right.double()).square().sum())
        for rows, near in zip(_blocks(tall), left.split(_rows_at_once(tall)), strict=True)
    )
    B, A = (left, right) if tall is M else (right.T.contiguous(), left.T.contiguous())
    return Truncated(B, A, norm, lost**0.5, exact=found is None)


def frobenius_norm(M: Tensor) -> float:
    """The Frobenius norm of a tensor of any shape, in 64 bits and not in one piece; NaN or infinite if a value is."""
    flat = M if M.dim() == 2 else M.reshape(1, -1) if M.dim() < 2 else M.flatten(1)
    return math.sqrt(sum(float(rows.square().sum()) for rows in _blocks(flat)))


def _eigenvectors(M: Tensor) -> tuple[Tensor, Tensor]:
    """All singular values of a tall matrix, descending, and its right singular vectors as columns, in 64 bits."""
    gram = torch.zeros(M.shape[1], M.shape[1], dtype=torch.float64)
    for rows in _blocks(M):
        gram.addmm_(rows.T, rows)
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0).clamp_min(0).sqrt(), vectors.flip(1)


def _iterated(M: Tensor, rank: int, squared: float) -> tuple[Tensor, Tensor] | None:
    """The largest singular values of a tall matrix and their right singular vectors; None if not converged.

    Args:
        M: [n, m].
        rank: how many directions have to be right.
        squared: the squared norm of M.
    """
    generator = torch.Generator().manual_seed(0)
    Q = torch.randn(M.shape[1], rank + _OVERSAMPLED, generator=generator)
    before = 0.0
    for _ in range(_MOST_ITERATIONS):
        Q = torch.linalg.qr(M @ Q).Q
        _, S, V = torch.linalg.svd((Q.T @ M).double(), full_matrices=False)
        kept = float(S[:rank].square().sum())
        if kept - before <= _CONVERGED * max(squared - kept, _ROUNDING * squared):
            return S, V.T
        before, Q = kept, V.T.float()
    return None


def _rows_at_once(M: Tensor) -> int:
    return max(_LEAST_ROWS, _BLOCK // max(M.shape[1], 1))


def _blocks(M: Tensor) -> Iterator[Tensor]:
    """The rows of a matrix in 64 bits, some at a time."""
    return (rows.double() for rows in M.split(_rows_at_once(M)))
