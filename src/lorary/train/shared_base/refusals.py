"""Reasons why adapters cannot be trained together on one base, all found before anything is copied."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from lorary.errors import Diagnostic, StateError, TrainingError
from lorary.layers.wrappers import submodule
from lorary.model.checks import changeable, model_mismatches
from lorary.model.plan import Plan
from lorary.model.residual_base import not_calibrated
from lorary.model.scan import Scan, scan
from lorary.model.state import state_of
from lorary.spec.placement import rules_of
from lorary.train.shared_base.rows import ALONE, HEADLINE

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_MOST = 0.5  # share of the base that an adapter may train in full: of the rest, little would be shared


def check(model: Any, plans: Any, seeds: Any) -> None:
    """Refuse a model or plans that cannot share a forward pass.

    Raises:
        TrainingError: every reason.
    """
    try:
        problems = _model_problems(changeable(model, "train together", trains=True))
    except StateError as error:
        problems = list(error.problems)
    if not isinstance(plans, Mapping) or not plans:
        what = "are empty" if isinstance(plans, Mapping) else f"are a {type(plans).__name__}"
        problems.append(Diagnostic("plans", what, "pass a mapping: {name: lorary.plan(model, method)}"))
        raise TrainingError(HEADLINE, problems)
    problems += _seed_problems(seeds, plans)
    scanned = None if problems else scan(model)
    for name, plan in plans.items():
        if not isinstance(name, str) or not name:
            problems.append(Diagnostic("plans", f"{name!r} is not the name of an adapter"))
        elif not isinstance(plan, Plan):
            what = f"is a {type(plan).__name__}, not a Plan"
            problems.append(Diagnostic(name, what, "make one: lorary.plan(model, method)"))
        elif scanned is not None:
            problems += _mismatches(scanned, name, plan) or [
                Diagnostic(name, *why) for why in _plan_problems(scanned, plan)
            ]
            problems += [Diagnostic(name, p.what, p.fix) for p in not_calibrated(plan.sites, plan.fixed_tensors)]
    if problems:
        raise TrainingError(HEADLINE, problems)


def _model_problems(model: nn.Module) -> list[Diagnostic]:
    if state_of(model) is not None:
        return [Diagnostic("model", "has an adapter attached", "detach it first: all adapters start from the base")]
    problems = []
    if any(p.is_meta for p in model.parameters()):
        problems.append(Diagnostic("model", "is on the meta device and has no values", "load its weights first"))
    for where, p in _dropouts(model):
        what = f"drops with probability {p:g}: the adapters would get other masks together than alone"
        problems.append(Diagnostic(where, what, "set it to 0 in the model's configuration"))
        break  # the others are of the same configuration
    config = getattr(model, "config", None)
    if getattr(config, "output_router_logits", False):
        what = "its load-balancing loss is one number for the tokens of all adapters"
        problems.append(Diagnostic("model", what, "set config.output_router_logits to False"))
    return problems


def _dropouts(model: nn.Module) -> Iterator[tuple[str, float]]:
    """The active dropouts of a model: of modules, and of attributes that functional code reads."""
    for path, module in model.named_modules():
        if isinstance(module, _DROPOUTS):
            if module.p > 0:
                yield path, module.p
            continue
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float) and value > 0:
                yield f"{path}.{name}" if path else name, value


def _seed_problems(seeds: Any, plans: Mapping[Any, Any]) -> list[Diagnostic]:
    if isinstance(seeds, Mapping):
        unknown = [name for name in seeds if name not in plans]
        problems = [Diagnostic("seeds", f"{name!r} has no plan") for name in unknown]
        missing = [str(name) for name in plans if name not in seeds]
        problems += [Diagnostic("seeds", f"has none for {', '.join(missing)}")] if missing else []
    else:
        problems, seeds = [], {"": seeds}
    bad = [seed for seed in seeds.values() if type(seed) is not int]
    return problems + [Diagnostic("seeds", f"{seed!r} is not a whole number") for seed in bad]


def _mismatches(scanned: Scan, name: str, plan: Plan) -> list[Diagnostic]:
    """The differences between the model and the one that a plan was made for."""
    found = model_mismatches(scanned, plan.sites, {f.name: f.shape for f in plan.full}, plan.quantized)
    return TrainingError(HEADLINE, found).problems_of(name) if found else []


def _plan_problems(scanned: Scan, plan: Plan) -> Iterator[tuple[str, str]]:
    """(reason, fix): why an adapter cannot share the base's forward pass."""
    if plan.method.context is not None:
        name = type(plan.method.context).__name__
        yield f"{name} changes how the whole model reads, and with it the rows of the other adapters", ALONE
    if any(not scanned.is_quantised(path) for path in plan.quantized):
        storage = type(plan.method.storage).__name__
        yield (
            f"{storage} would quantise a base of its own for this adapter",
            "quantise the model first: lorary.quantize",
        )
    if dropped := sorted({s.method.dropout for s in plan.sites if s.method.dropout}):
        what = f"a dropout of {', '.join(f'{p:g}' for p in dropped)} draws its masks from one stream of random numbers"
        yield f"{what}, and together they would be others than alone", "set dropout=0"
    if experts := [s.site.name for s in plan.sites if s.site.experts]:
        yield (
            f"{experts[0]} holds the matrices of experts, whose rows a router mixes",
            "exclude the experts, or train it alone",
        )
    for rule in rules_of(plan.sites):
        if rule.writes_base:
            yield f"{type(rule).__name__} writes the weights of the base, which all adapters share", ALONE
    yield from _full_problems(scanned, plan)


def _full_problems(scanned: Scan, plan: Plan) -> Iterator[tuple[str, str]]:
    """Why base parameters cannot train in full for one adapter alone: a layer that holds them computes its rows."""
    trained = [f for f in plan.full if f.trains]
    share = sum(f.size for f in trained) / max(1, sum(map(math.prod, _shapes(scanned))))
    if share > _MOST:
        yield f"it trains {share:.0%} of the base's own numbers, of which nothing is shared", ALONE
        return
    names = list(scanned.names.values())
    for f in plan.full:
        path = f.name.rpartition(".")[0]
        if f.name not in scanned.names:
            yield f"the buffer {f.name} trains, which all adapters share", f"{ALONE}, or leave it out of `full`"
        elif names.count(scanned.names[f.name]) > 1:
            yield f"{f.name} is tied to another parameter, and trains in full", f"{ALONE}, or leave it out of `full`"
        elif any(True for _ in submodule(scanned.model, path).children()):
            what = f"{f.name} trains in full and belongs to no single layer, so that no rows are its own"
            yield what, f"{ALONE}, or leave it out of `full`"


def _shapes(scanned: Scan) -> list[tuple[int, ...]]:
    return [tuple(p.shape) for p in scanned.parameters.values()]
