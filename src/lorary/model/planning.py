"""plan: a checked, printable Plan from a model, a method and targets; changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from lorary.errors import Diagnostic, PlanError, deduplicated
from lorary.model._full_parameters import (
    full_parameters,
    has_new_head,
    head_layers,
    head_parameters,
    head_problems,
    method_with_full,
    parameters_by_pattern,
)
from lorary.model._parts import Part, Targets, several_parts
from lorary.model._placing import Wanted, adapted_sites, pattern_problems
from lorary.model.ambient import mode_independent
from lorary.model.buffers import frozen_statistics, has_statistics
from lorary.model.checks import bad_arguments, model_mismatches, not_a_module, not_ready
from lorary.model.layer_ranges import Layers
from lorary.model.plan import FullParameter, Plan, human_bytes
from lorary.model.previous_tasks import PreviousAdapter, TrainedAdapter, with_previous_tasks
from lorary.model.quantize import already_quantized, quantizable_layers
from lorary.model.reach.proof import Reach, proved
from lorary.model.scan import Scan, scan
from lorary.model.targets import abbreviated, as_list, target_notes
from lorary.model.towers import towers
from lorary.spec.calibration import CalibratedInit
from lorary.spec.context import Context
from lorary.spec.interfaces import Storage
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite, joins_of


@mode_independent
def plan(
    model: nn.Module,
    method: Method | Mapping[Targets, Method],
    targets: str | Sequence[str] | None = None,
    *,
    ranks: Mapping[str, int] | None = None,
    alphas: Mapping[str, float] | None = None,
    exclude: str | Sequence[str] = (),
    layers: Layers | None = None,
    experts: str = "each",
    after: Sequence[PreviousAdapter] = (),
    example: Any = None,
    full: str | Sequence[str] = (),
    head: str | None = None,
) -> Plan:
    """The plan of a method for a model: where adapters sit, and what that costs. Works on the meta device.

    A dry forward of a copy without values shows which layers the model calls. Presets leave out layers whose weight
    it reads without calling them, because an adapter there would have no effect; named ones are refused.

    Args:
        model: any module; a Transformers model's output head is left out of `all-linear`.
        method: from `lorary.method`; or several, each under its targets: `{"attention": lora, "mlp": vera}`. Their
            storage, context and parameters in full are the model's: one says them, or all say the same.
        targets: presets (`all-linear`, `attention`, `attention-qv`, `attention-kv`, `attention-output`, `mlp`,
            `mlp-output`, `embedding`, `vocabulary`, `conv`; of a multimodal model `language`, `vision`, `audio`,
            `projector`), whole-component names (`q_proj`), globs (`*.layers.1?.*`), projections of fused weights
            (`c_attn[q,v]`), or `re:` and a regular expression for the whole path. None: the method's default,
            `all-linear` for most.
        ranks: site pattern -> rank; the first pattern that matches wins.
        alphas: site pattern -> alpha, likewise.
        exclude: layers not to adapt, written like targets.
        layers: indices of the blocks to adapt, such as `"0-15"`, `[0, 1, -1]`, or stack -> indices where a model has
            several stacks, `{"decoder.block": "0-3"}`; see `lorary.model.layer_ranges`.
        experts: of a block: `each` has an adapter of its own, or all of them have one together (`shared`).
        after: the adapters of earlier tasks, which the new one keeps as they are (O-LoRA).
        example: the inputs of the dry forward: a tensor, a tuple of positional or a dict of named arguments. Only
            shapes and dtypes matter. None: made from a Transformers model's configuration; without one the first
            training forward after `attach` shows whether every site runs.

    Raises:
        PlanError: every problem at once, with the nearest names and the model's layers if a target matches none.
    """
    parts = several_parts(method, targets) if isinstance(method, Mapping) else [Part(method, targets)]
    method = parts[0].method
    scanned = _scan_if_ready(model, method, ranks, alphas)
    model = scanned.model
    scanned, reach = proved(scanned, example) if method.delta is not None else (scanned, Reach())
    context, problems = _fit_context(model, method)
    parts = [Part(method_with_full(m.replace(context=context), as_list(full)), named) for m, named in parts]
    parts = [Part(m, default_targets(m) if named is None else named) for m, named in parts]
    wanted = Wanted(ranks or {}, alphas or {}, exclude, layers, experts)
    if invalid := pattern_problems(scanned, parts, wanted):
        raise PlanError("invalid plan:", [*problems, *invalid])
    problems += head_problems(scanned, method, head)
    adapted_head = head_layers(scanned) if head == "lora" else ()
    if adapted_head:
        parts[0] = Part(parts[0].method, [*as_list(parts[0].targets), *adapted_head])
    method = parts[0].method
    if example is not None and not reach.complete and reach.error.startswith("TypeError"):
        problems.append(Diagnostic("example", f"the model does not take it: {reach.error}", "pass a forward's inputs"))
    targets = [entry for part in parts for entry in as_list(part.targets)]
    sites, unplaced, left_out = adapted_sites(scanned, parts, wanted, adapted_head)
    sites, fixed, previous = with_previous_tasks(model, sites, after)
    trained, untrainable = full_parameters(scanned, method, sites, head)
    quantized = quantizable_layers(scanned, method.storage, {f.name for f in trained})
    problems += [*unplaced, *previous, *untrainable, *(problem for p in sites for problem in p.problems())]
    problems += _storage_problems(scanned, method.storage, sites, quantized)
    if context is not None and not problems:
        problems += [Diagnostic("targets", *why) for why in context.site_problems(model, joins_of(sites))]
    if problems:
        raise PlanError("invalid plan:", problems)
    total, size = _planned_size(scanned, method.storage, quantized)
    names = [p.site.name for p in sites]
    notes = [*target_notes(scanned, targets, exclude, names), *reach.notes(names)] if method.delta else []
    notes += left_out
    notes += _notes(scanned, method, sites, trained, quantized)
    if "all-linear" in as_list(targets):
        notes += _unreached_notes(scanned, total)
    unproved = tuple(name for name in names if name not in reach.ran)
    left = (fixed, tuple(quantized), unproved, towers(scanned, sites))
    return Plan(method, tuple(sites), tuple(trained), total, size, tuple(notes), *left)


@mode_independent
def plan_of_adapter(model: nn.Module, adapter: TrainedAdapter) -> Plan:
    """The plan under which a trained adapter goes on training on a model; works on the meta device.

    Args:
        model: the base, without adapters.
        adapter: its method, sites and parameters trained in full are the plan's.

    Raises:
        PlanError: the model is not ready, or other than the adapter's base; every reason.
    """
    scanned = _scan_if_ready(model, adapter.method, None, None)
    shapes = {name: tuple(t.shape) for name, t in adapter.full.items()}
    sites, adapted = tuple(adapter.sites), {p.site.weight_name for p in adapter.sites}
    if problems := model_mismatches(scanned, sites, shapes, ()):
        raise PlanError("the adapter does not fit this model:", problems)
    full = []
    for name, shape in shapes.items():
        t = scanned.tensor(name)
        full.append(FullParameter(name, shape, t.numel() * t.element_size(), name in scanned.names.keys() - adapted))
    storage = adapter.method.storage
    quantized = quantizable_layers(scanned, storage, set(shapes))
    if problems := _storage_problems(scanned, storage, list(sites), quantized):
        raise PlanError("invalid plan:", problems)
    total, size = _planned_size(scanned, storage, quantized)
    notes = _notes(scanned, adapter.method, sites, full, quantized)
    return Plan(adapter.method, sites, tuple(full), total, size, tuple(notes), {}, tuple(quantized))


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


def _fit_context(model: nn.Module, method: Method) -> tuple[Context | None, list[Diagnostic]]:
    """The method's context computed for this model, and why the model does not allow it."""
    if method.context is None:
        return None, []
    context = method.context.planned(model)
    return context, [Diagnostic("context", *why) for why in context.problems(model)]


