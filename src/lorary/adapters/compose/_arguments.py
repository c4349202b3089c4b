"""The arguments of `mix`, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lorary.adapters.adapter import Adapter
from lorary.adapters.compose.merging import MERGINGS, ByElement
from lorary.adapters.compose.truncate import cut_problems
from lorary.adapters.compose.updates import Term
from lorary.adapters.tensor_checks import adapter_problems
from lorary.errors import Diagnostic, MethodError, did_you_mean
from lorary.model.fingerprint import Fingerprint
from lorary.model.vocabulary import other_meanings
from lorary.spec.fields import is_finite
from lorary.spec.site import Site

_LOAD = "read one with lorary.load_adapter(path)"


def terms_of(adapters: Any, weights: Any) -> list[Term]:
    """The adapters with their weights, all 1 by default.

    Raises:
        MethodError: an argument is of the wrong kind; every reason.
    """
    named = dict(adapters) if isinstance(adapters, Mapping) else None
    if named is None and (isinstance(adapters, Adapter | str) or not isinstance(adapters, Sequence)):
        what = f"is a {type(adapters).__name__}, not a sequence of adapters, or a mapping from names to adapters"
        raise MethodError("cannot mix these adapters:", [Diagnostic("adapters", what)])
    if named is None:
        named = {f"adapters[{i}]": adapter for i, adapter in enumerate(adapters)}
    problems = [
        Diagnostic(str(name), f"is a {type(a).__name__}, not an Adapter", _LOAD)
        for name, a in named.items()
        if not isinstance(a, Adapter)
    ]
    if not named:
        problems.append(Diagnostic("adapters", "is empty", "give at least one adapter"))
    problems += _weight_problems(weights, len(named))
    if problems:
        raise MethodError("cannot mix these adapters:", problems)
    weights = [1.0] * len(named) if weights is None else [float(w) for w in weights]
    return [Term(str(name), a, w) for (name, a), w in zip(named.items(), weights, strict=True)]


def _weight_problems(weights: Any, count: int) -> list[Diagnostic]:
    if weights is None:
        return []
    if isinstance(weights, str | bytes | bytearray | Mapping) or not isinstance(weights, Sequence):
        return [Diagnostic("weights", f"is {weights!r}, not a sequence of numbers, one for each adapter")]
    problems = [
        Diagnostic(f"weights[{i}]", f"is {w!r}, not a finite number") for i, w in enumerate(weights) if not is_finite(w)
    ]
    if len(weights) != count:
        problems.append(Diagnostic("weights", f"{len(weights)} given for {count} adapters", "one for each adapter"))
    if not problems and not any(weights):
        problems.append(Diagnostic("weights", "are all 0, which leaves the base as it is"))
    return problems


def option_problems(
    terms: Sequence[Term], how: Any, rank: Any, energy: Any, density: Any, seed: Any
) -> list[Diagnostic]:
    """The problems of a mix's options."""
    problems = []
    if not isinstance(how, str) or how not in MERGINGS:
        problems.append(Diagnostic("how", f"{how!r} is not a way to mix", did_you_mean(str(how), MERGINGS)))
    elif density is not None and not isinstance(MERGINGS[how], ByElement):
        problems.append(Diagnostic("density", f"has no effect with {how}: it keeps every element", "leave it out"))
    if rank is not None or energy is not None:
        problems += cut_problems(rank=rank, energy=energy)
    number = isinstance(density, int | float) and not isinstance(density, bool)
    if density is not None and not (number and 0 < density <= 1):
        problems.append(Diagnostic("density", f"is {density!r}, not a share above 0 and at most 1, such as 0.2"))
    if isinstance(seed, bool) or not isinstance(seed, int):
        problems.append(Diagnostic("seed", f"is {seed!r}, not a whole number"))
    if how == "slerp":
        problems += _arc_problems([term.weight for term in terms])
    return problems


def _arc_problems(weights: Sequence[float]) -> list[Diagnostic]:
    if len(weights) != 2:
        return [Diagnostic("adapters", f"are {len(weights)}, and slerp interpolates between two")]
    if min(weights) < 0 or not math.isclose(sum(weights), 1, abs_tol=1e-6):
        what = f"are {weights[0]:g} and {weights[1]:g}; those of slerp are 1 - t and t with t from 0 to 1"
        return [Diagnostic("weights", what, "such as [0.5, 0.5]")]
    return []


def tensor_faults(terms: Sequence[Term]) -> list[Diagnostic]:
    """The tensors that are missing, of a wrong shape, or not finite."""
    problems = []
    for term in terms:
        wrong = adapter_problems(term.adapter)
        problems += [Diagnostic(f"{term.name}: {p.where}", p.what, p.fix) for p in wrong]
    return problems


def disagreements(terms: Sequence[Term], base: nn.Module | None, *, force: bool) -> list[Diagnostic]:
    """The differences between adapters that forbid a sum: in their base, context and layers."""
    problems = [] if force else _other_bases(terms, base)
    fix = "their tokens have different meanings: train one of them again with the tokens of the other"
    problems += other_meanings({term.name: term.adapter.sites for term in terms}, fix)
    if base is not None and any(p.is_meta for p in base.parameters()):
        problems.append(Diagnostic("base", "is on the meta device and has no values", "load its weights first"))
    contexts = {term.adapter.method.context for term in terms}
    if len(contexts) > 1:
        named = "; ".join(sorted(str(c or "the base's own") for c in contexts))
        what = f"they use different RoPE scaling or attention, or act on other parts of a text: {named}"
        problems.append(Diagnostic("context", what))
    seen: dict[str, tuple[Term, Site]] = {}
    for term in terms:
        for adapted in term.adapter.sites:
            first, site = seen.setdefault(adapted.site.name, (term, adapted.site))
            mine, its = site.matrix, adapted.site.matrix
            if mine != its:
                problems.append(Diagnostic(site.name, f"is {mine} in {first.name}, and {its} in {term.name}"))
    return problems


def _other_bases(terms: Sequence[Term], base: nn.Module | None) -> list[Diagnostic]:
    """The adapters that were trained on another base than the one given, or else than the first with a fingerprint."""
    fix = "force=True (--force) mixes them all the same, if every tensor fits"
    first = next((term for term in terms if term.adapter.base.weights), terms[0])
    here = first.adapter.base if base is None else Fingerprint.of(base)
    problems = []
    for term in terms:
        compared = here if base is None else here.without(base, term.adapter.full)
        there = f"for {first.name}" if base is None else "in the base given"
        problems += [Diagnostic(term.name, p.what, fix) for p in term.adapter.base.disagreements(compared, there)]
    return problems
