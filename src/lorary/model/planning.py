"""plan: a checked, printable Plan from a model, a method and targets; changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from lorary.errors import Diagnostic, MethodError, PlanError, deduplicated, suggestion
from lorary.layers.kinds import site
from lorary.model._full_parameters import full_parameters, parameters_by_pattern
from lorary.model.ambient import mode_independent
from lorary.model.buffers import frozen_statistics, has_statistics
from lorary.model.checks import bad_arguments, not_a_module, not_ready
from lorary.model.layer_ranges import Layers, choose_layers
from lorary.model.patterns import EXPRESSION, expression_problems, matches
from lorary.model.plan import FullParameter, Plan, human_bytes
from lorary.model.previous_tasks import PreviousAdapter, with_previous_tasks
from lorary.model.quantize import already_quantized, quantizable_layers
from lorary.model.reach.proof import Reach, proved
from lorary.model.scan import Scan, scan
from lorary.model.targets import TargetMatch, abbreviated, as_list, resolve, target_notes
from lorary.spec.interfaces import Storage
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite, with_rank


@mode_independent
def plan(
    model: nn.Module,
    method: Method,
    targets: str | Sequence[str] | None = None,
    *,
    ranks: Mapping[str, int] | None = None,
    alphas: Mapping[str, float] | None = None,
    exclude: str | Sequence[str] = (),
    layers: Layers | None = None,
    after: Sequence[PreviousAdapter] = (),
    example: Any = None,
) -> Plan:
    """The plan of a method for a model: where adapters sit, and what that costs. Works on the meta device.

    A dry forward of a copy without values shows which layers the model calls. Presets leave out layers whose weight
    it reads without calling them, because an adapter there would have no effect; named ones are refused.

    Args:
        model: any module; a Transformers model's output head is left out of `all-linear`.
        method: from `lorary.method`.
        targets: presets (`all-linear`, `attention`, `attention-qv`, `mlp`, `embedding`, `conv`), whole-component
            names (`q_proj`), globs (`*.layers.1?.*`), projections of fused weights (`c_attn[q,v]`), or `re:` and a
            regular expression for the whole path. None: the method's default, which is `all-linear` for most.
        ranks: site pattern -> rank; the first pattern that matches wins.
        alphas: site pattern -> alpha, likewise.
        exclude: layers not to adapt, written like targets.
        layers: indices of the blocks to adapt, such as `"0-15"`, `[0, 1, -1]`, or stack -> indices where a model has
            several stacks, `{"decoder.block": "0-3"}`; see `lorary.model.layer_ranges`.
        after: the adapters of earlier tasks, which the new one keeps as they are (O-LoRA).
        example: the inputs of the dry forward: a tensor, a tuple of positional or a dict of named arguments. Only
            shapes and dtypes matter. None: made from a Transformers model's configuration; without one the first
            training forward after `attach` shows whether every site runs.

    Raises:
        PlanError: every problem at once, with the nearest names and the model's layers if a target matches none.
    """
    scanned = _scan_if_ready(model, method, ranks, alphas)
    model = scanned.model
    scanned, reach = proved(scanned, example) if method.delta is not None else (scanned, Reach())
    method, problems = _fit_context(model, method)
    if example is not None and not reach.complete and reach.error.startswith("TypeError"):
        problems.append(Diagnostic("example", f"the model does not take it: {reach.error}", "pass a forward's inputs"))
    targets = default_targets(method) if targets is None else targets
    sites, unplaced, left_out = _adapted_sites(scanned, method, targets, exclude, layers, ranks or {}, alphas or {})
    sites, fixed, previous = with_previous_tasks(model, sites, after)
    full, untrainable = full_parameters(scanned, method, sites)
    quantized = quantizable_layers(scanned, method.storage, {f.name for f in full})
    problems += [*unplaced, *previous, *untrainable, *(problem for p in sites for problem in p.problems())]
    problems += _storage_problems(scanned, method.storage, sites, quantized)
    if problems:
        raise PlanError("invalid plan:", problems)
    total, size = _planned_size(scanned, method.storage, quantized)
    names = [p.site.name for p in sites]
    notes = [*target_notes(scanned, targets, exclude, names), *reach.notes(names)] if method.delta else []
    notes += left_out
    notes += _notes(scanned, method, sites, full, quantized)
    if "all-linear" in as_list(targets):
        notes += _unreached_notes(scanned, total)
    unproved = tuple(name for name in names if name not in reach.ran)
    return Plan(method, tuple(sites), tuple(full), total, size, tuple(notes), fixed, tuple(quantized), unproved)


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
    layers: Layers | None,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
) -> tuple[list[AdaptedSite], list[Diagnostic], list[str]]:
    """The adapted sites, each with its own rank and alpha, every problem with them, and notes."""
    if method.delta is None:  # targets have a default, so only explicit arguments can be wrong
        given = {"ranks": ranks, "alphas": alphas, "exclude": exclude, "layers": layers is not None}
        what = "has no effect: this method adapts no layer"
        return [], [Diagnostic(field, what) for field, value in given.items() if value], []
    patterns = {"targets": as_list(targets), "exclude": as_list(exclude), "ranks": ranks, "alphas": alphas}
    expressions = any(str(p).startswith(EXPRESSION) for listed in patterns.values() for p in listed)
    if expressions and (invalid := expression_problems(patterns, scanned.modules)):
        return [], invalid, []
    found, problems = resolve(scanned, targets, exclude)
    notes: list[str] = []
    if layers is not None:
        choice = choose_layers(scanned, [f.name for f in found], layers, as_list(targets))
        found = [f for f in found if f.name in choice.kept]
        problems, notes = [*problems, *choice.problems], choice.notes
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
    return sites, problems, notes


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
    dense, stored = _quantized_size(scanned, storage, quantized)
    return total, size - dense + stored


# --- notes: hints that are worth reading before training, but not errors ----------------------------------------------


def _notes(
    scan: Scan, method: Method, sites: Sequence[AdaptedSite], full: Sequence[FullParameter], quantized: Sequence[str]
) -> list[str]:
    """The notes of a plan, except for the weights that its targets cannot reach (`_unreached_notes`)."""
    return [
        *_rank_notes(sites),
        *_tie_notes(scan, sites),
        *_head_notes(scan, method, full),
        *_precision_notes(full),
        *_statistics_notes(scan, full),
        *_storage_notes(scan, sites, method.storage, quantized),
        *(method.context.notes(scan.model) if method.context else []),
    ]


def _unreached_notes(scan: Scan, total: int) -> list[str]:
    """Matrices that targets cannot reach: fused experts, nn.MultiheadAttention and other weights outside of layers."""
    unreached = {
        name: parameter.numel()
        for path, m in scan.modules.items()
        if m.why_not_adaptable is not None
        for name, parameter in m.module.named_parameters(path, recurse=False)
        if parameter.dim() > 1 and parameter.numel() > total / 100
    }
    return _note(f"no adapter reaches {{}} ({sum(unreached.values()) / total:.0%} of the model)", unreached)


def _quantized_size(scan: Scan, storage: Storage, quantized: Sequence[str]) -> tuple[int, int]:
    """The bytes of these layers' weights now, and once they are quantised."""
    weights = [scan.parameter(f"{path}.weight") for path in quantized]
    dense = sum(W.numel() * W.element_size() for W in weights)
    return dense, sum(storage.bytes(W.numel(), W.element_size()) for W in weights)


