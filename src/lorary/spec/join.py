"""The join: how a method's update and the frozen weight make the layer's output."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lorary.errors import Diagnostic, MethodError, deduplicated
from lorary.spec.layer import Factors, Layer, Shapes, Tensors
from lorary.spec.site import Site

KEEP_ATTACHED = "keep it attached: the base with the adapter computes it"
_WITHOUT_FORM = Diagnostic("join", "has no such form", KEEP_ATTACHED)


@runtime_checkable
class Join(Protocol):
    """The combination of the delta with the frozen weight W [out, in] and bias b [out].

    Attributes:
        roles: its own tensors.
        uses: the delta's `join_roles`.
        scaled: its roles that are part of the update: `merged` and `on_output` get them with the scale in them.
        changes_bias: whether it changes the layer's bias, which then cannot train in full.
        supports_dropout: whether the adapter has an input apart from the layer's own that dropout can act on.
        adds_delta: whether it adds the delta's factors; one that does not goes with `NoUpdate` alone.
        adds_apart: whether the output is the base's plus s B A x, and what else it adds depends on neither W nor B A.
        replaces_rows: whether its tensors take the place of rows of the weight.
        needs_context: whether it takes effect through the method's context.
        acts_everywhere: whether the update acts at every position of a text; otherwise the base must stay as it is.
        targets: the default target layers; the context axis comes after it.
        why_not_merged: why no weight and bias have the same function, such as a non-linearity; empty if some have.
        exact_start: whether the layer computes exactly what the base's does at step 0.
        keeps_ties: whether its tensors mean the same at every use of a weight, so that tied layers share one set of
            them and are still tied when merged.
        per_expert: whether `forward` also works on the fused matrices of experts.
        scales_bias: whether the bias of the plain layer with the same function is the base's times something.
    """

    roles: frozenset[str] = frozenset()
    uses: frozenset[str] = frozenset()
    scaled: frozenset[str] = frozenset()
    changes_bias: bool = False
    supports_dropout: bool = True
    adds_delta: bool = True
    adds_apart: bool = False
    replaces_rows: bool = False
    needs_context: bool = False
    acts_everywhere: bool = True
    targets: tuple[str, ...] = ()
    why_not_merged: str = ""
    exact_start: bool = True
    keeps_ties: bool = False
    per_expert: bool = False
    scales_bias: bool = False

    def shapes(self, site: Site) -> Shapes:
        """role -> shape of its own tensors."""
        return {}

    def whole(self, site: Site, params: Tensors) -> Tensors:
        """A site's tensors as `merged` and `on_output` take them: over all rows, where the site is a part of them."""
        return params

    def setup(self, layer: Layer, generator: torch.Generator) -> None:
        """Fill its own tensors after the delta's, so that nothing moves at step 0; `generator` is the site's own."""
        return None

    def forward(self, layer: Layer, x: Tensor) -> Tensor: ...
    def merged(self, params: Tensors, W: Tensor, b: Tensor | None, BA: Factors) -> tuple[Tensor, Tensor | None]:
        """(W', b') with the same function as `forward`, which it specifies; BA is (s B, A).

        Raises:
            MethodError: there are none: `why_not_merged`.
        """
        raise unmergeable(self)

    def on_output(
        self, params: Tensors, W: Callable[[], Tensor], b: Callable[[], Tensor | None], BA: Factors
    ) -> tuple[Factors, Tensor | None, Tensor | None]:
        """((B, A), gain, shift) with `forward` = gain * (W x + B A x) + b + shift; None is a gain of 1, a shift of 0.

        Args:
            params, BA: as for `merged`.
            W, b: return the weight and the bias, or raise MethodError if the base is not available.

        Raises:
            MethodError: it has no such form.
        """
        raise unmergeable(self)

    def problems(self, site: Site) -> list[str]:
        """The reasons why it cannot join a delta to this site."""
        return []


def unmergeable(join: Join) -> MethodError:
    """The error for a join that has no equivalent weight and bias."""
    return MethodError("this adapter cannot be merged:", not_mergeable([("join", join)]) or [_WITHOUT_FORM])


def not_mergeable(joins: Iterable[tuple[str, Join]]) -> list[Diagnostic]:
    """Why layers cannot be merged, for (name of a layer, its join): each reason once."""
    why = [
        Diagnostic(name, f"{type(j).__name__} {j.why_not_merged}", KEEP_ATTACHED)
        for name, j in joins
        if j.why_not_merged
    ]
    return deduplicated(why)
