"""scan: one walk over a model's module tree, as a value that planning, attaching and quantising read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from lorary.kernels.torch_internals import children_of, parameters_of
from lorary.layers.kinds import KINDS, kind_of, why_not_adaptable
from lorary.layers.multihead_attention import OUT_PROJECTION, is_attention
from lorary.layers.other_quantizers import stored_bytes
from lorary.layers.parameters import parameter_layers
from lorary.layers.quantized_weight import is_quantized, is_unrecognised_quantized, stored_tensors
from lorary.layers.wrappers import named_modules, unwrapped
from lorary.model.buffers import persistent_buffers
from lorary.model.reach.bypass import Bypass, bypasses
from lorary.spec.site import PARAMETERS


@dataclass(frozen=True, eq=False)
class ScannedModule:
    """A module of a model, and its place there.

    Args:
        path: its path; the first one of a module that has several.
        module: the module itself.
        kind: the layer kind (`linear`, `conv2d`, ...); None for a module without a weight matrix.
        quantised: whether its weight is stored in another form than the layer's own.
        paths: every path, more than one for a shared module.
        tied_to: the names under which other modules hold its weight.
        bypass: the code that reads its weight without calling it; None if there is none.
        owner: the path of the module that computes with it without calling it, unless it is adapted: an experts module
            or an nn.MultiheadAttention; None for a layer that is called.
    """

    path: str
    module: nn.Module = field(repr=False)
    kind: str | None
    quantised: bool
    paths: tuple[str, ...]
    tied_to: tuple[str, ...]
    bypass: Bypass | None = field(default=None, repr=False)
    owner: str | None = field(default=None, repr=False)

    @property
    def weight_name(self) -> str:
        """The name of its weight in the plain model."""
        return self.path if self.kind in PARAMETERS else f"{self.path}.weight"

    @cached_property
    def unrecognised(self) -> bool:
        """Whether it looks like a quantised layer of a class that is not registered."""
        return is_unrecognised_quantized(self.module)

    @cached_property
    def why_not_adaptable(self) -> str | None:
        """Why an adapter cannot sit here; None if it can."""
        return why_not_adaptable(self.module) or (str(self.bypass) if self.bypass else None)


@dataclass(frozen=True, eq=False)
class Scan:
    """A model's modules and parameters, each once, in the model's order. It holds them: drop it to free memory.

    Args:
        model: the model.
        modules: first path -> module; the model itself is under the empty path.
        parameters: first name -> base parameter.
        names: every name of a base parameter -> its first one; tied parameters have several.
        heads: the paths of the output head: the language-model head, and everything outside of the base model.
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
        """The base parameter with this name, the first or another one."""
        return self.parameters[self.names[name]]

    @cached_property
    def buffers(self) -> dict[str, Tensor]:
        """name -> every buffer of numbers that a checkpoint holds, without those of quantised weights."""
        return persistent_buffers({path: m.module for path, m in self.modules.items()})

    def tensor(self, name: str) -> Tensor:
        """The base parameter or buffer with this name."""
        return self.parameter(name) if name in self.names else self.buffers[name]

    def is_quantised(self, path: str) -> bool:
        """Whether the module at this path is a quantised layer."""
        return path in self.modules and self.modules[path].quantised

    @property
    def layers(self) -> dict[str, ScannedModule]:
        """path -> module of a known kind."""
        return {path: m for path, m in self.modules.items() if m.kind is not None}

    def wrapped_in(self, path: str) -> ScannedModule | None:
        """The layer inside a module that wraps it alone, such as one that clips its input and output."""
        wrapper = self.modules[path]
        inside = [m for m in self._children.get(path, ()) if parameters_of(m.module) or children_of(m.module)]
        if not path or wrapper.kind is not None or parameters_of(wrapper.module) or len(inside) != 1:
            return None
        container = isinstance(wrapper.module, nn.ModuleList | nn.ModuleDict | nn.Sequential)
        return None if container or inside[0].kind is None else inside[0]

    def wrapper_of(self, path: str) -> str | None:
        """The path of the module that wraps this layer alone."""
        parent = path.rpartition(".")[0]
        inner = self.wrapped_in(parent) if parent in self.modules and self.modules[path].kind is not None else None
        return parent if inner is not None and inner.path == path else None

    @cached_property
    def _children(self) -> dict[str, list[ScannedModule]]:
        """path -> the modules in it."""
        found: dict[str, list[ScannedModule]] = {}
        for path, m in self.modules.items():
            if path:
                found.setdefault(path.rpartition(".")[0], []).append(m)
        return found

    def sizes(self) -> tuple[int, int]:
        """(numbers, bytes) of the base; see `numbers_and_bytes`."""
        return numbers_and_bytes((m.module for m in self.modules.values()), self.parameters.values())


