"""Ways to merge several updates of one matrix: in their span, or element by element.

    sum         Σ wᵢ ΔWᵢ                                                   task arithmetic: Ilharco et al. 2022
    slerp       (sin((1-t)θ) ΔW₁ + sin(tθ) ΔW₂) / sin θ                    Shoemake 1985; θ is the angle between them
    magnitude   Σ wᵢ trim(ΔWᵢ)                                             only the largest elements of each
    dare        Σ wᵢ drop(ΔWᵢ) / density                                   Yu et al. 2023, arXiv:2311.03099
    ties        mean of the wᵢ trim(ΔWᵢ) that have the elected sign        Yadav et al. 2023, arXiv:2306.01708
    dare-ties   the same after drop instead of trim

The first two are weighted sums, so that they are exact in factors. The others change single elements: they are applied
to the dense update, as their papers do, not to the factors (PEFT's `ties` and `dare_linear` prune the factors B and A,
which is another function; its `ties_svd` and the like prune the update).

Differs from the papers: weights. As in PEFT, they multiply after the signs are elected. A negative weight subtracts the
update, so its elements vote with the opposite sign.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_PARALLEL = 0.9995  # cosine from which the arc between two updates is a line, and sin θ too small to divide by


class Merging(Protocol):
    """A way to merge updates of one shape."""

    def dense(self, updates: Sequence[Tensor], weights: Sequence[float], density: float, seed: str) -> Tensor:
        """The merged update.

        Args:
            updates: in fp32.
            weights: one for each.
            density: the share of elements to keep, where some are dropped.
            seed: of the random choice.
        """
        ...


@dataclass(frozen=True)
class InSpan(Merging):
    """A weighted sum of the updates.

    Args:
        coefficients: (weights, a function of the updates' Gram matrix [n, n]) -> one factor for each update.
    """

    coefficients: Callable[[Sequence[float], Callable[[], Tensor]], Sequence[float]]

    def dense(self, updates: Sequence[Tensor], weights: Sequence[float], density: float, seed: str) -> Tensor:
        return weighted_sum(torch.stack(list(updates)), self.coefficients(weights, lambda: dense_gram(updates)))


@dataclass(frozen=True)
class ByElement(Merging):
    """A merge of single elements: some of each update are dropped, and what remains is combined.

    Args:
        sparsify: (update, density, generator) -> the update with fewer elements.
        combine: (updates [n, ...], weights) -> the merged update.
    """

    sparsify: Callable[[Tensor, float, torch.Generator], Tensor]
    combine: Callable[[Tensor, Sequence[float]], Tensor]

    def dense(self, updates: Sequence[Tensor], weights: Sequence[float], density: float, seed: str) -> Tensor:
        generator = generator_of(seed)
        return self.combine(torch.stack([self.sparsify(update, density, generator) for update in updates]), weights)


def generator_of(seed: str) -> torch.Generator:
    """The source of the random choices of a seed."""
    digest = hashlib.sha256(seed.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def dense_gram(updates: Sequence[Tensor]) -> Tensor:
    """[n, n] inner products of dense updates, in 64 bits."""
    flat = torch.stack([update.flatten() for update in updates]).double()
    return flat @ flat.T


def factored_gram(factors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """[n, n] inner products of the updates B A, from B [out, R] and A [R, in], in 64 bits."""
    exact = [(B.double(), A.double()) for B, A in factors]
    rows = [torch.stack([((B.T @ B2) * (A @ A2.T)).sum() for B2, A2 in exact]) for B, A in exact]
    return torch.stack(rows)


def _as_given(weights: Sequence[float], gram: Callable[[], Tensor]) -> Sequence[float]:
    return weights


def _on_the_arc(weights: Sequence[float], gram: Callable[[], Tensor]) -> Sequence[float]:
    """The coefficients of slerp at t, the second weight; a line where an update is zero or the two are parallel."""
    if len(weights) < 2:
        return weights
    G, t = gram(), weights[1]
    norms = math.sqrt(float(G[0, 0] * G[1, 1]))
    cosine = float(G[0, 1]) / norms if norms else 1.0
    if abs(cosine) > _PARALLEL:
        return weights
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def trim(update: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """The update with its largest elements alone, a share `density` of all; equally large ones stay together."""
    kept, sizes = int(density * update.numel()), update.abs()
    if not kept:
        return torch.zeros_like(update)
    return update * (sizes >= sizes.flatten().kthvalue(update.numel() - kept + 1).values)


def drop(update: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """The update with each element kept with probability `density`, and divided by it: the same in expectation."""
    return update * torch.bernoulli(torch.full_like(update, density), generator=generator) / density


def weighted_sum(updates: Tensor, weights: Sequence[float]) -> Tensor:
    """The sum of w times update, of updates [n, ...]."""
    return (updates * _along(weights, updates)).sum(0)


def disjoint_mean(updates: Tensor, weights: Sequence[float]) -> Tensor:
    """At each element the mean of the weighted updates whose sign is that of the sum of all; 0 if there are none."""
    w = _along(weights, updates)
    votes = updates * w.sign()
    elected = torch.where(votes.sum(0) >= 0, 1.0, -1.0)
    agree = votes.sign() == elected
    return (votes * w.abs() * agree).sum(0) / agree.sum(0).clamp_min(1)


def _along(weights: Sequence[float], updates: Tensor) -> Tensor:
    """The weights as [n, 1, ...], to multiply updates [n, ...]."""
    return torch.tensor(weights, dtype=updates.dtype).view(-1, *[1] * (updates.dim() - 1))


MERGINGS: dict[str, Merging] = {
    "sum": InSpan(_as_given),
    "slerp": InSpan(_on_the_arc),
    "magnitude": ByElement(trim, weighted_sum),
    "dare": ByElement(drop, weighted_sum),
    "ties": ByElement(trim, disjoint_mean),
    "dare-ties": ByElement(drop, disjoint_mean),
}
