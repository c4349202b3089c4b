"""all_or_nothing: a change of a model that any exception undoes, bit for bit, an interrupt or lack of memory included.

The model is remembered by reference: its modules with their attributes, its tensors with their memory, its
configurations, and lorary's own state. So nothing is copied, and undoing a change only assigns pointers. The exception
is a value that a change writes into the memory of a parameter: `Undo.remember_values` copies it first, to the CPU.

A replaced tensor stays in memory until the change is complete: merging needs room for two copies of the weights that
it merges, and quantising for the dense weights beside the quantised ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorary.kernels.torch_internals import buffers_of, children_of, parameters_of


class _Object(NamedTuple):
    """The class and the attributes of an object, and the contents of the lists, dictionaries and sets among them."""

    object: Any
    cls: type
    attributes: dict[str, Any]
    contents: list[tuple[Any, Any]]

    @staticmethod
    def of(thing: Any) -> _Object:
        attributes = dict(vars(thing))
        containers = [value for value in attributes.values() if isinstance(value, dict | list | set)]
        return _Object(thing, type(thing), attributes, [(container, container.copy()) for container in containers])

    def restore(self) -> None:
        if type(self.object) is not self.cls:
            self.object.__class__ = self.cls
        for container, content in [(vars(self.object), self.attributes), *self.contents]:
            if isinstance(container, list):
                container[:] = content
            elif not _same(container, content):
                container.clear()
                container.update(content)


def _same(one: Any, other: Any) -> bool:
    """Whether two dictionaries or sets hold the same objects in the same order."""
    here, there = ([*c, *(c.values() if isinstance(c, dict) else ())] for c in (one, other))
    return len(here) == len(there) and all(a is b for a, b in zip(here, there, strict=True))


class _Tensor(NamedTuple):
    """A tensor's memory, gradient and flag, and the attributes that a library has given it (scales, for example)."""

    tensor: Tensor
    data: Tensor
    grad: Tensor | None
    requires_grad: bool
    attributes: dict[str, Any]

    @staticmethod
    def of(t: Tensor) -> _Tensor:
        return _Tensor(t, t.data, t.grad if t.is_leaf else None, t.requires_grad, dict(vars(t)))

    def restore(self) -> None:
        t, data = self.tensor, self.data
        if (t.dtype, t.device, _address(t)) != (data.dtype, data.device, _address(data)):
            t.data = data
        if not _same(vars(t), self.attributes):
            vars(t).clear()
            vars(t).update(self.attributes)
        if t.is_leaf and t.requires_grad != self.requires_grad:
            t.requires_grad_(self.requires_grad)
        if t.is_leaf and t.grad is not self.grad:
            t.grad = self.grad


def _address(t: Tensor) -> int:
    """The address of a tensor's memory; 0 if it has none of its own, like fake tensors and tensor subclasses."""
    try:
        return t.data_ptr()
    except RuntimeError:
        return 0


class Undo:
    """A record of a model as it is now, from which it can be restored.

    Args:
        model: without wrappers around it.
    """

    def __init__(self, model: nn.Module) -> None:
        reached = list(_reachable(model))
        self._objects = [_Object.of(thing) for thing in reached if not isinstance(thing, Tensor)]
        tensors = (thing for thing in reached if isinstance(thing, Tensor))
        self._tensors = [_Tensor.of(t) for t in tensors if not nn.parameter.is_lazy(t)]
        self._values: list[tuple[Tensor, Tensor]] = []

    def remember_values(self, tensor: Tensor, copy: Tensor | None = None) -> None:
        """Remember the values of a tensor; call it before they are overwritten.

        Args:
            tensor: on any device.
            copy: of its values, if there is one already.
        """
        if not tensor.is_meta:
            self._values.append((tensor, tensor.detach().to("cpu", copy=True) if copy is None else copy))

    def restore(self) -> None:
        """Make the model what it was. May be called again if it was interrupted."""
        for thing in self._objects:
            thing.restore()
        for tensor in self._tensors:
            tensor.restore()
        with torch.no_grad():
            for written, values in reversed(self._values):  # the first copy of a tensor is its original
                written.copy_(values)


class all_or_nothing:  # noqa: N801  a block, as in `with suppress(...)`
    """A block that changes a model completely or, if it raises anything, not at all. Gives its `Undo`."""

    def __init__(self, model: nn.Module) -> None:
        self.undo = Undo(model)

    def __enter__(self) -> Undo:
        return self.undo

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        done = error is None
        while not done:
            try:
                self.undo.restore()
                done = True
            except KeyboardInterrupt:  # impatience: the first interrupt is raised as soon as the model is whole again
                continue


def _reachable(model: nn.Module) -> Iterator[Any]:
    """The model's modules, tensors and configurations, and lorary's own records of it, each once."""
    stack: list[Any] = [model]
    seen: set[int] = set()
    while stack:
        thing = stack.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        yield thing
        if isinstance(thing, nn.Module):
            children = [*parameters_of(thing).values(), *buffers_of(thing).values(), *children_of(thing).values()]
            children += vars(thing).values()
        else:
            children = [] if isinstance(thing, Tensor) else _values(list(vars(thing).values()))
        config = vars(thing).get("config") if isinstance(thing, nn.Module) else None
        stack += [
            child for child in children if _is_followed(child) or (child is config and hasattr(child, "__dict__"))
        ]


def _values(value: Any) -> list[Any]:
    """The values in nested dictionaries, lists and tuples."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list | tuple):
        return [value]
    return [inner for item in value for inner in _values(item)]


_FOLLOWED: dict[type, bool] = {}


def _is_followed(value: Any) -> bool:
    """Whether a change of a model may change this value: tensors, modules, configurations, and lorary's own records."""
    cls = type(value)
    if cls not in _FOLLOWED:
        frozen = getattr(getattr(cls, "__dataclass_params__", None), "frozen", False)
        lorarys = cls.__module__.startswith(("lorary.model.", "lorary.layers.", "lorary.methods.")) and not frozen
        has_attributes = "__dict__" in dir(cls) and not issubclass(cls, type)
        known = issubclass(cls, Tensor | nn.Module) or cls.__name__.endswith("Config")
        _FOLLOWED[cls] = has_attributes and (known or lorarys)
    return _FOLLOWED[cls]
