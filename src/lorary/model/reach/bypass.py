"""Bypassed layers: those whose weight other modules read, by the source of the modules of a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from lorary.kernels.torch_internals import children_of
from lorary.layers.multihead_attention import never_reads
from lorary.model.reach.source import Line, accesses


@dataclass(frozen=True)
class Bypass:
    """A layer's weight that code outside of the layer reads.

    Args:
        reader: the class with the code; empty if it is not known.
        called: whether something calls the layer too.
        lines: of the code.
    """

    reader: str
    called: bool
    lines: frozenset[Line] = frozenset()

    def __str__(self) -> str:
        reader = self.reader or "other code"
        if self.called:
            return f"{reader} also reads its weight without calling it: an adapter would act on some paths only"
        return f"{reader} reads its weight and never calls it: an adapter there would do nothing"


def bypasses(modules: Iterable[nn.Module]) -> dict[nn.Module, Bypass]:
    """layer -> how it is bypassed on at least one path, for the modules of a model."""
    readers: dict[nn.Module, dict[str, str]] = {}  # layer -> its path from each reader -> the reader
    lines: dict[nn.Module, set[Line]] = {}
    called: set[nn.Module] = set()
    for module in modules:
        if not children_of(module):
            continue
        found = accesses(type(module))  # type: ignore[arg-type]  # mypy takes the __hash__ of its instances
        called |= {child for path in found.calls if (child := _child(module, path)) is not None}
        for read in found.reads:
            child = _child(module, read.path)
            if child is not None and read.possible(module) and not never_reads(module, read.path):
                readers.setdefault(child, {})[read.path] = _name(type(module))
                lines.setdefault(child, set()).add(read.line)
    return {
        child: Bypass(paths[min(paths, key=len)], child in called, frozenset(lines[child]))  # the nearest reader
        for child, paths in readers.items()
    }


def _child(module: nn.Module, path: str) -> nn.Module | None:
    """The module at a path of attributes, or None: most paths are of methods and settings."""
    child: nn.Module | None = module
    for name in path.split("."):
        child = None if child is None else children_of(child).get(name)
    return child


def _name(cls: type[nn.Module]) -> str:
    return f"nn.{cls.__name__}" if cls.__module__.startswith("torch.nn.") else cls.__name__
