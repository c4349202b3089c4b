"""The interfaces through which components see an adapted layer and a training run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lorary.spec.site import Site

Tensors = Mapping[str, Tensor]
Shapes = dict[str, tuple[int, ...]]  # role -> shape
Factors = tuple[Tensor, Tensor]  # B [out, R] and A [R, in]


class Kind(Protocol):
    """A kind of layer, reduced to an [out, in] matrix M. B is [out, R], A is [R, in].

    Attributes:
        rowwise: whether the layer maps rows [..., in] to rows [..., out].
    """

    @property
    def rowwise(self) -> bool: ...

    def size(self, layer: Any) -> tuple[int, int]:
        """(out, in)."""
        ...

    def matrix(self, layer: Any) -> Tensor:
        """The weight as [out, in]: a view, or the dequantised weight of a quantised layer."""
        ...

    def weight(self, layer: Any, M: Tensor) -> Tensor:
        """M in the layout of the layer's own weight."""
        ...

    def broadcast_over_rows(self, v: Tensor) -> Tensor:
        """A vector [out], shaped to broadcast over the layer's output."""
        ...

    def run(self, layer: Any, x: Tensor, M: Tensor, b: Tensor | None) -> Tensor:
        """The layer's function of x with another matrix and bias: the specification of every fast path."""
        ...

    def add(self, layer: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float, dropout: float) -> Tensor:
        """y + s * layer(dropout(x); B A), computed through the R-wide middle without forming B A."""
        ...


class Layer(Protocol):
    """An adapted layer as its components see it; `lorary.layers.adapted.Adapted` implements it.

    Attributes:
        method: the `Method` at this site.
        params: role -> parameter.
        kind: the layer kind.
        dropout: the current dropout probability of the adapter's input: 0 outside training.
        shared: the projections shared by all layers, or None.
        active_structure: the structure that a rule chose for the current optimizer step, or None.
    """

    site: Site
    scale: float
    method: Any
    params: Any
    kind: Kind
    dropout: float
    base: nn.Module
    shared: Any
    training: bool
    active_structure: Any

    @property
    def bias(self) -> Tensor | None: ...
    @property
    def matrix(self) -> Tensor:
        """The base's weight as [out, in]; dequantised, if it is quantised."""
        ...

    @property
    def tensors(self) -> Tensors:
        """role -> tensor: the layer's own parameters and its slices of the shared ones."""
        ...

    def factors(self) -> Factors: ...
    def weight_times(self, A: Tensor) -> Tensor:
        """W A^T [out, R], in A's precision and differentiable in A; a quantised W stays quantised."""
        ...

    def run_base(self, x: Tensor) -> Tensor:
        """The base's output, in memory that the caller may overwrite."""
        ...

    def add_delta(self, y: Tensor, x: Tensor, dropout: float | None = None) -> Tensor: ...
    def once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """make(), a tensor without a graph; computed once inside a `lorary.cached` block, in each call elsewhere."""
        ...


class Run(Protocol):
    """A training run as its rules see it; `lorary.Rules` implements it.

    Attributes:
        optimizer: the optimizer, or None if the training loop does not pass it on.
    """

    optimizer: torch.optim.Optimizer | None

    def prune_directions(self, keep: Mapping[str, Tensor]) -> bool:
        """Remove all other rank directions from the tensors and the optimizer's state.

        Args:
            keep: site -> mask [R].

        Returns:
            Whether it was possible: the optimizer must be known, and its state and the parameters not sharded.
        """
        ...
