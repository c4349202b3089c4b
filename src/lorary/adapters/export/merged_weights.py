"""The tensors of a merged model, one at a time, from a base whose weights are still in its files."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorary.adapters.adapter import Adapter
from lorary.errors import Diagnostic, StateError
from lorary.layers.transformers_internals import exact_modules, loaded_dtype
from lorary.layers.wrappers import submodule
from lorary.model.attach import attach_tensors
from lorary.model.fingerprint import Fingerprint
from lorary.model.merge import fold
from lorary.model.quantize import dequantize, quantize_layers
from lorary.model.scan import scan
from lorary.model.state import base_parameter
from lorary.model.undo import all_or_nothing
from lorary.spec.site import PARAMETERS


class MergedWeights:
    """W' and b' of a model that is never in memory as a whole.

    Each adapted layer becomes a model of one layer, on which the adapter is attached and merged: the same rule as
    `lorary.merge` of the whole model, bit for bit.

    Args:
        adapter: the adapter.
        model: its base without values, on the meta device.
        read: a parameter of the base by its name, in the precision of loading; None if the checkpoint lacks it.
        quantized: the layers that the adapter's method quantises.
        dtype: of the merged weights.

    Attributes:
        problems: why some values cannot be written, in the order in which they were asked for.
    """

    def __init__(
        self,
        adapter: Adapter,
        model: Any,
        read: Callable[[str], Tensor | None],
        quantized: Collection[str],
        dtype: torch.dtype,
    ) -> None:
        self.adapter, self.model, self.dtype = adapter, model, dtype
        self.problems: list[Diagnostic] = []
        self._read, self._quantized = read, frozenset(quantized)
        self._sites = {adapted.site.name: adapted for adapted in adapter.sites}
        self._method = adapter.method.replace(context=None)
        self._names = scan(model).names
        self._exact = exact_modules(model)
        self._kept: dict[str, Tensor] = {}  # the bias of a layer that has been merged for its weight, or the weight

    def changes(self, name: str) -> bool:
        """Whether the merged model's tensor is more than the base's, rounded."""
        path = name.rpartition(".")[0]
        return name in self._sites or path in self._sites or path in self._quantized or self._held(name) is not None

    def value(self, name: str) -> Tensor:
        """The merged model's tensor of this name, by the first path of its module."""
        if name in self._kept:
            return self._kept.pop(name)
        if name in self._sites:  # a parameter that is a layer: fused experts, an in-projection
            return self._from_layer(name, "weight", self._merge)
        path, _, last = name.rpartition(".")
        if path in self._sites and last in ("weight", "bias"):
            return self._from_layer(path, last, self._merge)
        if path in self._quantized and last == "weight":
            return self._from_layer(path, last, self._dequantize)
        return self.rounded(name, self._base(name))

    def rounded(self, name: str, value: Tensor) -> Tensor:
        """A tensor of the base in the precision of the merged model; buffers and some modules keep their own."""
        inexact = name in self._names and not self._exact & set(name.split("."))
        if not (inexact and value.is_floating_point()):
            return value
        written = value.to(self.dtype)
        if self.dtype == torch.float16 and written.isinf().any() and not value.isinf().any():
            fix = "write bfloat16 or float32"
            self.problems.append(Diagnostic(name, "has numbers that float16 cannot hold", fix))
        return written

    def _base(self, name: str) -> Tensor:
        """The base's value of a parameter, or the adapter's if it holds it."""
        held = self._held(name)
        if held is not None:
            return held.to(loaded_dtype(self.model, name))
        return cast("Tensor", self._read(name))  # what is neither held nor read has been refused

    def _held(self, name: str) -> Tensor | None:
        """The adapter's own value of a parameter; it holds one that several modules share under the first name."""
        return self.adapter.full.get(name, self.adapter.full.get(self._names.get(name, name)))

    def _from_layer(self, path: str, last: str, merge: Callable[[nn.Module, str], None]) -> Tensor:
        """One tensor of a layer after `merge`; the other one is kept until it is asked for."""
        small = self._model_of_one_layer(path)
        merge(small, path)
        layer = submodule(small, path)
        found: dict[str, Tensor] = {
            name: t.detach() for name in ("weight", "bias") if (t := getattr(layer, name, None)) is not None
        }
        self._kept |= {f"{path}.{name}": t for name, t in found.items() if name != last}
        return found[last]

    def _model_of_one_layer(self, path: str) -> nn.Module:
        names: tuple[str, ...] = ("weight", "bias")
        if path in self._sites and self._sites[path].site.kind in PARAMETERS:
            path, _, own = path.rpartition(".")
            names = (own,)
        layer = copy.deepcopy(self.model.get_submodule(path))  # without values
        for name in names:
            if getattr(layer, name, None) is not None:
                read = self._read(f"{path}.{name}")
                value = self._base(f"{path}.{name}") if read is None else read
                setattr(layer, name, nn.Parameter(value, requires_grad=False))
        root = small = nn.Module()
        *above, own = path.split(".")
        for name in above:
            small.add_module(name, nn.Module())
            small = small.get_submodule(name)
        small.add_module(own, layer)
        return root

    def _merge(self, small: nn.Module, path: str) -> None:
        tensors = {path: self.adapter.tensors[path]}
        quantized = [path] if path in self._quantized else []
        with all_or_nothing(small) as undo:
            attach_tensors(
                small,
                self._method,
                (self._sites[path],),
                {},
                tensors,
                undo,
                fingerprint=Fingerprint(),
                quantized=quantized,
            )
        with torch.no_grad():
            for name in (f"{path}.weight", f"{path}.bias"):
                if (held := self._held(name)) is not None:
                    base_parameter(small, name).copy_(held)
        try:
            fold(small, dtype=self.dtype)
        except StateError as error:
            self.problems += error.problems

    def _dequantize(self, small: nn.Module, path: str) -> None:
        quantize_layers(small, [path], self.adapter.method.storage)
        dequantize(small, self.dtype)
