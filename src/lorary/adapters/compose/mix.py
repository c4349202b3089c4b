"""mix: one adapter from several, by a weighted sum of their updates or another merging method.

A weighted sum of updates is exact in factors, whatever the methods and ranks: it is [w₁ B₁, w₂ B₂, ...] [A₁; A₂; ...].
Everything else is approximated by a truncated SVD, one layer at a time, and its error is reported.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorary.adapters.adapter import Adapter
from lorary.adapters.compose import _arguments
from lorary.adapters.compose.dense import truncated_matrix
from lorary.adapters.compose.merging import MERGINGS, ByElement, InSpan, drop, factored_gram
from lorary.adapters.compose.plain_lora import plain_lora
from lorary.adapters.compose.truncate import Truncated, product_norm, relative, stacked_experts, truncated_product
from lorary.adapters.compose.updates import Change, Term, Update, full_changes, updates_by_site
from lorary.adapters.content_hash import content_hash
from lorary.adapters.provenance import Parent, Provenance
from lorary.errors import Diagnostic, MethodError, deduplicated, not_a
from lorary.model.ambient import mode_independent
from lorary.model.checks import changeable
from lorary.model.fingerprint import Fingerprint, base_name, frozen_weights
from lorary.model.state import state_of, value_before
from lorary.model.vocabulary import added_tokens
from lorary.spec.interfaces import Unquantized
from lorary.spec.per_expert import expert_name
from lorary.spec.placement import AdaptedSite

DENSITY = 0.2  # of the TIES paper

Progress = Callable[[int, int], object]  # layers done, and all


@mode_independent
def mix(
    adapters: Sequence[Adapter] | Mapping[str, Adapter],
    weights: Sequence[float] | None = None,
    *,
    how: str = "sum",
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    base: nn.Module | None = None,
    approximate: bool = False,
    seed: int = 0,
    force: bool = False,
    progress: Progress | None = None,
) -> Adapter:
    """One adapter from several: the weighted sum of their updates, or another merge of them.

    A sum is exact, of any methods and ranks, with negative weights too; its rank at a layer is the sum of the ranks
    there. An adapter of weight 0 takes no part, and if one has weight 1 and all others 0, it comes back bit for bit.
    `slerp` is exact as well. The other ways change single elements of the updates, and the closest update of low rank
    is returned: of the rank that a sum would have, unless you say another one. They need the memory of one layer's
    dense updates.

    Args:
        adapters: in any order, or by names for errors and the provenance.
        weights: one for each; all 1 by default, and for slerp 0.5 and 0.5.
        how: `sum`; `slerp`, the arc between two updates, with the weights 1 - t and t; `ties` (arXiv:2306.01708);
            `dare` (arXiv:2311.03099); `dare-ties`; `magnitude`.
        rank: the most ranks at a layer: the update is truncated to its best approximation.
        energy: instead, the share of the squared norm of each update to keep.
        density: the share of the elements of each update that ties, magnitude and dare keep; 0.2 by default.
        base: the base. Needed for parameters that were trained in full, and by `approximate`.
        approximate: accept methods whose update is not a product (DoRA, GLoRA): the closest one of low rank is mixed.
        seed: of the elements that dare drops.
        force: mix adapters of different bases, if every tensor fits.
        progress: called with the number of layers done and of all.

    Returns:
        A LoRA, or the one adapter of weight 1. Its provenance holds the parents' hashes and weights, and where it is
        an approximation `error` and `errors`: |dW' - dW| / |dW| in the Frobenius norm, of all layers together and of
        each. Its notes say the same in words.

    Raises:
        MethodError: the adapters have no such mix, or an argument is invalid; every reason.
        StateError: `base` has PEFT's layers, or is sharded by FSDP.

    Example:
        >>> both = lorary.mix([code, chat], [0.7, 0.3])
        >>> without = lorary.mix([code, chat], [1, -1])
    """
    weights = [0.5, 0.5] if weights is None and how == "slerp" else weights
    every = _arguments.terms_of(adapters, weights)
    if wrong := not_a(nn.Module | None, "a torch.nn.Module", base=base):
        raise MethodError("cannot mix these adapters:", wrong)
    base = None if base is None else changeable(base, "mix")
    problems = _arguments.option_problems(every, how, rank, energy, density, seed) + _arguments.tensor_faults(every)
    problems += _arguments.disagreements(every, base, force=force)
    if problems:
        raise MethodError("cannot mix these adapters:", problems)
    merging, chosen = MERGINGS[how], {"rank": rank, "energy": energy, "approximate": approximate or None}
    if isinstance(merging, ByElement):
        drawn = merging.sparsify is drop
        chosen |= {"density": DENSITY if density is None else density, "seed": seed if drawn else None}
    settings = {name: value for name, value in chosen.items() if value is not None}
    terms = [term for term in every if term.weight]
    exact = isinstance(merging, InSpan) and rank is None and energy is None
    errors: dict[str, tuple[float, float]] = {}
    if exact and [term.weight for term in terms] == [1]:
        result = terms[0].adapter
    else:
        result, errors = _Mixture(terms, base, how, settings, progress).adapter()
    return _with_provenance(result, every, isinstance(adapters, Mapping), how, settings, errors)


def stacked(
    adapters: Sequence[Adapter] | Mapping[str, Adapter], model: nn.Module, weights: Sequence[float] | None = None
) -> Adapter:
    """The weighted sum of adapters that fit a model: exact, by stacking their factors along the rank.

    Args:
        adapters: of any methods whose update is B A alone; by names, for errors.
        model: the base, for the parameters that some of them trained in full.
        weights: one for each adapter, all 1 by default.

    Raises:
        MethodError: one of them has a gain or a shift, or they differ in context.
    """
    terms = [term for term in _arguments.terms_of(adapters, weights) if term.weight]
    if problems := _arguments.disagreements(terms, None, force=True):
        raise MethodError("cannot add these adapters:", problems)
    return _Mixture(terms, model, "sum", {}, headline="cannot add these adapters:").adapter()[0]


@dataclass(frozen=True)
class _Mixture:
    """Several adapters and how they become one.

    Args:
        terms: the adapters with their weights, none of them 0.
        base: the base, without wrappers.
        how: the way to merge them.
        settings: the options that were chosen.
        progress: called with the number of layers done and of all.
        headline: of errors.
    """

    terms: Sequence[Term]
    base: nn.Module | None
    how: str
    settings: Mapping[str, Any]
    progress: Progress | None = None
    headline: str = "cannot mix these adapters:"

    @torch.no_grad()
    def adapter(self) -> tuple[Adapter, dict[str, tuple[float, float]]]:
        """The mixed adapter, and site -> (norm of the error, norm of the update) where it is not exact.

        Raises:
            MethodError: there is none; every reason.
        """
        approximate = "approximate" in self.settings
        updates, problems = updates_by_site(self.terms, self.base, approximate=approximate)
        changes, unknown = full_changes(self.terms, self.base)
        if problems or unknown:
            raise MethodError(self.headline, deduplicated([*problems, *unknown]))
        found: dict[str, Truncated] = {}
        for i, (name, several) in enumerate(updates.items()):
            if (merged := self._merged(name, several, changes)) is not None:
                found[name] = merged
            if self.progress is not None:
                self.progress(i + 1, len(updates))
        if not found and not changes:
            raise MethodError(self.headline, [Diagnostic("adapters", "change nothing: every update has rank 0")])
        result = self._plain(found, self._full(changes))
        inexact = any(one.lost for one in found.values())
        return result, {name: _error(one) for name, one in found.items()} if inexact else {}

    def _merged(self, name: str, several: Sequence[Update], changes: dict[str, list[Change]]) -> Truncated | None:
        """The merged update of a site as factors, None if it has rank 0; changes of its bias are added to `changes`."""
        exact = self.how == "sum" and not {"rank", "energy", "approximate"} & self.settings.keys()
        if several[0].B.dim() == 2 or exact:
            return self._matrix(name, several, changes)
        each = zip(*(update.experts() for update in several), strict=True)
        return stacked_experts([self._matrix(expert_name(name, e), one, changes) for e, one in enumerate(each)])

    def _matrix(self, name: str, several: Sequence[Update], changes: dict[str, list[Change]]) -> Truncated | None:
        """`_merged` of one matrix; of those of all experts of a block only where the sum is exact."""
        merging = MERGINGS[self.how]
        if isinstance(merging, InSpan) and all(update.change is None for update in several):
            return self._stacked(name, merging, several)
        dense = []
        for update in several:
            matrix, bias = update.dense()
            dense.append(matrix)
            if bias is not None:
                changes.setdefault(f"{name}.bias", []).append(Change(update.weight, bias))
        matrix = self._dense(name, dense, [update.weight for update in several])
        rank, energy = self._cut
        if rank is None and energy is None:
            rank = max(sum(update.A.shape[0] for update in several), 1)
        return truncated_matrix(matrix, rank=rank, energy=energy)

    def _stacked(self, name: str, merging: InSpan, several: Sequence[Update]) -> Truncated | None:
        """A weighted sum of products: exact, unless it is to have a lower rank."""
        factors = [(update.B, update.A) for update in several]
        c = merging.coefficients([update.weight for update in several], lambda: factored_gram(factors))
        B, A = (
            torch.cat([w * B for w, (B, _) in zip(c, factors, strict=True)], -1),
            torch.cat([A for _, A in factors], -2),
        )
        self._check_range(name, B)
        (rank, energy), R = self._cut, A.shape[-2]
        if R and (energy is not None or (rank is not None and rank < R)):
            return truncated_product(B, A, rank=rank, energy=energy)
        return Truncated(B, A, math.nan, 0.0) if R else None

    @property
    def _cut(self) -> tuple[int | None, float | None]:
        """The rank or the energy to truncate to."""
        return self.settings.get("rank"), self.settings.get("energy")

    def _dense(self, name: str, updates: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The merged update of a matrix or of a parameter trained in full."""
        seed, density = f"{self.settings.get('seed', 0)}/{name}", self.settings.get("density", 1.0)
        merged = MERGINGS[self.how].dense(updates, weights, density, seed)
        self._check_range(name, merged)
        return merged

    def _check_range(self, name: str, result: Tensor) -> None:
        """Refuse weights that make an update too large for its 32 bits.

        Raises:
            MethodError: a value is infinite, or NaN, which infinities make of each other.
        """
        if not result.isfinite().all():
            what = "the weighted update there is NaN, or too large for 32-bit numbers"
            raise MethodError(self.headline, [Diagnostic(name, what, "use weights nearer to 1")])

    def _full(self, changes: Mapping[str, Sequence[Change]]) -> dict[str, Tensor]:
        """base parameter -> its value with the merged change, in the adapters' precision."""
        full = {}
        for name, several in changes.items():
            assert self.base is not None  # or the changes were unknown
            change = self._dense(name, [c.change for c in several], [c.weight for c in several])
            saved = [a.full[name].dtype for a in (term.adapter for term in self.terms) if name in a.full]
            full[name] = (value_before(self.base, name).float().cpu() + change).to(saved[0] if saved else change.dtype)
        return full

    def _plain(self, found: Mapping[str, Truncated], full: Mapping[str, Tensor]) -> Adapter:
        """The LoRA with these factors at the sites of all adapters."""
        adapters = [term.adapter for term in self.terms]
        storages = {a.method.storage for a in adapters}
        storage = storages.pop() if len(storages) == 1 else Unquantized()
        sites: dict[str, AdaptedSite] = {}
        for a in sorted(adapters, key=lambda a: a.method.storage != storage):  # NF4 makes transposed layers linear
            sites = {s.site.name: dataclasses.replace(s, share="") for s in a.sites} | sites
        factors = {name: (one.B, one.A) for name, one in found.items()}
        context = adapters[0].method.context
        method, placed, tensors = plain_lora(sites.values(), factors, storage=storage, context=context, full=full)
        return Adapter(method, placed, tensors, full, self._fingerprint(full), self._notes())

    def _fingerprint(self, full: Mapping[str, Tensor]) -> Fingerprint:
        """That of the base, for the parameters that the result holds."""
        adapters = [term.adapter for term in self.terms]
        known = next((a.base for a in adapters if a.base.weights), adapters[0].base)
        if all(a.full.keys() == full.keys() for a in adapters):
            return known
        plain = self.base is not None and state_of(self.base) is None
        return dataclasses.replace(known, frozen=frozen_weights(self.base, full) if self.base and plain else "")

    def _notes(self) -> tuple[str, ...]:
        """Notes about quantised bases."""
        kinds = {term.name: term.adapter.method.storage for term in self.terms}
        trained = sorted({type(s).__name__ for s in kinds.values() if not s.writable})
        if not trained:
            return ()
        if len(set(kinds.values())) > 1:
            return (
                f"some of these adapters, but not all, were trained on a base quantised to {', '.join(trained)}: the "
                "mix is for the original weights, and does not undo the quantisation error",
            )
        if any(s.starts for term in self.terms for s in term.adapter.sites):
            return (
                f"an adapter was trained on the {trained[0]} residual of its base: the mix is for the quantised base "
                "itself, whose quantisation error is another one",
            )
        return ()


