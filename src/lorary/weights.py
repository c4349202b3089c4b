"""weight: the dense weight of a layer, however the layer keeps it. The seam by which packed layers are adapted.

A packed layer, of lorary or of another library, says what it stands for in one line:

    @keeps("linear", "some_library.layers.QuantLinear")
    def dense(layer): return layer.dequantise()

Its class may be named instead of given, so that nothing is imported before whoever made the model has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

from torch import Tensor, nn


class Kept(NamedTuple):
    """How a class of packed layers is seen.

    Args:
        kind: the kind of plain layer that it stands for: `linear` or `embedding`.
        dense: layer -> its weight, in the layout of the plain layer, made anew at each call.
    """

    kind: str
    dense: Callable[[Any], Tensor]


_KEPT: dict[type | str, Kept] = {}
F_ = TypeVar("F_", bound=Callable[[Any], Tensor])


def keeps(kind: str, *classes: type | str) -> Callable[[F_], F_]:
    """Make the layers of these classes known: what kind they stand for, and how their weight is had.

    Args:
        kind: `linear` (with `in_features` and `out_features`) or `embedding` (with `num_embeddings` and
            `embedding_dim`).
        classes: the classes themselves, or their names, `module.Class`.
    """

    def register(dense: F_) -> F_:
        for cls in classes:
            _KEPT[cls] = Kept(kind, dense)
        return dense

    return register


def kept(layer: object) -> Kept | None:
    """How a packed layer is seen; None for a plain one."""
    for cls in type(layer).__mro__:
        if cls in _KEPT:
            return _KEPT[cls]
        if found := _KEPT.get(f"{cls.__module__}.{cls.__qualname__}"):
            return found
        if cls.__module__ == "torch.nn.modules.module":
            break
    return None


def is_packed(layer: object) -> bool:
    """Whether a layer keeps its weight in another form than its own layout."""
    return kept(layer) is not None


def weight(layer: nn.Module) -> Tensor:
    """The dense weight of a layer, in the layout of the plain layer: its own, or made anew of a packed one's."""
    how = kept(layer)
    return cast(Tensor, layer.weight) if how is None else how.dense(layer).detach()
