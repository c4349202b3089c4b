"""PyTorch's private names: the only file that uses them, apart from overrides (`CONTRIBUTING.md` lists all).

A name that a release may lack has a fallback; the others raise an error that names the release.
"""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lorary.errors import changed_release, check_overridden

try:
    from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
    from torch.nn.utils.parametrizations import _SpectralNorm
    from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
    from torch.utils._pytree import tree_leaves as tree_leaves
    from torch.utils._pytree import tree_map as tree_map
    from torch.utils._pytree import tree_map_only as tree_map_only
except ImportError as error:
    raise changed_release("torch", str(error)) from error

SpectralNormParametrization = _SpectralNorm

OVERRIDDEN = {
    "_apply": ("fn",),
    "_load_from_state_dict": (
        *("state_dict", "prefix", "local_metadata", "strict", "missing_keys", "unexpected_keys", "error_msgs"),
    ),
    "_replicate_for_data_parallel": (),
    "_save_to_state_dict": ("destination", "prefix", "keep_vars"),
}
"""Method of `nn.Module` that lorary's layers override -> its first arguments."""
check_overridden(nn.Module, OVERRIDDEN, "torch")

# --- modules --------------------------------------------------------------------------------------------------------

HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
)
"""The attributes that hold the hooks of a module."""

COMPILED_CHILD = "_orig_mod"
FSDP_CHILD = "_fsdp_wrapped_module"
WRAPPED_CHILD = {
    "torch._dynamo.eval_frame.OptimizedModule": COMPILED_CHILD,
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": FSDP_CHILD,
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper": "_checkpoint_wrapped_module",
}
"""Class of a wrapper -> the name under which it holds the wrapped module; by name, so that nothing need be imported."""


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """A module's own parameters by name, None included; the dictionary itself."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """A module's own buffers by name, None included; the dictionary itself."""
    return module._buffers


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """A module's children by name; the dictionary itself."""
    return module._modules


