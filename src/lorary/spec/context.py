"""Context: the word that says how far a model reads, and how its tokens see each other while it is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, Self, runtime_checkable

from torch import nn


class ContextPatch(Protocol):
    """A model that reads otherwise than it did, and the way back (`Context.enter` makes it)."""

    def revert(self) -> None:
        """The model as it was."""

    def settle(self) -> None:
        """The model as it is to be used from now on: what was for training alone is gone."""

    def reapply(self) -> None:
        """Undo `settle`."""

    def reverted(self) -> AbstractContextManager[Any]:
        """Within, the model is as it was."""


@runtime_checkable
class Context(Protocol):
    """How far a model reads, and how its tokens see each other while it is trained.

    Attributes:
        targets: which layers are adapted where nothing is said.
        length: tokens that the model is to read; None for what it reads already.
    """

    targets: Sequence[str]
    length: int | None

    @property
    def attention_groups(self) -> int:
        """Into how many groups attention divides the longest sequence of a batch in training; 0: it does not."""
        return 0

    @property
    def words(self) -> Mapping[str, Any]:
        """What the base's configuration must say of its positions, for whoever does not know this word."""
        ...

    def planned(self, model: nn.Module) -> Self:
        """The same, with what follows from the model."""
        ...

    def problems(self, model: nn.Module) -> list[tuple[str, str]]:
        """(what, what to do about it): why it cannot be with this model."""
        ...

    def notes(self, model: nn.Module) -> list[str]:
        """What is worth knowing before training."""
        ...

    def apply(self, model: nn.Module) -> ContextPatch:
        """Let the model read so."""
        ...
