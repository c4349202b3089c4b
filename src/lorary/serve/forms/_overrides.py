"""Parameters that an adapter has trained in full, by the module that computes with them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import cast

from torch import Tensor, nn

from lorary.errors import Diagnostic
from lorary.kernels.torch_internals import buffers_of, children_of
from lorary.layers.adapted import base_parameters
from lorary.layers.quantized_weight import is_quantized
from lorary.model.reach.bypass import Bypass, bypasses

ByModule = dict[str, dict[str, Tensor]]  # path of a module -> its parameter -> value

_EXPERT = re.compile(r"(^|\.)experts\.\d+(\.|$)")
_REPLICA = "merge it into a copy of the base, and serve that"


def trained_values(
    full: Mapping[str, Tensor], base: nn.Module, modules: Mapping[str, nn.Module]
) -> tuple[ByModule, list[Diagnostic]]:
    """The values of an adapter's trained parameters, and the reasons why some cannot be used for single rows.

    A tied parameter acts in every module that holds it. Values have the dtype of the base's, and are on the CPU.

    Args:
        full: base parameter or buffer -> value.
        base: the base.
        modules: of the base, by path.
    """
    found: ByModule = {}
    problems = []
    bypassed = bypasses(modules.values()) if full else {}
    for name, path, own, held in _places(full, base, modules):
        problems += _why_not_by_row(name, path, own, modules[path], bypassed.get(modules[path]))
        if held.is_floating_point():  # a batch norm's counter has no effect in evaluation
            found.setdefault(path, {})[own] = full[name].detach().to("cpu", held.dtype)
    return found, problems


def _places(
    full: Mapping[str, Tensor], base: nn.Module, modules: Mapping[str, nn.Module]
) -> Iterator[tuple[str, str, str, Tensor]]:
    """(name, path of a module that holds it, its name there, its value in the base) of each trained parameter."""
    if not full:
        return
    parameters = list(base_parameters(base))
    by_name = dict(parameters)
    holders: dict[int, list[str]] = {}
    for place, parameter in parameters:
        holders.setdefault(id(parameter), []).append(place)
    for name in full:
        for place in holders[id(by_name[name])] if name in by_name else [name]:
            path, _, own = place.rpartition(".")
            held = by_name[name] if name in by_name else buffers_of(modules[path])[own]
            yield name, path, own, cast(Tensor, held)


def _why_not_by_row(name: str, path: str, own: str, module: nn.Module, bypass: Bypass | None) -> list[Diagnostic]:
    """Why a module cannot compute some rows with another value of this parameter."""
    kind = type(module).__name__
    if bypass is not None:
        what = f"is read by {bypass.reader}, which computes all rows with it and does not call the {kind} for each"
        return [Diagnostic(name, what, _REPLICA)]
    if any(child is not None for child in children_of(module).values()):
        what = f"belongs to {kind}, which has layers of its own: its rows cannot be computed apart"
        return [Diagnostic(name, what, _REPLICA)]
    if is_quantized(module) and own == "weight":
        return [Diagnostic(name, "was trained in full, and the base's is quantised", "serve a base that is not")]
    _, *inputs = inspect.signature(type(module).forward).parameters
    if len(inputs) != 1:
        what = f"belongs to {kind}, whose inputs are {' and '.join(inputs) or 'none'}, and not one tensor of rows"
        return [Diagnostic(name, what, _REPLICA)]
    return foreign_rows(path)


def foreign_rows(path: str) -> list[Diagnostic]:
    """Why the rows of a module are not those of the batch."""
    if _EXPERT.search(path):
        what = "is in an expert, which gets the rows that a router sends it: whose they are is not known there"
        return [Diagnostic(path, what, _REPLICA)]
    return []