def with_parameters(module: nn.Module, own: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a module with other parameters or buffers, which shares the rest, but for a forward of its own."""
    twin = copy.copy(module)
    held = vars(twin)
    held.pop("forward", None)
    held["_parameters"], held["_buffers"] = dict(module._parameters), dict(module._buffers)
    for name, value in own.items():
        held["_parameters" if name in module._parameters else "_buffers"][name] = value
    return twin


def not_saved_buffers_of(module: nn.Module) -> set[str]:
    """The names of a module's buffers that are in no checkpoint; the set itself."""
    return module._non_persistent_buffers_set


def forward_hooks_of(module: nn.Module) -> MutableMapping[int, Callable[..., Any]]:
    """The forward hooks of a module."""
    return module._forward_hooks


def pre_hooks_of(module: nn.Module) -> MutableMapping[int, Callable[..., Any]]:
    """The hooks that run before a module's forward."""
    return module._forward_pre_hooks


def padding_of(convolution: Any) -> list[int]:
    """The padding of a convolution as `F.pad` takes it: before and after each dimension, the last one first."""
    found: list[int] = convolution._reversed_padding_repeated_twice
    return found


def is_replica(module: nn.Module) -> bool:
    """Whether DataParallel is making this module as a replica."""
    return "_is_replica" in vars(module)


# --- tensors and operations -------------------------------------------------------------------------------------------

READ_SCALAR: Any = torch.ops.aten._local_scalar_dense.default
SAME_WIDTHS = "_qkv_same_embed_dim"  # of nn.MultiheadAttention, whose fused paths ask for it
GROUPED_PRODUCT: Any = getattr(getattr(torch.ops.aten, "_grouped_mm", None), "default", None)  # torch 2.8
UNSAFE_VIEW: Any = torch.ops.aten._unsafe_view.default
FUSED_ATTENTION: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

_traced: Callable[[], bool] = getattr(torch._C, "_is_tracing", lambda: False)
_functorch: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def is_traced() -> bool:
    """Whether `torch.jit.trace` or a functorch transform (vmap, grad) is looking."""
    return _functorch() or _traced()


def storage_id(tensor: Tensor) -> int:
    """The identity of a tensor's memory, on any device."""
    return int(tensor.untyped_storage()._cdata)


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place."""
    return tensor._version


def schema_of(operation: Any) -> Any:
    """The schema of an operation: its name, and what its arguments and results are views of."""
    return operation._schema


def replaced_operations(namespace: str) -> AbstractContextManager[torch.library.Library]:
    """A library whose kernels replace those of existing operations within the block."""
    from torch.library import _scoped_library

    return _scoped_library(namespace, "IMPL")


# --- training ---------------------------------------------------------------------------------------------------------


def engine_queue() -> Callable[[Callable[[], None]], None] | None:
    """The function of PyTorch's engine that queues a call for the end of a backward pass; None if it has gone."""
    return getattr(getattr(torch.autograd.Variable, "_execution_engine", None), "queue_callback", None)


def set_next_rates(scheduler: torch.optim.lr_scheduler.LRScheduler, rates: Sequence[float | Tensor]) -> None:
    """Set the learning rates that a schedule gives as its last ones."""
    scheduler._last_lr = list(rates)


# --- the compiler, which is not needed ------------------------------------------------------------------------------


class _Placeholder(ModuleType):
    """A module that is not imported. As soon as anything but `known` is asked of it, all of them give way.

    Args:
        name: of the module.
        others: every placeholder.
        known: the names that need no import.
    """

    def __init__(self, name: str, others: list[_Placeholder], **known: Any) -> None:
        super().__init__(name)
        self._others, self._known = others, known
        others.append(self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in self._known:
            for placeholder in self._others:
                placeholder.give_way()
        if name in self._known:
            return self._known[name]
        return getattr(importlib.import_module(self.__name__), name)

    def give_way(self) -> None:
        """Let the next import find the real module, and who holds this one use it from now on."""
        self._known.clear()
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]


class _NoSymbol:
    """In place of the class of symbols; nothing is an instance of it."""


def _yes(*terms: Any, **_: Any) -> bool:
    return all(terms)


@contextmanager
def without_compiler() -> Iterator[None]:
    """A block in which operations on the meta device do not import PyTorch's compiler and its symbolic algebra.

    They import both, which takes as long as PyTorch itself, only to say that they are not to be compiled, and to
    compare sizes that are plain numbers here. Whatever else is asked of these modules imports them after all. Where
    Transformers is imported, they are needed anyway.
    """
    disabled: list[Any] = []

    def disable(function: Any, *_: Any, **__: Any) -> Any:
        disabled.append(function)
        return function

    placed: list[_Placeholder] = []
    if not {"transformers", "sympy", "torch._dynamo", "torch.fx.experimental.symbolic_shapes"} & sys.modules.keys():
        asked = ("guard_or_false", "guard_or_true", "expect_true", "guard_size_oblivious", "statically_known_true")
        sizes = {
            **dict.fromkeys(asked, _yes),
            **{"sym_eq": lambda a, b: a == b, "sym_and": _yes, "sym_or": lambda *terms: any(terms)},
            **{"is_nested_int": lambda size: False, "has_guarding_hint": lambda size: True},
            **{"guarding_hint_or_throw": lambda size: size, "free_unbacked_symbols": lambda *sizes: set()},
        }
        config = SimpleNamespace(error_on_nested_fx_trace=False)
        _Placeholder("sympy", placed, Basic=_NoSymbol)
        _Placeholder("torch.fx.experimental.symbolic_shapes", placed, **sizes)
        _Placeholder("torch._dynamo", placed, disable=disable, config=config)
    sys.modules.update({module.__name__: module for module in placed})
    try:
        yield
    finally:
        for module in placed:
            module.give_way()
        for function in disabled:  # PyTorch remembers the answer, which holds for this block only
            vars(function).pop("__dynamo_disable", None)
