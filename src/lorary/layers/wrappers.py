"""Wrappers that do not change a function: torch.compile, DDP, DataParallel, FSDP, activation checkpointing.

Every question about a model is answered for the modules inside, whose paths have no component for a wrapper:
`model.layers.0`, not `_orig_mod.model.layers.0` or `model.layers.0._checkpoint_wrapped_module`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, cast

from torch import nn

from lorary.kernels.torch_internals import COMPILED_CHILD, FSDP_CHILD, WRAPPED_CHILD, children_of
from lorary.layers.multihead_attention import choose_forward
from lorary.layers.parameters import parameter_layers, place_parameter_layer

COMPONENTS = frozenset(WRAPPED_CHILD.values())  # what wrappers leave in the paths of modules
_CHILD_OF: dict[type, str | None] = {}


def _child_name(module: nn.Module) -> str | None:
    """The name under which a wrapper holds its module; None for a module that is not a wrapper."""
    cls = type(module)
    if cls not in _CHILD_OF:
        names = (WRAPPED_CHILD.get(f"{parent.__module__}.{parent.__qualname__}") for parent in cls.__mro__)
        _CHILD_OF[cls] = next(filter(None, names), None)
    return _CHILD_OF[cls]


def is_wrapper(module: nn.Module) -> bool:
    """Whether a module only wraps another one."""
    return _child_name(module) is not None


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside all wrappers; the module itself if there are none."""
    while (name := _child_name(module)) is not None:
        inside = children_of(module)[name]
        assert inside is not None
        module = inside
    return module


def named_modules(
    model: nn.Module, *, remove_duplicate: bool = True, prefix: str = "", seen: set[nn.Module] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """`nn.Module.named_modules` without the wrappers."""
    module, seen = unwrapped(model), set() if seen is None else seen
    if remove_duplicate and module in seen:
        return
    seen.add(module)
    yield prefix, module
    for name, child in children_of(module).items():
        if child is not None:
            path = f"{prefix}.{name}" if prefix else name
            yield from named_modules(child, remove_duplicate=remove_duplicate, prefix=path, seen=seen)


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The module at a path of `named_modules`; for a parameter that is a layer of its own, a layer that holds it.

    Raises:
        AttributeError: the path leads nowhere.
    """
    module = unwrapped(model)
    for name in path.split(".") if path else ():
        child = children_of(module).get(name)
        child = parameter_layers(module).get(name) if child is None else child
        if child is None:
            raise AttributeError(f"{type(module).__name__} has no module {name!r} ({path})")
        module = unwrapped(child)
    return module


def set_submodule(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path of `submodule`, inside the wrappers of the one there now."""
    above, _, name = path.rpartition(".")
    parent: Any = submodule(model, above)
    if place_parameter_layer(parent, name, module):
        return
    owner = parent
    while is_wrapper(inside := cast(nn.Module, children_of(parent)[name])):
        parent = inside
        name = str(_child_name(parent))
    before = children_of(parent)[name]
    children_of(parent)[name] = module
    _replace_in_lists(owner, before, module)
    if name == COMPILED_CHILD:  # its forward is bound to the module that it was made with
        parent.__setstate__(parent.__getstate__())
    choose_forward(owner)


def _replace_in_lists(owner: nn.Module, before: nn.Module | None, module: nn.Module) -> None:
    """Replace a module in the plain lists of its owner: Mask2Former runs its layers from there."""
    for held in vars(owner).values():
        if isinstance(held, list) and any(item is before for item in held):
            held[:] = [module if item is before else item for item in held]


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module; FSDP2 replaces it by a subclass of its own."""
    return next(cls for cls in type(module).__mro__ if not cls.__module__.startswith("torch.distributed."))


def is_sharded_model(model: nn.Module) -> bool:
    """Whether FSDP, of either version, holds the model's parameters and puts them into its modules in every forward."""
    return any(_is_fsdps(cast(Any, type(module))) for module in model.modules())


@functools.cache
def _is_fsdps(cls: type) -> bool:
    return any(above.__module__.startswith("torch.distributed.fsdp") for above in cls.__mro__)


def has_flat_parameters(model: nn.Module) -> bool:
    """Whether FSDP1 has flattened parameters of the model."""
    return any(_child_name(module) == FSDP_CHILD for module in model.modules())


def gathered(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """A block in which parameters that FSDP1 has flattened have their own shapes and values; a collective call."""
    if not has_flat_parameters(model):
        return contextlib.nullcontext()
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel.summon_full_params(model, writeback=False)
