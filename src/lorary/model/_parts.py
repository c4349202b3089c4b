"""The parts of a plan: several methods, each for its own targets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lorary.errors import Diagnostic, MethodError, PlanError, deduplicated
from lorary.model.scan import Scan
from lorary.model.targets import abbreviated
from lorary.spec.interfaces import Unquantized
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite

Targets = str | tuple[str, ...]
_COMMON = {"storage": "stored", "context": "read with positions"}


class Part(NamedTuple):
    """A method and the layers that it adapts."""

    method: Method
    targets: Any


def several_parts(methods: Mapping[Targets, Method], targets: Any) -> list[Part]:
    """The parts of a plan with several methods, all with the same storage, context and parameters in full.

    Args:
        methods: targets -> the method for them.
        targets: the plan's other argument of this name, which is one method's.

    Raises:
        PlanError: every problem.
    """
    problems = []
    if targets is not None:
        problems.append(Diagnostic("targets", "several methods have their targets as keys", "leave it out"))
    if not methods:
        problems.append(Diagnostic("method", "is empty", 'map targets to methods: {"attention": method}'))
    for key, one in methods.items():
        if not isinstance(one, Method):
            what = f"for {key!r} is a {type(one).__name__}, not a Method"
            problems.append(Diagnostic("method", what, 'make one: lorary.method("lora", r=16)'))
        elif one.delta is None:
            what = f"for {key!r} adapts no layers: it trains base parameters wherever they are"
            problems.append(Diagnostic("method", what, 'name it beside another preset: method("lora", "bitfit")'))
    parts: list[Part] = []
    if not problems:
        parts, problems = _united([Part(m, list(key) if isinstance(key, tuple) else key) for key, m in methods.items()])
    if problems:
        raise PlanError("invalid plan:", problems)
    return parts


def _united(parts: list[Part]) -> tuple[list[Part], list[Diagnostic]]:
    """The parts with what is the model's own, and not a layer's: each says the same of it, or only one does."""
    common: dict[str, Any] = {"full": tuple(sorted({pattern for part in parts for pattern in part.method.full}))}
    problems = []
    for axis, verb in _COMMON.items():
        said = {part.method: getattr(part.method, axis) for part in parts}
        found = list(dict.fromkeys(value for value in said.values() if value not in (None, Unquantized())))
        if len(found) > 1:
            what = f"the model is {verb} in one way only: {' and '.join(map(str, found))}"
            problems.append(Diagnostic(axis, what, "say it in one of the methods, or the same in both"))
        elif found:
            common[axis] = found[0]
    if problems:
        return [], problems
    united = []
    for part in parts:
        try:
            united.append(Part(part.method.replace(**common), part.targets))
        except MethodError as error:
            where = f"method for {part.targets!r}"
            problems += [Diagnostic(where, f"{p.where}: {p.what}", p.fix) for p in error.problems]
    return united, problems


def joined(
    scanned: Scan, found: Iterable[tuple[Part, list[AdaptedSite]]]
) -> tuple[list[AdaptedSite], list[Diagnostic]]:
    """The sites of all parts in the model's order, and those that two of them adapt."""
    owners: dict[str, tuple[Part, AdaptedSite]] = {}
    twice: dict[tuple[str, str], list[str]] = {}
    for part, sites in found:
        for p in sites:
            first = owners.setdefault(p.site.name, (part, p))[0]
            if first is not part:
                twice.setdefault((_named(first), _named(part)), []).append(p.site.name)
    problems = [
        Diagnostic("method", f"{one} and {other} both adapt {abbreviated(names)}", "narrow one of the two")
        for (one, other), names in twice.items()
    ]
    order = {path: i for i, path in enumerate(scanned.modules)}
    sites = sorted((p for _, p in owners.values()), key=lambda p: order[p.site.name])
    return sites, [*problems, *_two_projections(sites)]


def _named(part: Part) -> str:
    """`{delta}` for `targets`, as a message names a part."""
    targets = part.targets if isinstance(part.targets, str) else ", ".join(part.targets or ("all-linear",))
    return f"{type(part.method.delta).__name__} (`{targets}`)"


def _two_projections(sites: list[AdaptedSite]) -> list[Diagnostic]:
    """Why these sites cannot share one set of projections (VeRA): they are drawn in two ways."""
    inits = list(dict.fromkeys(p.init for p in sites if p.delta.shared))
    if len(inits) < 2:
        return []
    what = f"all layers of a model share one set of projections, and two are asked for: {inits[0]} and {inits[1]}"
    return deduplicated([Diagnostic("init", what, "use the same seed in both methods")])
