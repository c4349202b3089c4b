"""weight: the dense weight of a layer, however the layer keeps it. The seam by which packed layers are adapted.

A packed layer, of lorary or of another library, says what it stands for in one line:

    @keeps("linear", "some_library.layers.QuantLinear")
    def dense(layer): return layer.dequantise()

Its class may be named instead of given, so that nothing is imported before whoever made the model has. Where a plain
layer holds a weight of a class of its own, that class is named instead: `@keeps("weight", "some_library.QuantTensor")`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn


class QuantizedLayerSpec(NamedTuple):
    """How a class of packed layers is seen.

    Args:
        kind: the kind of plain layer that it stands for: `linear` or `embedding`; `weight` for plain layers, whatever
            their kind, that hold a weight of such a class.
        dense: layer -> its weight, in the layout of the plain layer, made anew at each call.
    """

    kind: str
    dense: Callable[[Any], Tensor]


_KEPT: dict[type | str, QuantizedLayerSpec] = {}
F_ = TypeVar("F_", bound=Callable[[Any], Tensor])
_PLAIN = (Tensor, nn.Parameter, nn.parameter.Buffer)


def register_quantized(kind: str, *classes: type | str) -> Callable[[F_], F_]:
    """Make the layers of these classes known: what kind they stand for, and how their weight is had.

    Args:
        kind: `linear` (with `in_features` and `out_features`) or `embedding` (with `num_embeddings` and
            `embedding_dim`); or `weight`, and the classes are those of tensors that nn.Linear and nn.Embedding hold.
        classes: the classes themselves, or their names, `module.Class`; a parent stands for its children.

    Raises:
        ValueError: another kind.
    """
    if kind not in ("linear", "embedding", "weight"):
        raise ValueError(f"{kind!r} is no kind of packed layer: say linear, embedding or weight")

    def register(dense: F_) -> F_:
        for cls in classes:
            _KEPT[cls] = QuantizedLayerSpec(kind, dense)
        return dense

    return register


def quantized_spec(layer: object) -> QuantizedLayerSpec | None:
    """How a packed layer is seen; None for a plain one."""
    found = _known(type(layer))
    if found is None and isinstance(layer, nn.Module):
        own = layer._parameters.get("weight")
        found = None if own is None or type(own) in _PLAIN else _known(type(own))
    return found


def _known(cls: type) -> QuantizedLayerSpec | None:
    for parent in cls.__mro__:
        if parent in _KEPT:
            return _KEPT[parent]
        if found := _KEPT.get(f"{parent.__module__}.{parent.__qualname__}"):
            return found
        if parent.__module__ == "torch.nn.modules.module":
            break
    return None


def is_quantized(layer: object) -> bool:
    """Whether a layer keeps its weight in another form than its own layout."""
    return quantized_spec(layer) is not None


def is_foreign(layer: object) -> bool:
    """Whether a layer's weight has been packed by another library."""
    return is_quantized(layer) and not type(layer).__module__.startswith("lorary.")


def weight(layer: nn.Module) -> Tensor:
    """The dense weight of a layer, in the layout of the plain layer: its own, or made anew of a packed one's."""
    how = quantized_spec(layer)
    if how is None:
        return cast(Tensor, layer.weight)
    with torch.no_grad():
        return how.dense(layer).detach()


_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
)


def in_place_of(layer: nn.Module, made: nn.Module) -> nn.Module:
    """A layer that takes the place of another: in its mode, and called with its hooks, which can still be removed."""
    for name in _HOOKS:
        setattr(made, name, getattr(layer, name))
    return made.train(layer.training)


def stored_tensors(layer: nn.Module) -> list[Tensor]:
    """The tensors in which a layer keeps its weight: one, or the codes and scales of a packed one."""
    if not is_quantized(layer):
        return [cast(Tensor, layer.weight)]
    own = [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
    return [tensor for name, tensor in own if name != "bias"]


def weight_by_forward(layer: Any, rows: int = 256) -> Tensor:
    """The weight [out, inp] of a linear layer by what it answers to the rows of the identity, less its bias.

    For packed layers that know no other way to their weight: `keeps("linear", "library.QuantLinear")(by_forward)`.
    Exact where the layer multiplies by its weight as it is; a layer that rounds its input first answers in its own
    rounding, which for rows of zeros and a one is exact, too.

    Args:
        layer: with `in_features` and `out_features`; it has been moved to where it works.
        rows: how many rows it is given at a time.
    """
    own = [*layer.parameters(), *layer.buffers()]
    dtype = next((t.dtype for t in own if t.is_floating_point() and t.dtype.itemsize > 1), torch.get_default_dtype())
    zero = torch.zeros(1, layer.in_features, dtype=dtype, device=own[0].device)
    columns = []
    with torch.enable_grad():  # some layers turn into another form, for good, where no gradient is asked for
        b = layer(zero.clone().requires_grad_()).detach()
        for first in range(0, layer.in_features, rows):
            eye = zero.repeat(min(rows, layer.in_features - first), 1)
            eye[:, first : first + len(eye)].fill_diagonal_(1)
            columns.append((layer(eye.requires_grad_()).detach() - b).T)
    return torch.cat(columns, 1)


def is_unrecognised_quantized(layer: nn.Module) -> bool:
    """Whether this looks like a packed linear layer of a class that nobody has made known."""
    sizes = [getattr(layer, name, None) for name in ("in_features", "out_features")]
    if is_quantized(layer) or not all(type(n) is int for n in sizes) or any(True for _ in layer.children()):
        return False
    own = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    if any(nn.parameter.is_lazy(t) for t in own):
        return False
    numbers = math.prod(cast("list[int]", sizes))
    dense = any(t.is_floating_point() and t.dtype.itemsize > 1 and t.numel() == numbers for t in own)
    return bool(own) and not dense and any(not t.is_floating_point() or t.dtype.itemsize == 1 for t in own)


def unrecognised_quantized_layer(layer: nn.Module) -> str:
    """What to say of a strange layer."""
    name = f"{type(layer).__module__}.{type(layer).__qualname__}"
    return (
        f"{type(layer).__name__} keeps its weight packed in a way that lorary does not know: say how it is had, "
        f'lorary.layers.quantized_weight.register_quantized("linear", "{name}")(lambda layer: ...), or (lorary.layers.quantized_weight.weight_by_forward)'
    )