def _error(one: Truncated) -> tuple[float, float]:
    """The norms of the error and of the whole update."""
    return one.lost, product_norm(one.B, one.A) if math.isnan(one.norm) else one.norm


def _with_provenance(
    result: Adapter,
    terms: Sequence[Term],
    named: bool,
    how: str,
    settings: dict[str, Any],
    errors: Mapping[str, tuple[float, float]],
) -> Adapter:
    parents = tuple(Parent(base_name(t.name) if named else "", content_hash(t.adapter), t.weight) for t in terms)
    notes = (*result.notes, *_lost_tokens(result, terms))
    if errors:
        each = {name: relative([pair]) for name, pair in errors.items()}
        total, worst = relative(list(errors.values())), max(each, key=lambda name: each[name])
        settings = settings | {"error": total, "errors": each}
        notes = (
            *notes,
            f"an approximation: the update is off by {total:.2%} in the Frobenius norm, most at {worst} "
            f"({each[worst]:.2%})",
        )
    return dataclasses.replace(result, notes=notes, provenance=Provenance(how, parents, settings))


def _lost_tokens(result: Adapter, terms: Sequence[Term]) -> tuple[str, ...]:
    """A note on the tokens that parents added: the result has their change of the tables, and not their names."""
    added = {text: i for term in terms if term.weight for text, i in added_tokens(term.adapter.sites).items()}
    lost = ", ".join(f"{text!r} ({i})" for text, i in added.items() if text not in added_tokens(result.sites))
    return (f"its record does not name the tokens that were added for it: {lost}",) if lost else ()
