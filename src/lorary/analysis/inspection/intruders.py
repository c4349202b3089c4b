"""Intruder dimensions: large singular vectors of a tuned weight that the base's weight does not have.

A singular vector of W' among its k largest is an intruder if its cosine with every singular vector of W is below
epsilon (Shuttleworth et al. 2024, arXiv:2410.21228; the authors' k = 10 and epsilon = 0.5). The paper counts left
singular vectors, in the output space. Where W has more rows than columns those do not span their space, and a small
new direction counts as well: the right singular vectors, in the input space, are therefore counted beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

TOP, EPSILON = 10, 0.5


class Basis(NamedTuple):
    """The reduced singular value decomposition of a weight, in 32 bits.

    Args:
        U: [out, k], the left singular vectors as columns.
        S: [k], descending.
        V: [k, in], the right singular vectors as rows.
    """

    U: Tensor
    S: Tensor
    V: Tensor

    @staticmethod
    def of(W: Tensor) -> Basis:
        """The decomposition of W [out, in], on the GPU if there is one."""
        device = "cuda" if torch.cuda.is_available() else W.device
        return Basis(*(t.cpu() for t in torch.linalg.svd(W.float().to(device), full_matrices=False)))


@dataclass(frozen=True)
class Intruders:
    """The cosines of the tuned weight's largest singular vectors with the nearest ones of the base.

    Args:
        left: of the left singular vectors, in the order of their singular values.
        right: of the right ones.
        epsilon: a vector with a cosine below it is an intruder.
    """

    left: tuple[float, ...]
    right: tuple[float, ...]
    epsilon: float = EPSILON

    @property
    def count(self) -> int:
        """The number of intruders among the left singular vectors: the paper's figure."""
        return sum(cosine < self.epsilon for cosine in self.left)

    @property
    def count_right(self) -> int:
        """The number of intruders among the right singular vectors."""
        return sum(cosine < self.epsilon for cosine in self.right)


def intruders(base: Basis, tuned: Basis, top: int = TOP, epsilon: float = EPSILON) -> Intruders:
    """The intruders among the `top` largest singular vectors of a tuned weight.

    Args:
        base: of W [out, in]; all of its vectors are compared.
        tuned: of W' [out, in]. Vectors of singular values that are zero are arbitrary, and not counted.
        top: the paper's k.
        epsilon: a vector is an intruder if its cosine with every vector of the base is below it.
    """
    rounding = max(tuned.U.shape[0], tuned.V.shape[1]) * torch.finfo(torch.float32).eps
    k = min(top, int(tuned.S.gt(rounding * tuned.S[:1]).sum()))
    known = base.S.gt(rounding * base.S[:1])  # a zero weight has no directions of its own
    left = (tuned.U[:, :k].T @ base.U[:, known]).abs()
    right = (tuned.V[:k] @ base.V[known].T).abs()
    return Intruders(tuple(_largest(left)), tuple(_largest(right)), epsilon)


def _largest(cosines: Tensor) -> list[float]:
    """The largest of each row; 0 without any."""
    found: list[float] = (cosines.amax(1) if cosines.shape[1] else cosines.new_zeros(len(cosines))).tolist()
    return found
