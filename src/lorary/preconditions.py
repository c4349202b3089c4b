"""What a plan cannot be made from, or attached to: told before anything changes."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lorary.errors import Problem
from lorary.placed import Placed, unlike
from lorary.record import Method
from lorary.sites import Site, kind_of, site
from lorary.weights import held, is_foreign, is_packed, weight


def not_ready(model: nn.Module) -> list[Problem]:
    """Why nothing can be planned for this model at all."""
    if not isinstance(model, nn.Module):
        return [Problem("model", f"is a {type(model).__name__}, not a torch.nn.Module")]
    if any(type(m).__name__ == "Adapted" for m in model.modules()):
        return [Problem("model", "has adapters attached", "detach them first")]
    if kind_of(model) is not None:
        return [Problem("model", f"is a single {type(model).__name__}", "put it into a module: nn.Sequential(layer)")]
    return [
        Problem(name, "has no shape before the model has seen its first input", "run the model once")
        for name, parameter in model.named_parameters()
        if isinstance(parameter, nn.parameter.UninitializedParameter)
    ]


def not_words(method: Any, ranks: Any, alphas: Any) -> list[Problem]:
    """What is not of the sort that a plan is made from."""
    problems = []
    if not isinstance(method, Method):
        what = f"is a {type(method).__name__}, not a Method"
        problems.append(Problem("method", what, 'make one: lorary.method("lora", r=16)'))
    for field, value in (("ranks", ranks), ("alphas", alphas)):
        if value is not None and not isinstance(value, Mapping):
            what = f"is {value!r}, not a mapping from site patterns to numbers"
            problems.append(Problem(field, what, f'write {field}={{"*.down_proj": 4}}'))
    return problems


def unwritable(model: nn.Module, method: Method, names: Iterable[str]) -> list[Problem]:
    """Why a rule of the method cannot write these weights: it needs 32 bits at least, and a weight that is its own."""
    writer = next((type(rule).__name__ for rule in method.rules if rule.writes_base), "a rule")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    holders = Counter(map(id, parameters.values()))
    layers = dict(model.named_modules(remove_duplicate=False))
    problems = []
    for name in sorted(set(names)):
        if is_packed(layers.get(name.rpartition(".")[0])):
            problems.append(Problem(name, f"is packed, and {writer} writes it", "load the base in float32"))
            continue
        if name not in parameters:
            continue
        W = parameters[name]
        if W.dtype.itemsize < 4:
            what = f"is {str(W.dtype).removeprefix('torch.')}, and {writer} adds small changes to it"
            problems.append(Problem(name, f"{what}: rounding would lose most of them", "load the base in float32"))
        if holders[id(W)] > 1:
            what = f"is shared with another layer, and {writer} writes it"
            problems.append(Problem(name, what, "exclude the site, or untie the weights"))
    return problems


def deaf(model: nn.Module, names: Iterable[str]) -> list[Problem]:
    """Why packed layers of other libraries cannot be trained through: some kernels let no gradient pass, silently.

    One layer of each class is asked, a copy of it, for some turn into another form by being used.
    """
    problems, asked = [], set()
    for name in names:
        layer = model.get_submodule(name)
        sort = (type(layer), type(getattr(layer, "weight", None)))
        if sort in asked or not is_foreign(layer) or kind_of(layer) != "linear" or held(layer)[0].is_meta:
            continue
        asked.add(sort)
        with contextlib.suppress(Exception), torch.enable_grad():  # what cannot run here says so when it is used
            own: Any = copy.deepcopy(layer).train()
            W = weight(layer)
            y = own(torch.zeros(1, own.in_features, dtype=W.dtype, device=W.device, requires_grad=True))
            if not y.requires_grad:
                kind = getattr(layer, "weight", layer) if type(layer) is nn.Linear else layer
                what = f"{type(kind).__name__} lets no gradient through: the layers before it could not be trained"
                problems.append(Problem(name, what, "load the base in a form that can be trained on"))
    return problems


def misfits(
    modules: Mapping[str, nn.Module],
    parameters: Mapping[str, nn.Parameter],
    placed: tuple[Placed, ...],
    full: Mapping[str, tuple[int, ...]],
) -> list[Problem]:
    """Why adapters cannot be put at these sites of a model, or these base parameters train."""
    problems = []
    for p in placed:
        problems += mismatch(p.site, modules.get(p.site.name))
    for name, shape in full.items():
        if name not in parameters:
            problems.append(Problem(name, "the model has no such parameter"))
        elif tuple(parameters[name].shape) != tuple(shape):
            problems.append(Problem(name, f"is {tuple(parameters[name].shape)}, expected {tuple(shape)}"))
    if not torch.is_inference_mode_enabled() and any(t.is_inference() for t in parameters.values()):
        what = "its weights were made in torch.inference_mode() and cannot be changed or trained with outside of it"
        problems.append(Problem("model", what, "create the model outside inference mode"))
    problems += unlike(placed)
    devices: dict[str, set[str]] = {}
    for p in placed if not problems else ():
        if p.share or p.delta.shared:
            devices.setdefault(p.share, set()).add(str(held(modules[p.site.name])[0].device))
    for several in (found for found in devices.values() if len(found) > 1):
        what = f"its layers lie on {', '.join(sorted(several))}, and what they share can lie on one only"
        problems.append(Problem("model", what, "adapt the layers of one device, or use another method"))
    return problems


def mismatch(expected: Site, layer: nn.Module | None) -> list[Problem]:
    """How a model's layer differs from the site that was planned or saved."""
    if layer is None:
        return [Problem(expected.name, "the model has no such module")]
    if kind_of(layer) is None:
        return [Problem(expected.name, f"is of class {type(layer).__name__}, expected a layer of kind {expected.kind}")]
    found = site(expected.name, layer)
    problems = []
    # a linear layer and GPT-2's transposed one are the same matrix
    if found.kind != expected.kind and {found.kind, expected.kind} != {"linear", "transposed"}:
        problems.append(Problem(expected.name, f"is {found.kind}, expected {expected.kind}"))
    for side in ("out", "inp", "groups"):
        if getattr(found, side) != getattr(expected, side):
            words = {"out": "output features", "inp": "input features", "groups": "groups"}[side]
            what = f"has {getattr(found, side)} {words}, expected {getattr(expected, side)}"
            problems.append(Problem(expected.name, what))
    if expected.window and found.window and expected.window != found.window:
        problems.append(Problem(expected.name, f"has a window of {found.window}, expected {expected.window}"))
    return problems
