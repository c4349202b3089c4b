"""The dense weight of any layer, plain or quantised, and the registry of quantised layer classes.

A quantised layer, of lorary or of another library, is registered with the function that dequantises it:

    @register_quantized("linear", "some_library.layers.QuantLinear")
    def dense(layer): return layer.dequantize_weight()

A class may be given by name, so that its library need not be imported. For plain layers that hold a tensor subclass,
register that class: `@register_quantized("weight", "some_library.QuantTensor")`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from lorary.kernels.torch_internals import HOOKS, parameters_of


class QuantizedLayerSpec(NamedTuple):
    """The registration of a quantised layer class.

    Args:
        kind: the equivalent plain layer, `linear` or `embedding`; or `weight` for the class of a plain layer's weight.
        dense: layer -> its dequantised weight in the plain layer's layout, a new tensor at each call.
    """

    kind: str
    dense: Callable[[Any], Tensor]


_REGISTRY: dict[type | str, QuantizedLayerSpec] = {}
Dense = TypeVar("Dense", bound=Callable[[Any], Tensor])
_PLAIN = (Tensor, nn.Parameter, nn.parameter.Buffer)


def register_quantized(kind: str, *classes: type | str) -> Callable[[Dense], Dense]:
    """Decorator that registers how to dequantise the layers of these classes.

    Args:
        kind: `linear` (with `in_features` and `out_features`) or `embedding` (with `num_embeddings` and
            `embedding_dim`); or `weight` for tensor classes that nn.Linear and nn.Embedding hold.
        classes: classes or their names, `module.Class`; subclasses are included.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in ("linear", "embedding", "weight", "experts"):  # lorary's own alone are of experts
        raise ValueError(f"{kind!r} is not a kind of quantised layer: use linear, embedding or weight")

    def register(dense: Dense) -> Dense:
        for cls in classes:
            _REGISTRY[cls] = QuantizedLayerSpec(kind, dense)
        return dense

    return register


def quantized_spec(layer: object) -> QuantizedLayerSpec | None:
    """The registration of a quantised layer; None for a plain one."""
    spec = _registered(type(layer))
    if spec is None and isinstance(layer, nn.Module):
        weight = parameters_of(layer).get("weight")
        spec = None if weight is None or type(weight) in _PLAIN else _registered(type(weight))
    return spec


def _registered(cls: type) -> QuantizedLayerSpec | None:
    for parent in cls.__mro__:
        if parent in _REGISTRY:
            return _REGISTRY[parent]
        if spec := _REGISTRY.get(f"{parent.__module__}.{parent.__qualname__}"):
            return spec
        if parent.__module__ == "torch.nn.modules.module":
            break
    return None


def is_quantized(layer: object) -> bool:
    """Whether a layer stores its weight in quantised form."""
    return quantized_spec(layer) is not None


def is_foreign(layer: object) -> bool:
    """Whether a layer was quantised by another library."""
    return is_quantized(layer) and not type(layer).__module__.startswith("lorary.")


def weight(layer: nn.Module) -> Tensor:
    """The dense weight of a layer in the plain layer's layout; dequantised into a new tensor for a quantised layer."""
    spec = quantized_spec(layer)
    if spec is None:
        return cast(Tensor, layer.weight)
    with torch.no_grad():
        return spec.dense(layer).detach()


def swap_hooks(one: nn.Module, other: nn.Module) -> None:
    """Exchange the hooks of two modules, so that those of a layer act on what takes its place.

    The dictionaries themselves change hands: handles that users hold still remove their hooks.
    """
    for name in HOOKS:
        vars(one)[name], vars(other)[name] = vars(other)[name], vars(one)[name]


def take_place_of(layer: nn.Module, replacement: nn.Module) -> nn.Module:
    """The replacement of a layer, with the layer's mode and its hooks, which can still be removed."""
    for name in HOOKS:
        setattr(replacement, name, getattr(layer, name))
    return replacement.train(layer.training)


def stored_tensors(layer: nn.Module) -> list[Tensor]:
    """The tensors that store a layer's weight: one, or the codes and scales of a quantised one."""
    if not is_quantized(layer):
        return [cast(Tensor, layer.weight)]
    named = [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
    return [tensor for name, tensor in named if name != "bias"]


def compute_dtype(layer: nn.Module, base: nn.Module) -> torch.dtype:
    """The precision in which a layer computes: that of its weight, or of the base if it is quantised."""
    dtype = getattr(layer, "dtype", None) if is_quantized(layer) else stored_tensors(layer)[0].dtype
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1:
        return dtype
    wide = (p.dtype for p in base.parameters() if p.is_floating_point() and p.dtype.itemsize > 1)
    return next(wide, torch.get_default_dtype())


def weight_by_forward(layer: Any, rows: int = 256) -> Tensor:
    """The dense weight [out, in] of a linear layer, from its output for the identity matrix, less its bias.

    For quantised layers without another way: `register_quantized("linear", "library.QuantLinear")(weight_by_forward)`.
    Exact if the layer multiplies by its weight unrounded, also if it rounds its input: zeros and ones are exact.

    Args:
        layer: with `in_features` and `out_features`, on a device that it runs on.
        rows: of the identity at a time.
    """
    tensors = [*layer.parameters(), *layer.buffers()]
    wide = (t.dtype for t in tensors if t.is_floating_point() and t.dtype.itemsize > 1)
    dtype = next(wide, torch.get_default_dtype())
    zero = torch.zeros(1, layer.in_features, dtype=dtype, device=tensors[0].device)
    columns = []
    with torch.enable_grad():  # without gradients some layers repack their weight for good
        b = layer(zero.clone().requires_grad_()).detach()
        for first in range(0, layer.in_features, rows):
            eye = zero.repeat(min(rows, layer.in_features - first), 1)
            eye[:, first : first + len(eye)].fill_diagonal_(1)
            columns.append((layer(eye.requires_grad_()).detach() - b).T)
    return torch.cat(columns, 1)


def is_unrecognised_quantized(layer: nn.Module) -> bool:
    """Whether this looks like a quantised linear layer of an unregistered class."""
    sizes = [getattr(layer, name, None) for name in ("in_features", "out_features")]
    if is_quantized(layer) or not all(type(n) is int for n in sizes) or any(True for _ in layer.children()):
        return False
    tensors = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    if any(nn.parameter.is_lazy(t) for t in tensors):
        return False
    numbers = math.prod(cast("list[int]", sizes))
    wide = [t for t in tensors if t.is_floating_point() and t.dtype.itemsize > 1]
    return len(wide) < len(tensors) and all(t.numel() != numbers for t in wide)


def unrecognised_quantized_layer(layer: nn.Module) -> str:
    """The error message for a quantised layer of an unregistered class."""
    here, name = __name__, f"{type(layer).__module__}.{type(layer).__qualname__}"
    return (
        f"{type(layer).__name__} stores its weight in a quantised form that lorary does not know; register it: "
        f'{here}.register_quantized("linear", "{name}")(dense), where dense(layer) returns the dense weight; '
        f"{here}.weight_by_forward works for any linear layer"
    )
