"""plan: a model, a method and targets become a checked, printable Plan; nothing is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lorary.errors import Diagnostic, MethodError, PlanError, deduplicated, nearest
from lorary.layers.kinds import site
from lorary.model.checks import bad_arguments, not_a_module, not_ready
from lorary.model.full_parameters import full_parameters
from lorary.model.plan import Plan
from lorary.model.plan_notes import plan_notes, unreached_notes
from lorary.model.previous_tasks import PreviousAdapter, with_past
from lorary.model.quantize import already_quantized, quantizable_layers
from lorary.model.scan import Scan, scan
from lorary.model.targets import TargetMatch, as_list, matches, resolve
from lorary.spec.interfaces import Storage
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite, with_rank


def plan(
    model: nn.Module,
    method: Method,
    targets: str | Sequence[str] | None = None,
    *,
    ranks: Mapping[str, int] | None = None,
    alphas: Mapping[str, float] | None = None,
    exclude: str | Sequence[str] = (),
    after: Sequence[PreviousAdapter] = (),
) -> Plan:
    """Where a method goes in a model, and what that costs. Touches nothing; works on a meta-device model.

    Args:
        model: any module; a Transformers model's output head is left out of `all-linear`.
        method: what `lorary.method` made.
        targets: presets (`all-linear`, `attention`, `attention-qv`, `mlp`, `embedding`, `conv`), whole-component
            names (`q_proj`), globs (`*.layers.1?.*`), projections of fused weights (`c_attn[q,v]`). None: the
            method's own, which is `all-linear` for most.
        ranks: site pattern -> rank; the first pattern that matches wins.
        alphas: site pattern -> alpha, likewise.
        exclude: what not to adapt, written like targets.
        after: the adapters of earlier tasks, which stay as they are beneath the new one (O-LoRA).

    Raises:
        PlanError: every problem at once, with the nearest names and the model's layers where a target names none.
    """
    base = _scan_if_ready(model, method, ranks, alphas)
    method, problems = _fit_context(model, method)
    targets = default_targets(method) if targets is None else targets
    placed, unplaced = _place(base, method, targets, exclude, ranks or {}, alphas or {})
    placed, given, past = with_past(model, placed, after)
    full, untrainable = full_parameters(base, method, placed)
    packed = quantizable_layers(base, method.storage, {f.name for f in full})
    problems += [*unplaced, *past, *untrainable, *(problem for p in placed for problem in p.problems())]
    problems += _storage_problems(base, method.storage, placed, packed)
    if problems:
        raise PlanError("invalid plan:", problems)
    total, size = _planned_sizes(base, method.storage, packed)
    notes = plan_notes(base, method, placed, full, packed)
    if "all-linear" in as_list(targets):
        notes += unreached_notes(base, total)
    return Plan(method, tuple(placed), tuple(full), total, size, tuple(notes), given, tuple(packed))


def _scan_if_ready(model: Any, method: Any, ranks: Any, alphas: Any) -> Scan:
    """The scan of a model for which something can be planned.

    Raises:
        PlanError: the model is not ready, or an argument is of the wrong type; every reason.
    """
    problems = not_a_module(model)
    base = None if problems else scan(model)
    problems += [*(not_ready(base) if base else ()), *bad_arguments(method, ranks, alphas)]
    if base is None or problems:
        raise PlanError("cannot plan for this model:", problems)
    return base


def _fit_context(model: nn.Module, method: Method) -> tuple[Method, list[Diagnostic]]:
    """The method with its context worked out for this model, and why that cannot be."""
    if method.context is None:
        return method, []
    context = method.context.planned(model)
    return method.replace(context=context), [Diagnostic("context", *found) for found in context.problems(model)]


def default_targets(method: Method) -> tuple[str, ...]:
    """The targets of a method where none are given."""
    return ("all-linear",) if method.context is None else tuple(method.context.targets)


def _place(
    base: Scan,
    method: Method,
    targets: str | Sequence[str],
    exclude: str | Sequence[str],
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
) -> tuple[list[AdaptedSite], list[Diagnostic]]:
    """The adapted sites, each with its own rank and alpha, and every problem with them."""
    if method.delta is None:  # targets have a default, so only explicit arguments can be wrong
        what = "makes sense for adapted layers only, and this method adapts none"
        given = {"ranks": ranks, "alphas": alphas, "exclude": exclude}
        return [], [Diagnostic(field, what) for field, value in given.items() if value]
    found, problems = resolve(base, targets, exclude)
    problems += _unmatched("ranks", ranks, found) + _unmatched("alphas", alphas, found)
    if found and alphas and not hasattr(method.scale, "alpha"):
        problems.append(Diagnostic("alphas", f"{method.scale} has no alpha", "leave them out"))
        alphas = {}
    placed = []
    for f in found:
        r = next((v for pattern, v in ranks.items() if matches(str(pattern), f.name)), None)
        alpha = next((v for pattern, v in alphas.items() if matches(str(pattern), f.name)), None)
        try:
            placed.append(AdaptedSite(site(f.name, f.layer, f.parts), with_rank(method, r, alpha)))
        except MethodError as error:
            problems += [Diagnostic(f.name, p.what) for p in error.problems]
    return placed, problems


def _unmatched(field: str, patterns: Mapping[str, Any], found: list[TargetMatch]) -> list[Diagnostic]:
    """The patterns of `ranks` or `alphas` that match no adapted site."""
    problems = []
    for pattern in map(str, patterns):
        if found and not any(matches(pattern, f.name) for f in found):
            near = nearest(pattern.rpartition(".")[2], list({f.name.rpartition(".")[2] for f in found}))
            hint = f"did you mean {' or '.join(near)}?" if near else ""
            problems.append(Diagnostic(field, f"`{pattern}` matches no adapted site", hint))
    return problems


def _storage_problems(base: Scan, storage: Storage, placed: list[AdaptedSite], packed: list[str]) -> list[Diagnostic]:
    """Why the base cannot be stored as the method says, or an init cannot take a part of it."""
    late = [p for p in placed if p.init.residual_init and base.is_quantised(p.site.name)]
    problems = deduplicated(already_quantized(p.site.name, p.init) for p in late)
    if not storage.writable and not packed and not any(m.quantised for m in base.modules.values()):
        what = f"{type(storage).__name__} has nothing to pack: plain linear layers, without the output head"
        problems.append(Diagnostic("storage", what))
    return problems


def _planned_sizes(base: Scan, storage: Storage, packed: list[str]) -> tuple[int, int]:
    """(numbers, bytes) of the base once these layers are packed."""
    total, size = base.sizes()
    weights = [base.parameter(f"{path}.weight") for path in packed]
    was = sum(W.numel() * W.element_size() for W in weights)
    return total, size - was + sum(storage.bytes(W.numel(), W.element_size()) for W in weights)
