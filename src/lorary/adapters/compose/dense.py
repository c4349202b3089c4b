"""Truncated SVD of a dense matrix, for updates that are no product of thin factors."""

from __future__ import annotations

import torch
from torch import Tensor

from lorary.adapters.compose.truncate import Truncated, balanced, rank_of_energy
from lorary.spec.resizable import Singular

_EXACT_UP_TO = 768  # rows or columns up to which the whole decomposition takes less than about a second
_OVERSAMPLED, _ITERATIONS = 16, 4


def truncated_matrix(M: Tensor, *, rank: int | None = None, energy: float | None = None) -> Truncated:
    """The best approximation of a matrix by rank, or by the share of its squared Frobenius norm to keep.

    Of a large matrix and a small rank, the directions come from a randomised decomposition with four power iterations
    (Halko et al. 2011), which takes seconds instead of minutes. The error is that of the factors returned.

    Args:
        M: [out, in], in fp32.
        rank: the most directions to keep.
        energy: the share of the squared norm to keep, instead of a rank.
    """
    smaller = min(M.shape)
    if rank is None or smaller <= _EXACT_UP_TO or 4 * (rank + _OVERSAMPLED) > smaller:
        svd = Singular(*torch.linalg.svd(M.double(), full_matrices=False))
        most = rank if rank is not None else rank_of_energy(svd.S, 1.0 if energy is None else energy)
        return balanced(svd, max(min(most, len(svd.S)), 1))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        U, S, V = torch.svd_lowrank(M, q=rank + _OVERSAMPLED, niter=_ITERATIONS)
    B, A, *_ = balanced(Singular(U, S, V.T), rank)
    return Truncated(B, A, _norm(M), _norm(M - B @ A))


def _norm(M: Tensor) -> float:
    return float(torch.linalg.vector_norm(M, dtype=torch.float64))
