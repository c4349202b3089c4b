"""A copy of a model without values, on which a forward may run without changing anything."""

from __future__ import annotations

import copy
import functools
import random
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lorary.kernels.torch_internals import GROUPED_PRODUCT, HOOKS, READ_SCALAR, TorchDispatchMode
from lorary.layers.kinds import KINDS, kind_of
from lorary.layers.quantized_weight import is_quantized
from lorary.layers.transformers_internals import attention_of, without_device_hooks

_MOST_OPERATIONS = 300_000  # a loop that waits for a value never ends on the meta device
_EMPTY_CELL = CellType()


def twin_of(model: nn.Module) -> Any:
    """A deep copy of a model on the meta device, without hooks, gradients and gradient checkpointing.

    Raises:
        RuntimeError: the model holds a function that would run the model itself, not the copy.
        Exception: any error of an attribute that cannot be copied.
    """
    memo: dict[int, Any] = {id(p): nn.Parameter(_empty(p), requires_grad=False) for p in model.parameters()}
    with _WithoutValues():
        twin: Any = copy.deepcopy(model, memo)
    for module in twin.modules():
        for name in HOOKS:
            if isinstance(hooks := getattr(module, name), dict):
                hooks.clear()
        without_device_hooks(module)
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False
        if is_quantized(module):
            module.forward = _shape_only(module)
    _without_kernels(twin)
    refuse_functions_around(model, twin)
    return twin


def refuse_functions_around(model: nn.Module, copied: nn.Module) -> None:
    """Refuse a copy that would run a part of the model: functions, also in attributes, are copied by reference.

    Raises:
        RuntimeError: it holds a function around a module of the model.
    """
    originals = {id(module) for module in model.modules()}
    for path, module in copied.named_modules():
        for name, value in vars(module).items():
            runs = name == "forward" or not hasattr(nn.Module, name)  # accelerate replaces `to`, which no forward calls
            if runs and isinstance(value, FunctionType) and _holds(value, originals, set()):
                raise RuntimeError(f"{f'{path}.{name}'.lstrip('.')} is a function around the model itself")


def _holds(value: Any, originals: Collection[int], seen: set[int]) -> bool:
    """Whether a function, which is copied by reference, holds one of these modules."""
    if id(value) in originals:
        return True
    if id(value) in seen:
        return False
    seen.add(id(value))
    match value:
        case FunctionType():
            cells = [cell for cell in value.__closure__ or () if cell != _EMPTY_CELL]
            held = [*(cell.cell_contents for cell in cells), value.__defaults__, value.__kwdefaults__, vars(value)]
        case MethodType():
            held = [value.__self__, value.__func__]
        case functools.partial():
            held = [value.func, value.args, value.keywords]
        case dict():
            held = list(value.values())
        case list() | tuple():
            held = list(value)
        case _:
            return False
    return any(_holds(inner, originals, seen) for inner in held)


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _without_kernels(twin: Any) -> None:
    """Attention in PyTorch's own operations."""
    config = getattr(twin, "config", None)
    if attention_of(config) not in (None, "eager", "sdpa"):
        twin.set_attn_implementation("sdpa")


def _shape_only(layer: Any) -> Any:
    """The forward of a quantised layer, by its shape: kernels of quantised weights need values."""
    kind = kind_of(layer)
    out = 0 if kind is None else KINDS[kind].size(layer)[0]

    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
        shape = (*x.shape, out) if kind == "embedding" else (*x.shape[:-1], out)
        return x.new_empty(shape, dtype=dtype)

    return forward


class _WithoutValues(TorchFunctionMode):
    """Copies of tensors are empty tensors on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            copied = args[1][id(args[0])] = _empty(args[0])
            return copied
        if func is Tensor.clone:
            return _empty(args[0])
        return func(*args, **(kwargs or {}))


class ScalarAnswers(TorchDispatchMode):
    """One number for every value read from a tensor on the meta device.

    Args:
        answer: the number.
    """

    def __init__(self, answer: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.answer = answer

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is READ_SCALAR and args[0].is_meta:
            return torch.full((), self.answer, dtype=args[0].dtype, device="cpu").item()
        return func(*args, **(kwargs or {}))


class MetaAnswers(ScalarAnswers):
    """Answers to all operations whose result depends on values: a mask holds for one entry.

    The shapes that follow are not those of a real forward, but the path through the code is.
    """

    def __init__(self, answer: int) -> None:
        super().__init__(answer)
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        if self.operations > _MOST_OPERATIONS:
            raise RuntimeError("the forward does not end without values")
        aten, first = torch.ops.aten, args[0] if args else None
        if isinstance(first, Tensor) and first.is_meta:
            if func is aten.nonzero.default:
                return torch.empty(1, first.dim(), dtype=torch.long, device="meta")
            if func is GROUPED_PRODUCT:  # its check of dtypes is that of one kind of GPU
                return first.new_empty(_grouped_shape(*args[:3]))
            if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
                args = (first, [part for index in args[1] for part in _positions(index)], *args[2:])
        return super().__torch_dispatch__(func, types, args, kwargs)


def _grouped_shape(a: Tensor, b: Tensor, offsets: Tensor | None = None) -> tuple[int, ...]:
    """The shape of a grouped matrix product; the rows or columns of a 2D factor are split into groups."""
    if a.dim() == b.dim() == 2:
        return (0 if offsets is None else offsets.shape[0], a.shape[0], b.shape[1])
    return (*a.shape[:-1], b.shape[-1])


def _positions(index: Tensor | None) -> list[Tensor | None]:
    """A mask as the positions of one entry."""
    if index is None or index.dtype not in (torch.bool, torch.uint8):
        return [index]
    return [torch.empty(1, dtype=torch.long, device=index.device) for _ in range(index.dim())]


@contextmanager
def random_numbers_kept() -> Iterator[None]:
    """The random numbers of Python, NumPy and PyTorch on the CPU as they were before the block."""
    numpy = sys.modules.get("numpy")
    states = random.getstate(), torch.get_rng_state(), None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        torch.set_rng_state(states[1])
        if numpy is not None:
            numpy.random.set_state(states[2])
