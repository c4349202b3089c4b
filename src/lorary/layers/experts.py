"""Fused experts: the matrices of all experts of a block in one parameter [E, ., .], seen as a layer of its own.

The layout (transposed or not, gate and up concatenated or interleaved) is read from the module's class, never from a
shape: a square expert would fit either way. Transformers' decorator of experts classes says it; Llama 4's class, which
has none, is in a table. Parameters of other classes are not reached.

A plain model keeps its parameter; while the matrix is adapted or quantised, a module is in its place, and the experts
compute through Transformers' experts interface with `lorary`'s function: rows sorted by expert, one grouped product for
each matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lorary.kernels.grouped import Groups, grouped_product
from lorary.kernels.torch_internals import children_of, parameters_of
from lorary.layers.parameter_layer import ParameterLayer, place
from lorary.layers.transformers_internals import (
    EXPERTS_FUNCTION,
    apply_gate,
    expert_settings,
    register_experts_function,
    use_experts_function,
)

_GROUPS: ContextVar[Groups] = ContextVar("lorary_expert_groups")
_TRACED: list[Groups] = []


class ExpertLayout(NamedTuple):
    """The fused parameters of a class of experts modules.

    Args:
        names: of the matrices, in the order in which they are applied.
        transposed: whether a parameter is [E, in, out] instead of [E, out, in].
        interleaved: whether gate and up alternate row by row in `gate_up_proj`.
        interface: whether the module computes through Transformers' experts interface.
    """

    names: tuple[str, ...]
    transposed: bool
    interleaved: bool
    interface: bool = True


# experts classes without Transformers' decorator
_LAYOUTS = {
    "transformers.models.llama4.modeling_llama4.Llama4TextExperts": ExpertLayout(
        ("gate_up_proj", "down_proj"), transposed=True, interleaved=False, interface=False
    )
}


def layout_of(module: nn.Module) -> ExpertLayout | None:
    """The layout of a module's fused experts by its class; None for any other module."""
    cls: Any = type(module)
    if found := _listed(cls):
        return found
    settings = expert_settings(module)
    if settings is None:
        return None
    first = "gate_up_proj" if settings["has_gate"] else "up_proj"
    return ExpertLayout((first, "down_proj"), settings["is_transposed"], not settings["is_concatenated"])


@functools.cache
def _listed(cls: type) -> ExpertLayout | None:
    """The layout of a class in the table."""
    names = (f"{parent.__module__}.{parent.__qualname__}" for parent in cls.__mro__)
    return next((_LAYOUTS[name] for name in names if name in _LAYOUTS), None)


class ExpertLayer(ParameterLayer):
    """Base class of layers that hold one matrix of every expert. The rows of their input are sorted by expert.

    Attributes:
        count: E.
        interleaved: whether gate and up alternate row by row.
        swapped: see `Site`.
        layout: of the experts module's class.
        order: of the experts module, on which PEFT's files depend.
    """

    layout: ExpertLayout
    count: int
    interleaved: bool
    swapped: bool

    def __setstate__(self, state: Any) -> None:
        register_experts_function(experts_forward)  # a model may be unpickled where none has been adapted
        super().__setstate__(state)  # type: ignore[no-untyped-call]