def _note(text: str, paths: Iterable[str]) -> list[str]:
    """The text with the paths in place of `{}`; nothing if there are none."""
    names = abbreviated(paths)
    return [text.format(names)] if names else []


def _rank_notes(sites: Sequence[AdaptedSite]) -> list[str]:
    """Sites whose two factors are larger than the matrix itself."""
    wasteful = [
        p.site.name
        for p in sites
        if p.r * (p.site.out_features + p.site.in_features) > p.site.out_features * p.site.in_features
    ]
    return _note("the factors are larger than the weight itself at {}: a lower rank loses nothing", wasteful)


def _tie_notes(scan: Scan, sites: Sequence[AdaptedSite]) -> list[str]:
    """Adapted weights that other layers hold too: an adapter acts on one use, which gets its own copy when merged."""
    return [
        f"{p.site.name} shares its weight with {', '.join(others)}: the adapter acts on {p.site.name} alone, "
        "and merging gives it a weight of its own"
        for p in sites
        if (others := scan.modules[p.site.name].tied_to)
    ]


def _head_notes(scan: Scan, method: Method, full: Sequence[FullParameter]) -> list[str]:
    asked = set().union(*parameters_by_pattern(scan, method).values())
    heads = [f.name for f in full if f.name not in asked and f.name not in scan.buffers]
    return [f"the new head trains in full: {', '.join(heads)}"] if heads else []


def _precision_notes(full: Sequence[FullParameter]) -> list[str]:
    """Base parameters that train in 16 bits, where small steps are rounded away."""
    coarse = [f.name for f in full if f.trains and f.bytes < 4 * f.size]
    return _note("{} would train in 16 bits, where small steps are rounded away: load the base in float32", coarse)


def _statistics_notes(scan: Scan, full: Sequence[FullParameter]) -> list[str]:
    """The layers with running statistics: frozen ones evaluate, and others train theirs."""
    modules = {path: m.module for path, m in scan.modules.items()}
    frozen = frozen_statistics(modules, {f.name for f in full})
    moving = [path for path, module in modules.items() if has_statistics(module) and path not in frozen]
    return [
        *_note("the running statistics of {} are frozen, also in `model.train()`", frozen),
        *_note("the running statistics of {} train, and are saved with the adapter", moving),
    ]


def _storage_notes(scan: Scan, sites: Sequence[AdaptedSite], storage: Storage, quantized: Sequence[str]) -> list[str]:
    """How many layers are quantised, and the adapted ones that are not."""
    if storage.writable:
        return []
    name, notes = type(storage).__name__, []
    if quantized:
        dense, stored = map(human_bytes, _quantized_size(scan, storage, quantized))
        notes.append(f"{name} quantises {len(quantized)} layers, in {stored} instead of {dense}")
    kept = [p.site.name for p in sites if p.site.name not in set(quantized) and not scan.is_quantised(p.site.name)]
    return notes + _note(f"{{}} stays dense: {name} quantises linear layers that are not tied", kept)
