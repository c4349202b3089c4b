"""scan: one walk over a model's module tree, as a value that answers whatever planning asks about the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lorary.layers.kinds import KINDS, kind_of, why_not_adaptable
from lorary.layers.other_quantizers import stored
from lorary.layers.quantized_weight import is_quantized, is_unrecognised_quantized, stored_tensors


@dataclass(frozen=True, eq=False)
class ScannedModule:
    """A module of a model, and what can be done with it.

    Args:
        path: its path; the first one of a module that has several.
        module: the module itself.
        kind: the layer kind (`linear`, `conv2d`, ...); None for a module without a weight matrix.
        quantised: whether its weight is stored in another form than the layer's own.
        unrecognised: whether it looks like a quantised layer of a class that is not registered.
        why_not_adaptable: why no adapter can sit here; None where one can.
        paths: every path, more than one for a shared module.
        tied_to: the names under which other modules hold its weight.
    """

    path: str
    module: nn.Module = field(repr=False)
    kind: str | None
    quantised: bool
    unrecognised: bool
    why_not_adaptable: str | None
    paths: tuple[str, ...]
    tied_to: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Scan:
    """A model's modules and base parameters, each once, in the model's order. It holds them: drop it to free memory.

    Args:
        model: the model.
        modules: first path -> module; the model itself is under the empty path.
        parameters: first name -> base parameter.
        names: every name of a base parameter -> its first one; tied parameters have several.
        heads: paths of the modules that turn hidden states into answers: the language-model head, or everything
            outside of the base model.
    """

    model: nn.Module = field(repr=False)
    modules: Mapping[str, ScannedModule] = field(repr=False)
    parameters: Mapping[str, nn.Parameter] = field(repr=False)
    names: Mapping[str, str] = field(repr=False)
    heads: frozenset[str]

    def module(self, path: str) -> nn.Module | None:
        """The module whose first path this is, or None."""
        return self.modules[path].module if path in self.modules else None

    def parameter(self, name: str) -> nn.Parameter:
        """The base parameter of this name, any of those that it has."""
        return self.parameters[self.names[name]]

    def is_quantised(self, path: str) -> bool:
        """Whether the module at this path is a quantised layer."""
        return path in self.modules and self.modules[path].quantised

    @property
    def layers(self) -> dict[str, ScannedModule]:
        """path -> module of a known kind."""
        return {path: m for path, m in self.modules.items() if m.kind is not None}

    def sizes(self) -> tuple[int, int]:
        """(numbers, bytes) of the base; tied parameters count once, a quantised weight as the dense one's numbers."""
        # by their first tensor: two layers may hold the same quantised weight
        quantised = {id(stored_tensors(m.module)[0]): m for m in self.modules.values() if m.quantised}.values()
        theirs = {id(t) for m in quantised for t in stored_tensors(m.module)}
        plain = [p for p in self.parameters.values() if id(p) not in theirs]
        numbers = sum(p.numel() for p in plain) + sum(math.prod(KINDS[str(m.kind)].size(m.module)) for m in quantised)
        return numbers, sum(p.numel() * p.element_size() for p in plain) + sum(stored(m.module) for m in quantised)


def scan(model: nn.Module) -> Scan:
    """The scan of a model: one walk over its module tree, which touches nothing and works on the meta device."""
    paths: dict[nn.Module, list[str]] = {}  # in the model's order
    first: dict[int, str] = {}  # id of a parameter -> its first name
    names: dict[str, str] = {}
    parameters: dict[str, nn.Parameter] = {}
    holders: dict[int, dict[str, nn.Module]] = {}  # id of a parameter -> its name in each module that holds it
    for path, module in model.named_modules(remove_duplicate=False):
        known = paths.setdefault(module, [])
        known.append(path)
        for name, parameter in module.named_parameters(path, recurse=False, remove_duplicate=False):
            names[name] = first.setdefault(id(parameter), name)
            parameters.setdefault(names[name], parameter)
            if len(known) == 1:
                holders.setdefault(id(parameter), {})[name] = module
    modules: dict[str, ScannedModule] = {}
    for module, known in paths.items():
        parent = modules.get(known[0].rpartition(".")[0]) if known[0] else None
        holding = holders.get(id(module._parameters.get("weight")), {})  # a quantised layer may have no parameter
        modules[known[0]] = ScannedModule(
            path=known[0],
            module=module,
            kind=kind_of(module),
            quantised=is_quantized(module),
            unrecognised=is_unrecognised_quantized(module),
            why_not_adaptable=why_not_adaptable(module) or _bypassed_by(parent),
            paths=tuple(known),
            tied_to=tuple(name for name, holder in holding.items() if holder is not module),
        )
    return Scan(model, modules, parameters, names, _heads(model, modules))


def _bypassed_by(parent: ScannedModule | None) -> str | None:
    """Why an adapter would have no effect: the parent reads the layer's weight past its forward."""
    if parent is not None and isinstance(parent.module, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weight and never calls it: an adapter there would do nothing"
    if parent is not None and isinstance(parent.module, nn.TransformerEncoderLayer):
        return "nn.TransformerEncoderLayer reads its weight when it evaluates: an adapter would act in training only"
    return None


def _heads(model: Any, modules: Mapping[str, ScannedModule]) -> frozenset[str]:
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    heads = {path for path, m in modules.items() if output is not None and m.module is output}
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and isinstance(getattr(model, prefix, None), nn.Module):
        heads |= {path for path in modules if path and path != prefix and not path.startswith(f"{prefix}.")}
    return frozenset(heads)
