"""Compression of an adapter: its update at fewer directions, chosen by singular value over all sites together.

A direction of singular value S adds S^2 to the squared norm of the whole update, wherever it is. So the largest values
of all sites together are the best choice for their number, and the ranks differ by site.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lorary.adapters.adapter import Adapter
from lorary.adapters.compose.plain_lora import plain_lora
from lorary.adapters.compose.truncate import (
    balanced,
    numerical_rank,
    product_norm,
    product_svd,
    rank_of_energy,
    relative,
)
from lorary.adapters.content_hash import content_hash
from lorary.adapters.low_rank_form import factors_on_base, form_without_base
from lorary.adapters.provenance import Parent, Provenance
from lorary.adapters.tensor_checks import adapter_problems
from lorary.errors import Diagnostic, MethodError, deduplicated
from lorary.kernels.torch_internals import storage_id
from lorary.model.plan import human_bytes
from lorary.spec.interfaces import Factors
from lorary.spec.join import not_mergeable
from lorary.spec.placement import unique_tensor_sets
from lorary.spec.resizable import Resizable, Singular

HEADLINE = "cannot compress this adapter:"


class Size(NamedTuple):
    """The size of an adapter.

    Args:
        ranks: the smallest and the largest rank of a site.
        parameters: numbers in its tensors, those of tied sites once.
        bytes: of all its tensors, those of parameters trained in full included.
    """

    ranks: tuple[int, int]
    parameters: int
    bytes: int

    @staticmethod
    def of(adapter: Adapter) -> Size:
        """The size of an adapter of any method."""
        ranks = [s.r for s in adapter.sites] or [0]
        every = (t for roles in adapter.tensors.values() for t in roles.values())
        numbers = {storage_id(t): t.untyped_storage().nbytes() // t.element_size() for t in every}
        return Size((min(ranks), max(ranks)), sum(numbers.values()), adapter.size)

    def __str__(self) -> str:
        low, high = self.ranks
        rank = f"rank {low}" if low == high else f"ranks {low} to {high}"
        return f"{rank}, {self.parameters:,} parameters, {human_bytes(self.bytes)}"


@dataclass(frozen=True)
class Divergence:
    """KL(adapted || compressed) in nats per token, on the rows of the search and on others.

    Args:
        bound: the requested bound.
        search: on the rows by which the ranks were chosen: at most the bound.
        check: on the other rows, which the search has not seen.
        tokens: the number of tokens of the search and of the check.
    """

    bound: float
    search: float
    check: float
    tokens: tuple[int, int]

    def __str__(self) -> str:
        return (
            f"KL(adapted || compressed) {self.search:.3g} nats per token on {self.tokens[0]:,} tokens of the search, "
            f"{self.check:.3g} on {self.tokens[1]:,} others; bound {self.bound:g}"
        )


@dataclass(frozen=True)
class Compression:
    """A compressed adapter, and what it lost.

    Args:
        adapter: a plain LoRA on the unmodified base, with its own rank at each site.
        before: the size of the adapter it was made from.
        errors: site -> the relative error of its update in the Frobenius norm; 1 for a site that was left out.
        error: the same of all sites together.
        divergence: the KL divergence, if that was bounded.
    """

    adapter: Adapter
    before: Size
    errors: Mapping[str, float] = field(repr=False)
    error: float
    divergence: Divergence | None = None

    @property
    def after(self) -> Size:
        """The size of the compressed adapter."""
        return Size.of(self.adapter)

    @property
    def ranks(self) -> dict[str, int]:
        """site -> its rank; 0 for a site that was left out."""
        kept = {s.site.name: s.r for s in self.adapter.sites}
        return {name: kept.get(name, 0) for name in self.errors}

    def to_dict(self) -> dict[str, Any]:
        """The result in JSON types."""
        sizes = {"before": self.before._asdict(), "after": self.after._asdict()}
        measured = {"divergence": dataclasses.asdict(self.divergence)} if self.divergence else {}
        return sizes | {"error": self.error, "ranks": self.ranks, "errors": dict(self.errors)} | measured

    def __str__(self) -> str:
        worst = max(self.errors, key=lambda name: self.errors[name])
        left_out = sum(not r for r in self.ranks.values())
        lines = [f"before  {self.before}", f"after   {self.after}"]
        if left_out:
            lines.append(f"{left_out:,} of {len(self.errors):,} sites left out: their directions are all too small")
        off = f"the update is off by {self.error:.2%} in the Frobenius norm"
        lines.append(f"{off}, most at {worst} ({self.errors[worst]:.2%})" if self.errors[worst] else off)
        return "\n".join([*lines, *([str(self.divergence)] if self.divergence else [])])


@dataclass(frozen=True)
class Spectra:
    """The singular value decompositions of an adapter's updates, which every truncation shares.

    Args:
        adapter: whose they are.
        svds: site -> the decomposition of each of its matrices, one for every expert, without directions that are only
            rounding.
    """

    adapter: Adapter
    svds: Mapping[str, tuple[Singular, ...]]

    @staticmethod
    def of(adapter: Adapter) -> Spectra:
        """The decompositions of an adapter.

        Raises:
            MethodError: its update is not a product of two factors alone, or not finite; every reason.
        """
        if problems := _incompressible(adapter):
            raise MethodError(HEADLINE, deduplicated(problems))
        svds: dict[str, tuple[Singular, ...]] = {}
        shared: dict[str, tuple[Singular, ...]] = {}  # tied sites have one set of tensors
        for s in adapter.sites:
            each = s.matrices(adapter.tensors[s.site.name])
            found = shared.get(s.share) or tuple(_significant(product_svd(*factors_on_base(*one))) for one in each)
            svds[s.site.name] = found
            if s.share:
                shared[s.share] = found
        if not any(len(svd.S) for found in svds.values() for svd in found):
            raise MethodError(HEADLINE, [Diagnostic("adapter", "its update is zero everywhere")])
        return Spectra(adapter, svds)

    @property
    def values(self) -> Tensor:
        """All singular values, the largest first; those of tied sites once."""
        sites = [s.site.name for s in unique_tensor_sets(self.adapter.sites)]
        return torch.cat([svd.S for name in sites for svd in self.svds[name]]).sort(descending=True).values

    def ranks_of_count(self, count: int) -> dict[str, int]:
        """site -> its rank if the `count` largest singular values of all sites together are kept; equal ones all.

        The experts of a block have one rank, the largest that one of them needs.
        """
        values = self.values
        least = values[min(count, len(values)) - 1]
        return {name: max(int((least <= svd.S).sum()) for svd in svds) for name, svds in self.svds.items()}

    def ranks_of_rank(self, rank: int) -> dict[str, int]:
        """site -> its rank if none has more than `rank`."""
        return {name: min(rank, max(len(svd.S) for svd in svds)) for name, svds in self.svds.items()}

    def ranks_of_energy(self, energy: float) -> dict[str, int]:
        """site -> its rank in the smallest adapter that keeps this share of the squared norm of the whole update."""
        return self.ranks_of_count(max(rank_of_energy(self.values, energy), 1))

    def cut(self, ranks: Mapping[str, int], settings: Mapping[str, Any]) -> Compression:
        """The adapter with these ranks, in the dtype of the original; sites of rank 0 are left out.

        Args:
            ranks: site -> rank, at least one of them above 0.
            settings: for the provenance.
        """
        factors: dict[str, Factors] = {}
        parts: dict[str, list[tuple[float, float]]] = {}
        for s in self.adapter.sites:
            name = s.site.name
            dtype = functools.reduce(torch.promote_types, (t.dtype for t in self.adapter.tensors[name].values()))
            cuts = [_cut(svd, ranks[name], dtype) for svd in self.svds[name]]
            parts[name] = [part for _, part in cuts]
            if ranks[name]:
                Bs, As = zip(*(pair for pair, _ in cuts), strict=True)
                factors[name] = (torch.stack(Bs), torch.stack(As)) if s.site.adapters else (Bs[0], As[0])
        source, error = self.adapter, relative([part for each in parts.values() for part in each])
        method, sites, tensors = plain_lora(
            source.sites,
            factors,
            storage=source.method.storage,
            context=source.method.context,
            full=source.method.full,
        )
        record = Provenance("compress", (Parent(sha256=content_hash(source)),), dict(settings) | {"error": error})
        adapter = dataclasses.replace(source, method=method, sites=sites, tensors=tensors, notes=(), provenance=record)
        errors = {name: relative(each) for name, each in parts.items()}
        return Compression(adapter, Size.of(source), errors, error)


def _incompressible(adapter: Adapter) -> list[Diagnostic]:
    """Why an adapter has no truncation to a plain LoRA of the unmodified base."""
    if not adapter.sites:
        return [Diagnostic("adapter", "adapts no layers, so it has no rank")]
    if problems := adapter_problems(adapter):
        return problems
    for s in adapter.sites:
        name = s.site.name
        if s.starts and not s.method.storage.writable:
            what = f"{type(s.method.storage).__name__} has quantised the base without the start of {s.init}"
            problems.append(Diagnostic(name, what, "lorary.merge it, and lorary.extract an adapter of the result"))
        form = form_without_base(s, adapter.tensors[name])
        if form is None or not form.is_plain:
            what = f"{s.join} gives the layer a gain or a shift of its own, so its update is not a product of factors"
            fix = "lorary.change_rank keeps the method" if isinstance(s.delta, Resizable) else ""
            problems += not_mergeable([(name, s.join)]) or [Diagnostic(name, what, fix)]
    return problems


def _significant(svd: Singular) -> Singular:
    """A decomposition without the directions that are only rounding."""
    r = numerical_rank(svd)
    return Singular(svd.U[:, :r], svd.S[:r], svd.V[:r])


def _cut(svd: Singular, r: int, dtype: torch.dtype) -> tuple[Factors, tuple[float, float]]:
    """((B [out, r], A [r, in]), (the norm of the error, that of the whole)) of one matrix, zero beyond its own rank."""
    cut, missing = balanced(svd, r), max(0, r - len(svd.S))
    B, A = F.pad(cut.B, (0, missing)).to(dtype), F.pad(cut.A, (0, 0, 0, missing)).to(dtype)
    # the rounding of short numbers is a part of the error
    return (B, A), (_distance(svd, B, A) if dtype.itemsize < 4 and r else cut.lost, cut.norm)


def _distance(svd: Singular, B: Tensor, A: Tensor) -> float:
    """||U S V - B A|| in the Frobenius norm."""
    return product_norm(torch.cat([svd.U * svd.S, -B.double()], 1), torch.cat([svd.V, A.double()]))
