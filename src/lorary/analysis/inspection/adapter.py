"""inspect_adapter: the spectrum, size, intruder dimensions and turn of every weight that an adapter changes.

    found = lorary.inspect_adapter(adapter, base)
    print(found)

One weight at a time is measured. Without the base there are the spectra alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lorary.adapters.adapter import Adapter
from lorary.adapters.compose.truncate import product_svd
from lorary.analysis.inspection.figures import AdapterInspection, ChangeFigures, SiteInspection
from lorary.analysis.inspection.intruders import EPSILON, TOP, Basis, intruders
from lorary.analysis.inspection.magnitude_direction import magnitude_direction
from lorary.analysis.inspection.spectrum import Spectrum
from lorary.analysis.inspection.weight_changes import (
    WeightChange,
    change_problems,
    full_matrices,
    tuned_matrix,
    tuned_problems,
    weight_changes,
)
from lorary.errors import Diagnostic, MethodError, StateError, deduplicated, not_a
from lorary.model.ambient import mode_independent
from lorary.model.state import require_values
from lorary.spec.presets import presets_of

_HEADLINE = "cannot inspect this adapter:"


@torch.no_grad()
@mode_independent
def inspect_adapter(
    adapter: Adapter,
    base: nn.Module | None = None,
    *,
    tuned: nn.Module | None = None,
    top: int = TOP,
    epsilon: float = EPSILON,
    dtype: torch.dtype | None = None,
    progress: Callable[[str], object] | None = None,
) -> AdapterInspection:
    """The figures of every weight that an adapter changes.

    Args:
        adapter: of any method.
        base: the model that it was trained on, with or without an adapter attached. Without it the spectra remain, of
            methods whose change of a weight does not depend on that weight (not DoRA).
        tuned: another fine-tuned model of the same base, such as one that was trained in full, to be measured beside.
        top: the number of singular vectors that are checked for intruders (the paper's k); 0 for none, which spares
            the decomposition of the base's weights.
        epsilon: the cosine below which a singular vector is an intruder.
        dtype: that the weights would be merged in, for the share of their numbers that then change; None for the
            base's own.
        progress: called with the name of each weight before it is measured.

    Raises:
        MethodError: the base or the tuned model does not fit, or is needed and missing; every reason.
        StateError: a weight of the base or of the tuned model is not finite, or on the meta device.

    >>> lorary.inspect_adapter(lorary.load_adapter("out/adapter")).sites[0].adapter.spectrum.stable_rank
    """
    _check(adapter, base, tuned, top, epsilon)
    sites = []
    for whole in weight_changes(adapter, base):
        if progress is not None:
            progress(whole.name)
        other = None if tuned is None else tuned_matrix(tuned, whole.name)
        each = whole.matrices()
        for e, change in enumerate(each):
            its = other if other is None or len(each) == 1 else other[e]
            sites.append(_site(change, its, top, epsilon, dtype or _dtype(base)))
    return AdapterInspection(_method(adapter), tuple(sites), top, epsilon, tuple(_notes(adapter, base, top)))


def _check(adapter: Adapter, base: nn.Module | None, tuned: nn.Module | None, top: int, epsilon: float) -> None:
    problems = not_a(Adapter, "an Adapter", adapter=adapter)
    problems += not_a(nn.Module | None, "a torch.nn.Module", base=base, tuned=tuned)
    if isinstance(top, bool) or not isinstance(top, int) or top < 0:
        problems.append(Diagnostic("top", f"is {top!r}, not a whole number from 0 on"))
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 < epsilon <= 1:
        problems.append(Diagnostic("epsilon", f"is {epsilon!r}, not a cosine above 0 and at most 1"))
    if tuned is not None and base is None:
        problems.append(Diagnostic("tuned", "cannot be compared without the base that it was tuned from", "give both"))
    if not problems:
        for model in (base, tuned):
            if model is not None:
                require_values(model)
        problems = change_problems(adapter, base) + tuned_problems(adapter, base, tuned)
    if problems:
        raise MethodError(_HEADLINE, deduplicated(problems))


def _site(change: WeightChange, other: Tensor | None, top: int, epsilon: float, dtype: torch.dtype) -> SiteInspection:
    """The figures of one weight, and of the other model's."""
    before, after = change.before, change.after
    _check_finite(change, other)
    basis = Basis.of(before) if before is not None and top else None
    if change.factors is not None:
        spectrum = Spectrum.of(product_svd(*change.factors).S)
    else:
        spectrum = Spectrum.of(torch.linalg.svdvals(change.delta))
    own = _figures(spectrum, before, after, basis, top, epsilon, dtype)
    if other is None or before is None:
        return SiteInspection(change.name, change.shape, own)
    delta = other - before
    tuned = _figures(Spectrum.of(torch.linalg.svdvals(delta)), before, other, basis, top, epsilon, dtype)
    distance = float(torch.linalg.vector_norm(delta - change.delta, dtype=torch.float64))
    return SiteInspection(change.name, change.shape, own, tuned, distance)


def _figures(
    spectrum: Spectrum,
    before: Tensor | None,
    after: Tensor | None,
    basis: Basis | None,
    top: int,
    epsilon: float,
    dtype: torch.dtype,
) -> ChangeFigures:
    if before is None or after is None:
        return ChangeFigures(spectrum)
    found = None if basis is None else intruders(basis, Basis.of(after), top, epsilon)
    altered = float((after.to(dtype) != before.to(dtype)).double().mean())
    weight = float(torch.linalg.vector_norm(before, dtype=torch.float64))
    return ChangeFigures(spectrum, weight, found, magnitude_direction(before, after), altered)


def _check_finite(change: WeightChange, other: Tensor | None) -> None:
    """Refuse NaN and infinities, of which no decomposition exists.

    Raises:
        StateError: with the name of the weight and where it is from.
    """
    weights = {"the base's": change.before, "the adapted": change.after, "the tuned model's": other}
    for whose, W in weights.items():
        if W is not None and (bad := int((~W.isfinite()).sum())):
            what = f"{bad:,} of {W.numel():,} numbers of {whose} weight are NaN or infinite"
            raise StateError(_HEADLINE, [Diagnostic(change.name, what)])


def _dtype(base: nn.Module | None) -> torch.dtype:
    """The dtype of the base's weights."""
    floats = (p.dtype for p in base.parameters() if p.is_floating_point()) if base is not None else iter(())
    return next(floats, torch.float32)


def _method(adapter: Adapter) -> str:
    """The presets of the method, as a command line would name them."""
    return ",".join(presets_of(adapter.method))


def _notes(adapter: Adapter, base: nn.Module | None, top: int) -> list[str]:
    """What was left out, and why."""
    notes = []
    covered = {s.site.weight_name for s in adapter.sites} | {*full_matrices(adapter, base).values()}
    if rest := [name for name in adapter.full if name not in covered]:
        why = "they are not weight matrices" if base is not None else "their change needs the base"
        notes.append(f"{len(rest)} parameters trained in full are left out, such as {rest[0]}: {why}")
    if base is None:
        what = "the size beside the weights, intruder dimensions, and magnitude and direction"
        notes.append(f"left out, because they need the base: {what}")
    elif not top:
        notes.append("intruder dimensions are left out: top is 0")
    return notes