def default_targets(method: Method) -> tuple[str, ...]:
    """The default targets of a method: its join's, or its context's."""
    if method.join is not None and method.join.targets:
        return method.join.targets
    return ("all-linear",) if method.context is None else tuple(method.context.targets)


def has_common_targets(method: Method) -> bool:
    """Whether a method adapts the layers that the user chooses, rather than places of its own."""
    return method.delta is not None and default_targets(method) == ("all-linear",)


def _storage_problems(
    scanned: Scan, storage: Storage, sites: list[AdaptedSite], quantized: list[str]
) -> list[Diagnostic]:
    """Why the base cannot be stored as the method says, or an init cannot decompose its weights."""
    late = [p for p in sites if p.init.residual_init and scanned.is_quantised(p.site.name)]
    problems = deduplicated(already_quantized(p.site.name, p.init) for p in late)
    for p in sites:
        if p.init.starts_at_error and p not in late and p.site.name not in quantized:
            what = f"stays as it is, and {type(p.init).__name__} starts at the quantisation error"
            problems.append(Diagnostic(p.site.name, what, "exclude it: linear layers that are not tied are quantised"))
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
        *_calibration_notes(sites),
        *_tie_notes(scan, sites),
        *_head_notes(scan, method, full),
        *_precision_notes(full),
        *_statistics_notes(scan, full),
        *_storage_notes(scan, sites, method.storage, quantized),
        *(method.context.notes(scan.model) if method.context else []),
    ]