class ExpertMatrix(ExpertLayer):
    """One fused parameter of an experts module.

    Args:
        weight: [E, out, in], or [E, in, out] if transposed; the experts module's own parameter.
        layout: of the experts module's class.
        order: see `ExpertLayer`.
    """

    is_plain = True

    def __init__(self, weight: nn.Parameter, layout: ExpertLayout, order: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.weight, self.layout = weight, layout
        self.count = weight.shape[0]
        self.transposed, self.interleaved, self.order = layout.transposed, layout.interleaved, order
        self.swapped = layout.transposed and not layout.interface

    def forward(self, x: Tensor) -> Tensor:
        """[T, out] of the rows x [T, in]."""
        return _times(self.weight, self.transposed, x)

    def extra_repr(self) -> str:
        return " x ".join(map(str, self.weight.shape)) + (", transposed" if self.transposed else "")


def _times(W: Tensor, transposed: bool, x: Tensor) -> Tensor:
    """[T, out] of the rows x [T, in], for W [E, out, in], or [E, in, out] if transposed."""
    return grouped_product(x.to(W.dtype), W if transposed else W.mT, groups_now())


def expert_matrices(module: nn.Module) -> dict[str, ExpertMatrix]:
    """name -> layer of the fused parameters of an experts module; {} for any other module."""
    layout = layout_of(module)
    if layout is None:
        return {}
    own = parameters_of(module)
    found = {name: p for name in layout.names if (p := own.get(name)) is not None and p.dim() == 3}
    return {name: ExpertMatrix(p, layout, tuple(own)) for name, p in found.items()}


def expert_count(layer: nn.Module) -> int:
    """E of a layer of experts; 0 for any other layer."""
    if not isinstance(layer, ExpertLayer):
        return 0
    return layer.count


def place_expert_layer(owner: nn.Module, name: str, layer: nn.Module) -> bool:
    """Put a layer in the place of an experts module's parameter, or the parameter of a plain one back.

    Returns:
        False, and nothing has changed, if it is not a layer of experts.
    """
    if not isinstance(getattr(layer, "base", layer), ExpertLayer):
        return False
    place(owner, name, layer)
    _dispatch(owner)
    return True


def _dispatch(owner: nn.Module) -> None:
    """Let an experts module compute with the layers in it, or as before if it has none."""
    layout = cast(ExpertLayout, layout_of(owner))
    replaced = any(isinstance(children_of(owner).get(name), nn.Module) for name in layout.names)
    if layout.interface:
        register_experts_function(experts_forward)
        use_experts_function(owner, EXPERTS_FUNCTION if replaced else None)
    elif replaced:
        vars(owner).setdefault("forward", functools.partial(_llama4_forward, owner))
    else:
        vars(owner).pop("forward", None)


@contextmanager
def grouped_by(groups: Groups) -> Iterator[None]:
    """A block in which layers of experts take the rows of these groups."""
    if torch.compiler.is_compiling():  # it traces no context variable, and one model at a time
        _TRACED.append(groups)
        yield
        _TRACED.pop()
        return
    token = _GROUPS.set(groups)
    try:
        yield
    finally:
        _GROUPS.reset(token)


def groups_now() -> Groups:
    """The groups of the rows that the experts are computing."""
    return _TRACED[-1] if torch.compiler.is_compiling() else _GROUPS.get()


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The output of an experts module: Transformers' `grouped_mm` function, with layers for its products.

    Args:
        module: the experts module.
        hidden_states: [tokens, hidden].
        top_k_index, top_k_weights: [tokens, k] the experts of each token, and their weights.
    """
    k = top_k_index.shape[-1]
    ids, order = torch.sort(top_k_index.reshape(-1))
    first = "gate_up_proj" if module.has_gate else "up_proj"
    with grouped_by(Groups(ids, module.num_experts)):
        y = _product(module, first, hidden_states[order // k], ids)
        y = apply_gate(module, y) if module.has_gate else module.act_fn(y)
        y = _product(module, "down_proj", y, ids)
    if getattr(module, "has_post_expert_norm", False):
        y = module.post_expert_norm(y)
    weighted = y * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return weighted[back].view(len(hidden_states), k, y.shape[-1]).sum(1).to(hidden_states.dtype)


def _product(module: Any, name: str, x: Tensor, ids: Tensor) -> Tensor:
    """[T, out] the rows times one of the module's matrices, with its bias."""
    y = _without_bias(module, name, x, module.is_transposed)
    return y + getattr(module, f"{name}_bias")[ids] if module.has_bias else y


def _without_bias(module: nn.Module, name: str, x: Tensor, transposed: bool) -> Tensor:
    """[T, out] the rows times one of the module's matrices, or the output of the layer in its place."""
    layer = children_of(module).get(name)
    return cast(Tensor, _times(getattr(module, name), transposed, x) if layer is None else layer(x))


def _llama4_forward(module: Any, hidden_states: Tensor) -> Tensor:
    """The output of Llama 4's experts: every expert takes every token, weighted by the router before.

    Args:
        module: the experts module.
        hidden_states: [E * tokens, hidden], sorted by expert.
    """
    count = module.num_experts
    rows = hidden_states.reshape(-1, module.hidden_size)
    ids = torch.arange(count, device=rows.device).repeat_interleave(len(rows) // count)
    with grouped_by(Groups(ids, count)):
        gate, up = _without_bias(module, "gate_up_proj", rows, True).chunk(2, dim=-1)
        return _without_bias(module, "down_proj", up * module.act_fn(gate), True)
