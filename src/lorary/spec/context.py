"""The context axis: how many tokens a model reads, what stands before them, and how its attention works."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, Self, runtime_checkable

from torch import nn

from lorary.spec.join import Join
from lorary.spec.site import Site


class ContextPatch(Protocol):
    """A reversible change to a model's positions and attention, made by `Context.apply`."""

    def revert(self) -> None:
        """Restore the original model."""

    def restore(self) -> None:
        """Undo `revert`."""

    def make_permanent(self) -> None:
        """Remove the parts that are for training only, such as shifted attention."""

    def reapply(self) -> None:
        """Undo `make_permanent`."""


@contextmanager
def reverted(patch: ContextPatch | None) -> Iterator[None]:
    """A context in which the original model is restored; None: no patch is applied."""
    if patch is None:
        yield
        return
    patch.revert()
    try:
        yield
    finally:
        patch.restore()


@runtime_checkable
class Context(Protocol):
    """The context of a model: its length, what stands before the text, and the attention in training.

    Attributes:
        targets: the default target layers, if the join has none.
        length: the context length in tokens; None for the model's own.
        taken: the positions before the text that are not the text's (prefix and prompt tuning).
    """

    targets: Sequence[str] = ()
    length: int | None = None
    taken: int = 0

    @property
    def attention_groups(self) -> int:
        """The number of groups into which attention divides a batch's longest sequence in training; 0: none."""
        return 0

    @property
    def config_overrides(self) -> Mapping[str, Any]:
        """The configuration values, such as `rope_parameters`, with which other tools reproduce this scaling."""
        return {}

    def planned(self, model: nn.Module) -> Self:
        """This context with the values that depend on the model filled in."""
        return self

    def problems(self, model: nn.Module) -> list[tuple[str, str]]:
        """(reason, fix): the reasons why it cannot be applied to this model."""
        ...

    def site_problems(self, model: nn.Module, sites: Iterable[tuple[Site, Join]]) -> list[tuple[str, str]]:
        """(reason, fix): the reasons why it cannot be applied with these adapted sites, each with its join."""
        return []

    def notes(self, model: nn.Module) -> list[str]:
        """Facts worth knowing before training."""
        ...

    def apply(self, model: nn.Module) -> ContextPatch:
        """Change the model's positions and attention."""
        ...
