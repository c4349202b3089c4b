"""Truncated SVD of a product B A, computed from its factors: QR of B and of A^T, then the SVD of the R x R core.

The best approximation of rank r keeps the r largest singular values (Eckart and Young 1936); its Frobenius error is the
root of the sum of the squares of the others. The dense [out, in] product is never formed, and all of it is in 64 bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorary.errors import Diagnostic
from lorary.spec.resizable import Singular

MOST_RANK = 65_536


class Truncated(NamedTuple):
    """The best approximation of a product, and its error.

    Args:
        B: [out, r], U sqrt(S).
        A: [r, in], sqrt(S) V: balanced factors.
        norm: the Frobenius norm of the whole product.
        lost: the Frobenius norm of the omitted part.
        exact: whether no other factors of that rank are nearer; False after an iteration, which comes close.
    """

    B: Tensor
    A: Tensor
    norm: float
    lost: float
    exact: bool = True

    @property
    def error(self) -> float:
        """The relative error in the Frobenius norm; 0 for a product that is zero."""
        return self.lost / self.norm if self.norm else 0.0


def product_svd(B: Tensor, A: Tensor) -> Singular:
    """The singular value decomposition of B A, in 64 bits: U [out, k], S [k], V [k, in] with k = min(out, R, in)."""
    Q, R = torch.linalg.qr(B.double())
    P, T = torch.linalg.qr(A.double().T)
    U, S, V = torch.linalg.svd(R @ T.T, full_matrices=False)
    return Singular(Q @ U, S, V @ P.T)


def product_norm(B: Tensor, A: Tensor) -> float:
    """||B A|| in the Frobenius norm, in 64 bits."""
    R = torch.linalg.qr(B.double(), mode="r").R
    T = torch.linalg.qr(A.double().T, mode="r").R
    return float((R @ T.T).norm())


def truncated_product(B: Tensor, A: Tensor, *, rank: int | None = None, energy: float | None = None) -> Truncated:
    """The best approximation of B A by rank, or by the share of its squared Frobenius norm to keep.

    Args:
        B: [out, R].
        A: [R, in].
        rank: the most directions to keep; fewer if the product has fewer.
        energy: the share of the squared norm to keep, instead of a rank; 1 keeps every direction that is not rounding.

    Returns:
        The factors in fp32, with at least one direction, and the error.
    """
    svd = product_svd(B, A)
    most = rank if rank is not None else rank_of_energy(svd.S, 1.0 if energy is None else energy)
    return balanced(svd, max(min(most, numerical_rank(svd)), 1))


def balanced(svd: Singular, r: int) -> Truncated:
    """The first r directions as factors of equal norms, in fp32, and the error of leaving out the others."""
    root = svd.S[:r].sqrt()
    B, A = svd.U[:, :r] * root, root[:, None] * svd.V[:r]
    return Truncated(B.float().contiguous(), A.float().contiguous(), float(svd.S.norm()), float(svd.S[r:].norm()))


def stacked_experts(each: Sequence[Truncated | None]) -> Truncated | None:
    """The factors of the experts of a block, with a leading E and zeros up to the largest rank; None is an update of 0.

    Returns:
        None if all of them are.
    """
    known = [one for one in each if one is not None]
    if not known:
        return None
    r, out, inp = max(one.A.shape[0] for one in known), known[0].B.shape[0], known[0].A.shape[1]
    B, A = known[0].B.new_zeros(len(each), out, r), known[0].A.new_zeros(len(each), r, inp)
    for e, one in enumerate(each):
        if one is not None:
            B[e, :, : one.B.shape[1]], A[e, : one.A.shape[0]] = one.B, one.A
    norms = [product_norm(one.B, one.A) if math.isnan(one.norm) else one.norm for one in known]
    lost = math.hypot(*(one.lost for one in known))
    return Truncated(B, A, math.hypot(*norms), lost, all(one.exact for one in known))


def rank_of_energy(S: Tensor, energy: float) -> int:
    """The smallest number of singular values whose squares sum up to this share of all; 0 if all are zero."""
    squares = S.double().square()
    tails = squares.flip(0).cumsum(0).flip(0)  # [k]: what is lost if this one and all after it are left out
    lost = 1 - energy + 4 * torch.finfo(torch.float64).eps  # 1 - 0.8 is below 0.2
    return int((tails > lost * float(squares.sum())).sum())


def numerical_rank(svd: Singular) -> int:
    """The number of singular values above the rounding of the largest one."""
    if not len(svd.S):
        return 0
    rounding = max(svd.U.shape[0], svd.V.shape[1]) * torch.finfo(torch.float64).eps
    return int(svd.S.gt(rounding * svd.S[0]).sum())


def relative(pairs: list[tuple[float, float]]) -> float:
    """The relative Frobenius error of several matrices together, from the (lost, norm) of each."""
    return math.hypot(*(lost for lost, _ in pairs)) / (math.hypot(*(norm for _, norm in pairs)) or 1.0)


def cut_problems(**cuts: float | None) -> list[Diagnostic]:
    """The problems of the options of a truncation: exactly one of `rank`, `energy` and others is given.

    Args:
        cuts: name -> value. `rank` is a whole number, `energy` a share in (0, 1], every other one a number above 0.
    """
    given = {name: value for name, value in cuts.items() if value is not None}
    names = ", ".join(list(cuts)[:-1]) + f" or {list(cuts)[-1]}"
    if len(given) != 1:
        what = f"one of them says how much to keep; given: {', '.join(given) or 'none'}"
        return [Diagnostic(names, what, "give exactly one of them")]
    [(name, value)] = given.items()
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if name == "rank":
        fits, what = type(value) is int and 1 <= value <= MOST_RANK, f"a whole number from 1 to {MOST_RANK:,}"
    elif name == "energy":
        fits, what = number and 0 < value <= 1, "a share above 0 and at most 1, such as 0.99"
    else:
        fits, what = number and 0 < value < math.inf, "a finite number above 0"
    return [] if fits else [Diagnostic(name, f"is {value!r}, not {what}")]
