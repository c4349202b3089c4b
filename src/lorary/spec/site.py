"""The site of an adapter: which layer, of which kind and size, as pure data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lorary._deprecated import RenamedAttribute


@dataclass(frozen=True)
class Part:
    """One projection inside a fused weight: `count` runs of `size` output rows, `step` rows apart.

    GPT-2 keeps q, k, v as three runs (count 1); GPT-NeoX interleaves them per head (count = heads).
    """

    name: str
    start: int
    size: int
    step: int = 0
    count: int = 1

    def rows(self, device: torch.device | None = None) -> Tensor:
        """The output rows of this part, in order: [count * size] integers."""
        runs = torch.arange(self.count, device=device) * self.step + self.start
        return (runs[:, None] + torch.arange(self.size, device=device)).flatten()


@dataclass(frozen=True)
class Site:
    """One layer that is adapted, as data.

    Args:
        name: the module's path in the model, such as `model.layers.0.self_attn.q_proj`.
        kind: `linear`, `transposed` (GPT-2's Conv1D), `conv1d`, `conv2d`, `conv3d` or `embedding`.
        out: rows of the weight matrix: output features, channels, or the embedding's width.
        inp: columns: input features, input channels per group times the kernel's size, or the vocabulary.
        bias: whether the layer has a bias.
        parts: the projections of a fused weight that are adapted one by one; empty for the whole weight.
        groups: the convolution's groups; 1 elsewhere.
        window: the convolution's kernel size; empty elsewhere.
    """

    name: str
    kind: str
    out_features: int
    in_features: int
    bias: bool
    parts: tuple[Part, ...] = ()
    groups: int = 1
    kernel_size: tuple[int, ...] = ()

    out = RenamedAttribute("out_features")
    inp = RenamedAttribute("in_features")
    window = RenamedAttribute("kernel_size")

    @property
    def rows(self) -> list[int]:
        """How many output rows each part has: one part for a whole weight."""
        return [part.size * part.count for part in self.parts] or [self.out_features]

    def split(self, W: Tensor) -> list[Tensor]:
        """The rows [., inp] of a weight [out, inp] that belong to each part."""
        return [W[part.rows(W.device)] for part in self.parts] or [W]

    def place(self, B: Tensor) -> Tensor:
        """Stacked part factors [rows of the parts, r] as one factor [out, parts * r], zero off the blocks."""
        if not self.parts:
            return B
        blocks: Tensor = torch.block_diag(*B.split(self.rows))
        rows = torch.cat([part.rows(B.device) for part in self.parts])
        return blocks.new_zeros(self.out_features, blocks.shape[1]).index_copy(0, rows, blocks)


class Kind(Protocol):
    """A sort of layer, as what an [out, inp] matrix needs. B is [out, R], A is [R, inp], M is [out, inp].

    Attributes:
        rowwise: whether its input comes in rows [..., inp], one for every row of its output.
    """

    @property
    def rowwise(self) -> bool: ...

    def size(self, layer: Any) -> tuple[int, int]:
        """(out, inp)."""
        ...

    def matrix(self, layer: Any) -> Tensor:
        """The weight as [out, inp]: a view, or of a packed layer made anew."""
        ...

    def weight(self, layer: Any, M: Tensor) -> Tensor:
        """A matrix [out, inp] in the layout of the layer's own weight."""
        ...

    def broadcast_over_rows(self, v: Tensor) -> Tensor:
        """A vector [out], shaped to broadcast over the layer's output."""
        ...

    def run(self, layer: Any, x: Tensor, M: Tensor, b: Tensor | None) -> Tensor:
        """The layer's function of x with another matrix and bias: the specification of every fast path."""
        ...

    def add(self, layer: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float, dropout: float) -> Tensor:
        """y + s * layer(dropout(x); B A) by way of the R-wide middle, never forming B A."""
        ...