def numbers_and_bytes(modules: Iterable[nn.Module], parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    """The size of a model; tied parameters count once, a quantised weight with the numbers of the dense one."""
    # by their first tensor: two layers may hold the same quantised weight
    quantised = {id(stored_tensors(m)[0]): m for m in modules if is_quantized(m)}.values()
    theirs = {id(t) for m in quantised for t in stored_tensors(m)}
    plain = {id(p): p for p in parameters if id(p) not in theirs}.values()
    numbers = sum(p.numel() for p in plain) + sum(math.prod(KINDS[str(kind_of(m))].size(m)) for m in quantised)
    return numbers, sum(p.numel() * p.element_size() for p in plain) + sum(map(stored_bytes, quantised))


def scan(model: nn.Module) -> Scan:
    """The scan of a model without its wrappers, on any device, also the meta device; changes nothing."""
    model = unwrapped(model)
    paths: dict[nn.Module, list[str]] = {}  # in the model's order
    first: dict[int, str] = {}  # id of a parameter -> its first name
    names: dict[str, str] = {}
    parameters: dict[str, nn.Parameter] = {}
    holders: dict[int, dict[str, nn.Module]] = {}  # id of a parameter -> its name in each module that holds it
    for path, module in named_modules(model, remove_duplicate=False):
        known = paths.setdefault(module, [])
        known.append(path)
        for name, parameter in module.named_parameters(path, recurse=False, remove_duplicate=False):
            names[name] = first.setdefault(id(parameter), name)
            parameters.setdefault(names[name], parameter)
            if len(known) == 1:
                holders.setdefault(id(parameter), {})[name] = module
    modules: dict[str, ScannedModule] = {}
    bypassed = bypasses(paths)
    for module, (path, *others) in paths.items():
        holding = holders.get(id(parameters_of(module).get("weight")), {})  # a quantised layer may have no parameter
        modules[path] = ScannedModule(
            path=path,
            module=module,
            kind=kind_of(module),
            quantised=is_quantized(module),
            paths=(path, *others),
            tied_to=tuple(name for name, holder in holding.items() if holder is not module),
            bypass=bypassed.get(module),
            owner=_attention_of(path, modules),
        )
        modules |= _parameter_layers(modules[path], names)
    return Scan(model, modules, parameters, names, _heads(model, modules))


def _attention_of(path: str, modules: Mapping[str, ScannedModule]) -> str | None:
    """The path of the nn.MultiheadAttention whose output projection is at this path."""
    above, _, name = path.rpartition(".")
    parent = modules.get(above) if name == OUT_PROJECTION else None
    return above if parent is not None and is_attention(parent.module) else None


def _parameter_layers(owner: ScannedModule, names: Mapping[str, str]) -> dict[str, ScannedModule]:
    """path -> layer of the parameters of a module that are layers of their own."""
    found = {}
    for name, layer in parameter_layers(owner.module).items():
        paths = tuple(f"{path}.{name}".lstrip(".") for path in owner.paths)
        tied = tuple(other for other, one in names.items() if one == names[paths[0]] and other not in paths)
        found[paths[0]] = ScannedModule(paths[0], layer, kind_of(layer), False, paths, tied, owner=owner.path)
    return found


def _heads(model: Any, modules: Mapping[str, ScannedModule]) -> frozenset[str]:
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    heads = {path for path, m in modules.items() if output is not None and m.module is output}
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and isinstance(getattr(model, prefix, None), nn.Module):
        heads |= {path for path in modules if path and path != prefix and not path.startswith(f"{prefix}.")}
    return frozenset(heads)
