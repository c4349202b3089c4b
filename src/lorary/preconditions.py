"""What a plan cannot be made from: told before any layer is looked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lorary.errors import Problem
from lorary.record import Method
from lorary.sites import kind_of


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
    held = Counter(map(id, parameters.values()))
    problems = []
    for name in sorted(parameters.keys() & set(names)):
        weight = parameters[name]
        if weight.dtype.itemsize < 4:
            what = f"is {str(weight.dtype).removeprefix('torch.')}, and {writer} adds small changes to it"
            problems.append(Problem(name, f"{what}: rounding would lose most of them", "load the base in float32"))
        if held[id(weight)] > 1:
            what = f"is shared with another layer, and {writer} writes it"
            problems.append(Problem(name, what, "exclude the site, or untie the weights"))
    return problems
