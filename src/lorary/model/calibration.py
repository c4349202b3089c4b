"""The calibration pass: what data-driven inits read of the training data, measured on the plain model.

The statistics of all layers together would be as large as the model, or larger. They are measured for a group of
layers at a time, and each is reduced to its layer's start before the next group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from lorary.errors import Diagnostic, PlanError, StateError, not_a
from lorary.layers.kinds import KINDS
from lorary.layers.quantized_weight import is_quantized
from lorary.layers.wrappers import submodule
from lorary.model._statistics import HEADLINE, Loss, first_rows, measure, resting
from lorary.model.ambient import mode_independent
from lorary.model.checks import changeable, model_mismatches
from lorary.model.plan import Plan
from lorary.model.quantize import with_progress
from lorary.model.scan import scan
from lorary.model.state import state_of
from lorary.spec.calibration import CalibratedInit, Moments, Statistic
from lorary.spec.per_expert import measured_at
from lorary.spec.placement import AdaptedSite, with_rank

HELD_BYTES = 4 * 2**30  # of the statistics of one group of layers


@mode_independent
def calibrate(
    model: nn.Module,
    plan: Plan,
    data: Iterable[Any],
    *,
    loss: Loss | None = None,
    seed: int = 0,
    held_bytes: int = HELD_BYTES,
) -> Plan:
    """The plan with the start that its inits read from training data; the model is left as it was.

    `lorary.attach(model, plan, data=...)` does this by itself.

    Args:
        model: the plain model that was planned.
        plan: from `lorary.plan`, of a method such as `lora-ga`, `eva` or `corda`.
        data: batches; a mapping is passed by name, a list or tuple by position. The first of them are read, until there
            are as many rows as the init says.
        loss: (the model's output, the batch) -> the loss; by default the output's own `loss`.
        seed: for decompositions that draw.
        held_bytes: the statistics held at a time; with fewer, the model runs over the data more often.

    Returns:
        The plan with starts in `fixed_tensors`. EVA has moved ranks between its sites.

    Raises:
        StateError: something is attached already, or the model cannot be changed.
        PlanError: there is no data, or it does not determine a start; every reason.
    """
    inner = changeable(model, "calibrate")
    if problems := _wrong_types(plan, loss, seed, held_bytes):
        raise PlanError(HEADLINE, problems)
    if state_of(inner) is not None:
        what = "something is attached already"
        raise StateError(HEADLINE, [Diagnostic("model", what, "detach it first: a start is that of the plain model")])
    sites = [p for p in plan.sites if isinstance(p.init, CalibratedInit)]
    mismatches = model_mismatches(scan(inner), plan.sites, {f.name: f.shape for f in plan.full}, plan.quantized)
    if problems := mismatches or [*_problems(inner, sites), *_data_problems(data)]:
        raise PlanError(HEADLINE, problems)
    found: dict[str, dict[str, Tensor]] = {}
    inits = dict.fromkeys(p.init for p in sites)
    batches = first_rows(data, max(_calibrated(init).samples for init in inits))
    with resting(inner):
        for init in inits:
            mine = [p for p in sites if p.init == init]
            found |= _starts(inner, mine, first_rows(batches, _calibrated(init).samples), loss, seed, held_bytes)
    return _with_starts(plan, found)


def _calibrated(init: object) -> CalibratedInit:
    assert isinstance(init, CalibratedInit)
    return init


def _problems(model: nn.Module, sites: Sequence[AdaptedSite]) -> list[Diagnostic]:
    if not sites:
        return [Diagnostic("data", "no init of this plan reads data", "leave it out")]
    problems = []
    for p in sites:
        layer = submodule(model, p.site.name)
        if any(t.is_meta for t in layer.parameters()):
            what = "is on the meta device and has no values"
            problems.append(Diagnostic(p.site.name, what, "load its weights first"))
        elif _calibrated(p.init).reads == "gradient" and is_quantized(layer):
            what = f"its weight is quantised, and {type(p.init).__name__} reads its gradient"
            problems.append(Diagnostic(p.site.name, what, "attach to the plain base: `qlora` quantises it afterwards"))
    return problems


def _wrong_types(plan: Any, loss: Any, seed: Any, held_bytes: Any) -> list[Diagnostic]:
    problems = not_a(Plan, "a Plan", plan=plan) + not_a(Integral, "a whole number", seed=seed, held_bytes=held_bytes)
    if loss is not None and not callable(loss):
        problems.append(Diagnostic("loss", f"is a {type(loss).__name__}, not a function of the output and the batch"))
    return problems


def _data_problems(data: Any) -> list[Diagnostic]:
    if isinstance(data, Mapping | Tensor | str) or not isinstance(data, Iterable):
        what = f"is a {type(data).__name__}, not an iterable of batches"
        return [Diagnostic("data", what, "pass a list of batches, or a DataLoader")]
    return []


def _starts(
    model: nn.Module, sites: list[AdaptedSite], batches: list[Any], loss: Loss | None, seed: int, held: int
) -> dict[str, dict[str, Tensor]]:
    """site -> role -> start, of the sites of one init."""
    init = _calibrated(sites[0].init)
    found: dict[str, tuple[int, dict[str, Tensor]]] = {}
    problems: list[Diagnostic] = []
    for group in with_progress(_groups(sites, held), "calibrating"):
        statistics = measure(model, init, group, batches, loss)
        for p in group:
            try:
                found[p.site.name] = p.r, _start(model, p, statistics.pop(p.site.name), seed)
            except ValueError as error:
                problems.append(Diagnostic(p.site.name, str(error), "pass other data, or exclude the layer"))
    if problems:
        raise PlanError(HEADLINE, problems)
    return init.distributed(found)


def _start(model: nn.Module, p: AdaptedSite, statistic: Statistic | None, seed: int) -> dict[str, Tensor]:
    """role -> start of one site, on the CPU.

    Raises:
        ValueError: the data does not determine it.
    """
    layer, init = submodule(model, p.site.name), _calibrated(p.init)
    values = statistic.products if isinstance(statistic, Moments) else statistic
    what = "its weight's gradient" if init.reads == "gradient" else "its inputs"
    if statistic is None or values is None:
        raise ValueError(f"it did not run on this data, so there is nothing to read of {what}")
    if not values.isfinite().all():
        raise ValueError(f"{what} is not finite on this data" if init.reads == "gradient" else f"{what} are not finite")
    if not values.any():
        raise ValueError(f"{what} is zero on this data" if init.reads == "gradient" else f"{what} are all zero")

    def weight() -> Tensor:
        M = KINDS[p.site.kind].matrix(layer).detach()
        return M.to(torch.promote_types(M.dtype, torch.float32))

    with torch.no_grad():
        tensors = measured_at(init, statistic, weight, p.site, p.r, p.scale, p.site.generator(seed))
    return {role: tensor.cpu() for role, tensor in tensors.items()}


def _groups(sites: list[AdaptedSite], held: int) -> list[list[AdaptedSite]]:
    """The sites in groups whose statistics take at most `held` bytes, but at least one site each."""
    groups: list[list[AdaptedSite]] = []
    size = 0
    for p in sites:
        rows = p.site.out_features if _calibrated(p.init).reads == "gradient" else p.site.in_features
        own = 4 * rows * p.site.in_features * max(p.site.experts, 1)
        size += own
        if not groups or size > held:
            groups.append([])
            size = own
        groups[-1].append(p)
    return groups


def _with_starts(plan: Plan, found: Mapping[str, dict[str, Tensor]]) -> Plan:
    """The plan with these starts, and the ranks that they have."""
    sites, fixed, moved = [], dict(plan.fixed_tensors), {}
    for p in plan.sites:
        tensors = found.get(p.site.name)
        if tensors is None:
            sites.append(p)
            continue
        r = tensors["B"].shape[-1]
        moved[p.site.name] = r
        if not r:
            continue
        sites.append(p if r == p.r else dataclasses.replace(p, method=_ranked(p, r)))
        fixed[p.site.name] = {**fixed.get(p.site.name, {}), **tensors}
    if not sites:
        raise PlanError(HEADLINE, [Diagnostic("data", "no layer keeps a rank", "raise r")])
    notes = plan.notes + _rank_note(plan.sites, moved)
    return dataclasses.replace(plan, sites=tuple(sites), fixed_tensors=fixed, notes=notes)


def _ranked(p: AdaptedSite, r: int) -> Any:
    """The site's method at another rank and the same scale s, so that the adapter learns at the same rate."""
    method = with_rank(p.method, r)
    alpha, scale = p.alpha, method.scale
    return method if alpha is None or scale is None else with_rank(method, alpha=alpha * p.scale / scale(r))


def _rank_note(sites: Collection[AdaptedSite], ranks: Mapping[str, int]) -> tuple[str, ...]:
    changed = [p for p in sites if ranks.get(p.site.name, p.r) != p.r]
    if not changed:
        return ()
    none = sum(not rank for rank in ranks.values())
    without = f"; {none} of {len(ranks)} layers are left without an adapter" if none else ""
    kept = [rank for rank in ranks.values() if rank]
    return (f"{type(changed[0].init).__name__} moved ranks between layers: {min(kept)} to {max(kept)}{without}",)
