"""What a plan cannot be made from: told before any layer is looked for."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lorary.errors import Problem
from lorary.record import Method
from lorary.sites import kind_of
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
