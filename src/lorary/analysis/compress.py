"""compress: an adapter at fewer directions: by rank, by energy, or by the divergence of the model's outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from lorary.adapters.adapter import Adapter
from lorary.adapters.compose.compression import HEADLINE, Compression, Divergence, Spectra
from lorary.adapters.compose.truncate import cut_problems
from lorary.adapters.switch import switch
from lorary.analysis.merge_check import MergeCheck, Row
from lorary.errors import DataError, Diagnostic, MethodError, StateError, not_a
from lorary.model.ambient import mode_independent
from lorary.model.checks import changeable
from lorary.model.state import state_of

_ONLY_KL = "is only read with kl"


@mode_independent
def compress(
    adapter: Adapter,
    *,
    rank: int | None = None,
    energy: float | None = None,
    kl: float | None = None,
    model: nn.Module | None = None,
    rows: Iterable[Row] | None = None,
    progress: Callable[[int, float], object] | None = None,
) -> Compression:
    """An adapter at fewer directions, as a plain LoRA of the unmodified base with its own rank at each site.

    For every method whose update is a product of two factors. Exactly one of `rank`, `energy` and `kl` says how much
    is kept; `energy` and `kl` keep the largest singular values of all sites together.

    Args:
        adapter: the adapter.
        rank: the most directions at a site.
        energy: the share of the squared Frobenius norm of the whole update to keep.
        kl: the largest KL(adapted || compressed) in nats per token. Every other row is for the search of the smallest
            adapter below it; on those between, the divergence is measured once more and reported.
        model: the base, without an adapter, for `kl`; left as it was. A base that is quantised for the adapter (QLoRA)
            stays quantised.
        rows: at least two, for `kl`: token ids, or the keyword arguments of a forward pass. Their logits stay in
            memory, 4 bytes per token and vocabulary entry.
        progress: called after each candidate of the search with (singular values kept, divergence).

    Returns:
        The compressed adapter, with its size and error.

    Raises:
        MethodError: an argument is invalid, or the update is not a product of factors (DoRA), with every reason; or
            rounding alone is above `kl`.
        DataError: there are fewer than two rows.
        StateError: the model has an adapter attached, or the adapter does not fit it.

    Example:
        >>> small = lorary.compress(adapter, kl=0.01, model=base, rows=rows)
        >>> print(small)
        >>> lorary.save_adapter(small.adapter, "smaller")
    """
    problems = not_a(Adapter, "an Adapter", adapter=adapter) + cut_problems(rank=rank, energy=energy, kl=kl)
    if kl is None:
        given = {"model": model, "rows": rows}
        problems += [Diagnostic(name, _ONLY_KL, "leave it out") for name, x in given.items() if x is not None]
    elif not problems:
        problems += not_a(nn.Module, "a torch.nn.Module, which kl needs", model=model)
    if problems:
        raise MethodError(HEADLINE, problems)
    if kl is not None:
        base, series = _without_adapter(model), _series(rows)
        return _below(Spectra.of(adapter), base, series, kl, progress or (lambda *_: None))
    spectra = Spectra.of(adapter)
    if rank is not None:
        return spectra.cut(spectra.ranks_of_rank(rank), {"rank": rank})
    assert energy is not None
    return spectra.cut(spectra.ranks_of_energy(energy), {"energy": energy})


def _without_adapter(model: Any) -> Any:
    """The model inside its wrappers.

    Raises:
        StateError: something is attached to it.
    """
    inner = changeable(model, "compress")
    if state_of(inner) is not None:
        raise StateError(HEADLINE, [Diagnostic("model", "has an adapter attached", "lorary.detach it first")])
    return inner


def _series(rows: Any) -> list[Row]:
    """The rows as a list.

    Raises:
        DataError: they are not a series, or fewer than two.
    """
    if isinstance(rows, dict | str) or not isinstance(rows, Iterable):
        what = f"is a {type(rows).__name__}, not a series of rows"
        raise DataError(HEADLINE, [Diagnostic("rows", what, "pass a list of rows: [row, ...]")])
    series = list(rows)
    if len(series) < 2:
        what = f"kl needs at least 2 rows, one to search with and one to check; given: {len(series)}"
        raise DataError(HEADLINE, [Diagnostic("rows", what)])
    return series


def _below(
    spectra: Spectra, model: Any, rows: Sequence[Row], bound: float, progress: Callable[[int, float], object]
) -> Compression:
    """The compression with the fewest singular values whose divergence on every other row is at most the bound.

    Raises:
        MethodError: even without compression it is above the bound.
    """
    settings = {"kl": bound}
    try:
        switch(model, spectra.adapter)
        search, check = (MergeCheck.of(model, half) for half in (rows[::2], rows[1::2]))

        def measured(count: int) -> tuple[Compression, float]:
            found = spectra.cut(spectra.ranks_of_count(count), settings)
            switch(model, found.adapter)
            divergence = search.against(model).kl
            progress(count, divergence)
            return found, divergence

        low, high = 0, len(spectra.values)
        best, divergence = measured(high)
        if not divergence <= bound:
            what = f"all {high:,} directions, only rounded, already diverge by {divergence:.3g} nats per token"
            raise MethodError(HEADLINE, [Diagnostic("kl", f"is {bound:g}, and {what}", "raise the bound")])
        while high - low > 1:
            middle = (low + high) // 2
            found, reached = measured(middle)
            if reached <= bound:
                best, divergence, high = found, reached, middle
            else:
                low = middle
        switch(model, best.adapter)
        seen = check.against(model)
    finally:
        switch(model, None)
    result = Divergence(bound, divergence, seen.kl, (sum(map(len, search.logits)), seen.tokens))
    record = best.adapter.provenance
    assert record is not None
    reported = dict(record.settings) | {"search": result.search, "check": result.check}
    adapter = dataclasses.replace(best.adapter, provenance=dataclasses.replace(record, settings=reported))
    return dataclasses.replace(best, adapter=adapter, divergence=result)
