"""plan: a checked, printable Plan from a model, a method and targets; changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lorary.errors import Diagnostic, MethodError, PlanError, deduplicated, suggestion
from lorary.layers.kinds import site
from lorary.model._full_parameters import full_parameters
from lorary.model._plan_notes import plan_notes, quantized_size, unreached_notes
from lorary.model.checks import bad_arguments, not_a_module, not_ready
from lorary.model.plan import Plan
from lorary.model.previous_tasks import PreviousAdapter, with_previous_tasks
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
    """The plan of a method for a model: where adapters sit, and what that costs. Works on the meta device.

    Args:
        model: any module; a Transformers model's output head is left out of `all-linear`.
        method: from `lorary.method`.
        targets: presets (`all-linear`, `attention`, `attention-qv`, `mlp`, `embedding`, `conv`), whole-component
            names (`q_proj`), globs (`*.layers.1?.*`), projections of fused weights (`c_attn[q,v]`). None: the
            method's default, which is `all-linear` for most.
        ranks: site pattern -> rank; the first pattern that matches wins.
        alphas: site pattern -> alpha, likewise.
        exclude: layers not to adapt, written like targets.
        after: the adapters of earlier tasks, which the new one keeps as they are (O-LoRA).

    Raises:
        PlanError: every problem at once, with the nearest names and the model's layers if a target matches none.
    """
    scanned = _scan_if_ready(model, method, ranks, alphas)
    method, problems = _fit_context(model, method)
    targets = default_targets(method) if targets is None else targets
    sites, unplaced = _adapted_sites(scanned, method, targets, exclude, ranks or {}, alphas or {})
    sites, fixed, previous = with_previous_tasks(model, sites, after)
    full, untrainable = full_parameters(scanned, method, sites)
    quantized = quantizable_layers(scanned, method.storage, {f.name for f in full})
    problems += [*unplaced, *previous, *untrainable, *(problem for p in sites for problem in p.problems())]
    problems += _storage_problems(scanned, method.storage, sites, quantized)
    if problems:
        raise PlanError("invalid plan:", problems)
    total, size = _planned_size(scanned, method.storage, quantized)
    notes = plan_notes(scanned, method, sites, full, quantized)
    if "all-linear" in as_list(targets):
        notes += unreached_notes(scanned, total)
    return Plan(method, tuple(sites), tuple(full), total, size, tuple(notes), fixed, tuple(quantized))


def _scan_if_ready(model: Any, method: Any, ranks: Any, alphas: Any) -> Scan:
    """The scan of a model that can be planned for.

    Raises:
        PlanError: the model is not ready, or an argument is of the wrong type; every reason.
    """
    problems = not_a_module(model)
    scanned = None if problems else scan(model)
    problems += [*(not_ready(scanned) if scanned else ()), *bad_arguments(method, ranks, alphas)]
    if scanned is None or problems:
        raise PlanError("cannot plan for this model:", problems)
    return scanned


def _fit_context(model: nn.Module, method: Method) -> tuple[Method, list[Diagnostic]]:
    """The method with its context computed for this model, and why the model does not allow it."""
    if method.context is None:
        return method, []
    context = method.context.planned(model)
    return method.replace(context=context), [Diagnostic("context", *why) for why in context.problems(model)]


def default_targets(method: Method) -> tuple[str, ...]:
    """The default targets of a method."""
    return ("all-linear",) if method.context is None else tuple(method.context.targets)


def _adapted_sites(
    scanned: Scan,
    method: Method,
    targets: str | Sequence[str],
    exclude: str | Sequence[str],
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
) -> tuple[list[AdaptedSite], list[Diagnostic]]:
    """The adapted sites, each with its own rank and alpha, and every problem with them."""
    if method.delta is None:  # targets have a default, so only explicit arguments can be wrong
        what = "makes sense for adapted layers only, and this method adapts none"
        arguments = {"ranks": ranks, "alphas": alphas, "exclude": exclude}
        return [], [Diagnostic(field, what) for field, value in arguments.items() if value]
    found, problems = resolve(scanned, targets, exclude)
    problems += _unmatched("ranks", ranks, found) + _unmatched("alphas", alphas, found)
    if found and alphas and not hasattr(method.scale, "alpha"):
        problems.append(Diagnostic("alphas", f"{method.scale} has no alpha", "leave them out"))
        alphas = {}
    sites = []
    for f in found:
        r = next((value for pattern, value in ranks.items() if matches(str(pattern), f.name)), None)
        alpha = next((value for pattern, value in alphas.items() if matches(str(pattern), f.name)), None)
        try:
            sites.append(AdaptedSite(site(f.name, f.layer, f.parts), with_rank(method, r, alpha)))
        except MethodError as error:
            problems += [Diagnostic(f.name, problem.what) for problem in error.problems]
    return sites, problems


def _unmatched(field: str, patterns: Mapping[str, Any], found: list[TargetMatch]) -> list[Diagnostic]:
    """The patterns of `ranks` or `alphas` that match no adapted site."""
    known = {f.name.rpartition(".")[2] for f in found}
    return [
        Diagnostic(field, f"`{pattern}` matches no adapted site", suggestion(pattern.rpartition(".")[2], known))
        for pattern in map(str, patterns)
        if found and not any(matches(pattern, f.name) for f in found)
    ]


def _storage_problems(
    scanned: Scan, storage: Storage, sites: list[AdaptedSite], quantized: list[str]
) -> list[Diagnostic]:
    """Why the base cannot be stored as the method says, or an init cannot decompose its weights."""
    late = [p for p in sites if p.init.residual_init and scanned.is_quantised(p.site.name)]
    problems = deduplicated(already_quantized(p.site.name, p.init) for p in late)
    if not storage.writable and not quantized and not any(m.quantised for m in scanned.modules.values()):
        what = f"{type(storage).__name__} finds no plain linear layer to quantise besides the output head"
        problems.append(Diagnostic("storage", what))
    return problems


def _planned_size(scanned: Scan, storage: Storage, quantized: list[str]) -> tuple[int, int]:
    """(numbers, bytes) of the base once these layers are quantised."""
    total, size = scanned.sizes()
    dense, stored = quantized_size(scanned, storage, quantized)
    return total, size - dense + stored