def _unreached_notes(scan: Scan, total: int) -> list[str]:
    """Matrices that targets cannot reach: experts of unknown classes, and other weights outside of layers."""
    reached = {path for path, m in scan.layers.items() if m.why_not_adaptable is None}  # parameters that are layers too
    unreached = {
        name: parameter.numel()
        for path, m in scan.modules.items()
        if m.why_not_adaptable is not None
        for name, parameter in m.module.named_parameters(path, recurse=False)
        if name not in reached and parameter.dim() > 1 and parameter.numel() > total / 100
    }
    return _note(f"no adapter reaches {{}} ({sum(unreached.values()) / total:.0%} of the model)", unreached)


def _quantized_size(scan: Scan, storage: Storage, quantized: Sequence[str]) -> tuple[int, int]:
    """The bytes of these layers' weights now, and once they are quantised."""
    weights = [scan.parameter(scan.modules[path].weight_name) for path in quantized]
    dense = sum(W.numel() * W.element_size() for W in weights)
    return dense, sum(storage.bytes(W.numel(), W.element_size()) for W in weights)


def _note(text: str, paths: Iterable[str]) -> list[str]:
    """The text with the paths in place of `{}`; nothing if there are none."""
    names = abbreviated(paths)
    return [text.format(names)] if names else []


def _rank_notes(sites: Sequence[AdaptedSite]) -> list[str]:
    """Sites whose two factors are larger than the matrix itself."""
    wasteful = [p.site.name for p in sites if p.r * (p.site.out_features + p.site.in_features) > p.site.one.numbers]
    return _note("the factors are larger than the weight itself at {}: a lower rank loses nothing", wasteful)


def _calibration_notes(sites: Sequence[AdaptedSite]) -> list[str]:
    """The inits that read training data before the first step."""
    inits = dict.fromkeys(p.init for p in sites if isinstance(p.init, CalibratedInit))
    return [
        f"{type(init).__name__} reads the {init.reads} of {init.samples} rows of training data before the first step"
        for init in inits
    ]


def _tie_notes(scan: Scan, sites: Sequence[AdaptedSite]) -> list[str]:
    """Adapted weights that other layers hold too: an adapter acts on one use, which gets its own copy when merged."""
    together: dict[str, list[str]] = {}
    for p in sites:
        if p.join.keeps_ties and p.share:
            together.setdefault(p.share, []).append(p.site.name)
    tied = {name: names for names in together.values() for name in names}
    return [
        *(f"{' and '.join(names)} are tied: one set of tensors trains for all uses" for names in together.values()),
        *(
            f"{p.site.name} shares its weight with {', '.join(others)}: the adapter acts on {p.site.name} alone, "
            "and merging gives it a weight of its own"
            for p in sites
            if not p.join.why_not_merged
            and (others := scan.modules[p.site.name].tied_to)
            and not {other.rpartition(".")[0] for other in others} <= set(tied.get(p.site.name, ()))
        ),
    ]


def _head_notes(scan: Scan, method: Method, full: Sequence[FullParameter]) -> list[str]:
    asked = set().union(*parameters_by_pattern(scan, method).values())
    heads = [f for f in full if f.name in head_parameters(scan) - asked]
    new = "new head" if has_new_head(scan) else "head"
    trained, held = ([f.name for f in heads if f.trains is trains] for trains in (True, False))
    training = {f.name for f in full if f.trains}
    return [
        *([f"the {new} trains in full: {', '.join(trained)}"] if trained else []),
        *([f"the new head's weights under adapters are saved with them: {', '.join(held)}"] if held else []),
        *(f"{name} is {one}, tied: both train" for name, one in scan.names.items() if name != one and one in training),
    ]


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
