"""The site of an adapter: the path, kind and size of a layer, as plain data."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lorary._deprecated import RenamedAttribute

PARAMETERS = ("experts", "in_projection")
"""The kinds of sites that are parameters of the plain model, not modules; the site has the parameter's name."""
PROJECTIONS = ("in_projection", "out_projection")
"""The kinds of sites of nn.MultiheadAttention, whose forward in PyTorch reads their weights and never calls them."""
_LINEAR_INSIDE = ("experts", *PROJECTIONS)
EACH, SHARED = "each", "shared"  # an adapter for each expert of a block, or one for all


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
    """An adapted layer, as plain data.

    Args:
        name: the module's path in the model, such as `model.layers.0.self_attn.q_proj`.
        kind: `linear`, `transposed` (GPT-2's Conv1D), `conv1d`, `conv2d`, `conv3d`, `embedding` or `experts`; or
            `in_projection` and `out_projection` of nn.MultiheadAttention.
        out_features: rows of the weight matrix: output features, channels, or the embedding's width.
        in_features: columns: input features, input channels per group times the kernel's size, or the vocabulary.
        bias: whether the layer has a bias.
        parts: the separately adapted projections of a fused weight; empty for the whole weight.
        groups: the convolution's groups; 1 elsewhere.
        kernel_size: the convolution's kernel size; empty elsewhere.
        experts: E where the weight holds one matrix of each expert of a block; 0 elsewhere. The name is then that of
            the fused parameter, such as `model.layers.0.mlp.experts.down_proj`, and the sizes are of one expert.
        swapped: whether the class of these experts stores [E, in, out] and does not say so (Llama 4): PEFT takes their
            inputs for their outputs.
        one_adapter: whether all experts share one adapter, in place of one for each.
    """

    name: str
    kind: str
    out_features: int
    in_features: int
    bias: bool
    parts: tuple[Part, ...] = ()
    groups: int = 1
    kernel_size: tuple[int, ...] = ()
    experts: int = 0
    swapped: bool = False
    one_adapter: bool = False

    out = RenamedAttribute("out_features")
    inp = RenamedAttribute("in_features")
    window = RenamedAttribute("kernel_size")

    @cached_property
    def one(self) -> Site:
        """The site as a method's components see it: a linear layer, of a single expert or inside an attention."""
        if self.kind not in _LINEAR_INSIDE:
            return self
        return replace(self, kind="linear", experts=0, swapped=False, one_adapter=False)

    @property
    def adapters(self) -> int:
        """The leading dimension of its tensors: E where each expert has an adapter; 0 for an adapter without one."""
        return 0 if self.one_adapter else self.experts

    @property
    def whole(self) -> Site:
        """The site with one adapter for the whole matrix of each expert, or for the whole weight."""
        return replace(self, parts=(), one_adapter=False)

    @property
    def weight_name(self) -> str:
        """The name of the weight among the plain model's parameters."""
        return self.name if self.kind in PARAMETERS else f"{self.name}.weight"

    @property
    def numbers(self) -> int:
        """The numbers of the weight."""
        return max(self.experts, 1) * self.out_features * self.in_features

    @property
    def matrix(self) -> str:
        """The layer's matrix in words: `linear [64, 32]`. GPT-2's transposed layer is the same as a linear one."""
        if self.experts:
            return f"{self.experts} experts [{self.out_features}, {self.in_features}]"
        kind = "linear" if self.kind in ("transposed", *_LINEAR_INSIDE) else self.kind
        window = f", kernel {self.kernel_size}, {self.groups} groups" if self.kernel_size else ""
        return f"{kind} [{self.out_features}, {self.in_features}]{window}"

    @property
    def rows(self) -> list[int]:
        """The number of output rows of each part, or of the whole weight."""
        return [part.size * part.count for part in self.parts] or [self.out_features]

    def generator(self, seed: int, task_index: int = 0) -> torch.Generator:
        """The random numbers of this site: a function of the seed, its name and the task."""
        task = f"/{task_index}" if task_index else ""
        digest = hashlib.sha256(f"{seed}/{self.name}{task}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    def split(self, W: Tensor) -> list[Tensor]:
        """The rows [., in] of a weight [out, in], by part."""
        return [W[part.rows(W.device)] for part in self.parts] or [W]

    def part_rows(self, device: torch.device | None = None) -> Tensor:
        """The output rows of all parts, one part after the other: [rows] integers."""
        return torch.cat([part.rows(device) for part in self.parts])

    def place(self, B: Tensor) -> Tensor:
        """The parts' factors [rows of the parts, r] as one factor [out, parts * r], zero outside their blocks.

        Those of experts have a leading E.
        """
        if not self.parts:
            return B
        if B.dim() == 3:
            return torch.stack([self.place(expert) for expert in B])
        return self.place_rows(torch.block_diag(*B.split(self.rows)))

    def place_rows(self, M: Tensor) -> Tensor:
        """The rows of all parts [..., rows of the parts, n] as rows of the whole weight [..., out, n]; else zero."""
        if not self.parts:
            return M
        whole = M.new_zeros(*M.shape[:-2], self.out_features, M.shape[-1])
        return whole.index_copy(-2, self.part_rows(M.device), M)
