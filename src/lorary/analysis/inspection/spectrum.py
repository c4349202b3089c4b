"""The singular values of an update, and the figures that are computed from them alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

SHARES = (0.5, 0.9, 0.99)  # of the energy, for which the smallest ranks are reported
_MOST_VALUES = 256  # of one site in a JSON record


@dataclass(frozen=True)
class Spectrum:
    """The singular values of a matrix, the largest first.

    Args:
        values: all of them that can differ from zero: at most R of a product B A.

    >>> Spectrum((2.0, 1.0)).stable_rank
    1.25
    """

    values: tuple[float, ...] = field(repr=False)

    @staticmethod
    def of(S: Tensor) -> Spectrum:
        """The spectrum of singular values [k] in descending order."""
        return Spectrum(tuple(S.double().tolist()))

    @cached_property
    def _tails(self) -> list[float]:
        """[k + 1]: the sum of the squares from each index on; summed from the smallest, so that none is lost."""
        tails = [0.0]
        for value in reversed(self.values):
            tails.append(tails[-1] + value**2)
        return tails[::-1]

    @property
    def norm(self) -> float:
        """The Frobenius norm."""
        return math.sqrt(self._tails[0])

    @property
    def stable_rank(self) -> float:
        """The squared Frobenius norm over the squared spectral norm: 1 if one direction dominates; 0 for a zero matrix.

        It counts the directions by their squares, and is never above the rank.
        """
        return self._tails[0] / self.values[0] ** 2 if self.norm else 0.0

    @property
    def entropy_rank(self) -> float:
        """exp of the entropy of the singular values, divided by their sum (Roy & Vetterli 2007); 0 for a zero matrix.

        It counts small directions more than `stable_rank` does: k equal ones give k in both.
        """
        total = math.fsum(self.values)
        shares = [value / total for value in self.values if value > 0] if total else []
        return math.exp(-math.fsum(p * math.log(p) for p in shares)) if shares else 0.0

    def energy(self, k: int) -> float:
        """The share of the squared Frobenius norm in the k largest singular values; 1 for a zero matrix."""
        return 1.0 - self.tail(k) ** 2 / self._tails[0] if self.norm else 1.0

    def tail(self, k: int) -> float:
        """The least Frobenius error of any matrix of rank k (Eckart and Young 1936): the norm of the other values."""
        return math.sqrt(self._tails[min(k, len(self.values))])

    def rank_for(self, share: float) -> int:
        """The smallest rank that keeps this share of the energy."""
        lost = (1 - share) * self._tails[0] * (1 + 1e-12)  # 1 - 0.9 is below 0.1
        return next(k for k, tail in enumerate(self._tails) if tail <= lost)

    def to_dict(self) -> dict[str, Any]:
        """The figures in JSON types, and the largest singular values."""
        return {
            "norm": self.norm,
            "stable_rank": self.stable_rank,
            "entropy_rank": self.entropy_rank,
            "rank_for_energy": {f"{share:g}": self.rank_for(share) for share in SHARES},
            "singular_values": list(self.values[:_MOST_VALUES]),
        }
