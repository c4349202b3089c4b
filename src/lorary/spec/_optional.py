"""Optional interfaces of a delta."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

from lorary.spec.layer import Factors, Layer

if TYPE_CHECKING:
    from lorary.spec.interfaces import Delta


@runtime_checkable
class Fused(Protocol):
    """A delta with a faster path for rowwise layers; its factors remain the specification."""

    def add(self, layer: Layer, y: Tensor, x: Tensor, dropout: float) -> Tensor:
        """y + s * B A dropout(x). May write into y."""
        ...


@runtime_checkable
class Sequential(Protocol):
    """A delta that keeps the frozen factors of earlier tasks beside its own."""

    def after(self, past: Sequence[Factors], scale: float) -> tuple[Delta, dict[str, Tensor]]:
        """The delta of the next task, and the values of its fixed roles.

        Args:
            past: the factors of each earlier task, the oldest first, with their scales in B.
            scale: the new task's s.
        """
        ...

    def tasks(self, B: Tensor, A: Tensor) -> list[Factors]:
        """The factors of every task, the oldest first."""
        ...
