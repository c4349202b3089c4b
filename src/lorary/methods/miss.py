"""MiSS: y = W x + b + D (x_1 + ... + x_g), where x_1 ... x_g are the shards of r inputs that make up x.

A single matrix D [out, r], initialised to zero, is trained: the update repeats it for every r columns. The sum of the
shards takes the place of LoRA's A x and needs no matrix product; its r numbers per token are all that the backward pass
keeps of the input. There is no alpha: D learns its own scale. As a LoRA of rank r, A is a row of g identity matrices.

Kang and Yin 2024, arXiv:2409.15371 (first called Bone, then DiSHA), equations 4 to 7, which the paper calls MiSS^e; the
authors' code and PEFT compute this form alone. The paper's sentence before equation 4 divides x into r blocks of size
k / r instead; its equations, its figure and the code have blocks of size r. r = 64 and a learning rate of 2e-5 are
those of the authors' scripts.

If r does not divide the inputs, the last shard is shorter, as in PEFT, which pads it with zeros.

Differs from the authors' code: their variant BAT, which multiplies D with the weight, is left out.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorary.kernels.low_rank import without_autocast
from lorary.methods.lora import ConstantScale
from lorary.spec.fields import COUNT, optional
from lorary.spec.interfaces import Delta, Factors, Init, Layer, Shapes, Tensors, component
from lorary.spec.presets import preset
from lorary.spec.site import Site


@component
class SharedShards(Delta):
    """D [out, r], or D [mini_r, r] repeated down the outputs; every part of a fused site has its own rows.

    Args:
        r: the inputs of a shard.
        mini_r: the rows of D, which must divide every layer's outputs; None: one row for each output.
    """

    r: int = field(metadata=COUNT)
    mini_r: int | None = field(default=None, metadata=optional(COUNT))

    roles = frozenset({"D"})
    batched = True

    def shapes(self, site: Site) -> Shapes:
        rows = sum(site.rows) if self.mini_r is None else self.mini_r * len(site.rows)
        return {"D": (rows, self.r)}

    def factors(self, site: Site, params: Tensors) -> Factors:
        B = site.place_rows(self._all_rows(site, params["D"]))  # parts share the sums, and need no ranks of their own
        shards = -(-site.in_features // self.r)
        A = torch.eye(self.r, dtype=B.dtype, device=B.device).repeat(1, shards)[:, : site.in_features]
        return B, A.expand(*B.shape[:-2], -1, -1).contiguous()

    def _all_rows(self, site: Site, D: Tensor) -> Tensor:
        """[..., rows of the parts, r]: D with each of its rows as often as it stands for."""
        if self.mini_r is None:
            return D
        parts = zip(D.split(self.mini_r, -2), site.rows, strict=True)
        return torch.cat([rows.repeat(*[1] * (D.dim() - 2), n // self.mini_r, 1) for rows, n in parts], -2)

    def add(self, layer: Layer, y: Tensor, x: Tensor, dropout: float) -> Tensor:
        B = self._all_rows(layer.site, layer.params["D"])
        with without_autocast(y.device):
            sums = shard_sums(F.dropout(x, dropout).to(y.dtype), self.r)
            total = torch.addmm(_rows(y), _rows(sums), B.to(y.dtype).t(), alpha=layer.scale)
        return total.view(y.shape)

    def problems(self, site: Site) -> list[str]:
        if site.kind not in ("linear", "transposed"):
            return [f"MiSS sums the input features of linear layers, and this is of kind {site.kind}"]
        found = []
        if self.r > site.in_features:
            found.append(f"it has {site.in_features} inputs, fewer than one shard of r = {self.r}")
        if self.mini_r is not None:
            odd = sorted({n for n in site.rows if n % self.mini_r})
            found += [f"mini_r = {self.mini_r} does not divide its {n} output features" for n in odd]
        return found


def shard_sums(x: Tensor, r: int) -> Tensor:
    """The sum of x's shards of r features: x [..., in] to [..., r]. A last shard that is shorter counts as padded."""
    whole = x.shape[-1] // r * r
    sums: Tensor = x[..., :whole].unflatten(-1, (whole // r, r)).sum(-2)
    rest = x.shape[-1] - whole
    return sums + F.pad(x[..., whole:], (0, r - rest)) if rest else sums


def _rows(x: Tensor) -> Tensor:
    """[..., width] as [rows, width]."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


@component
class ZeroShards(Init):
    """D = 0."""

    fills = frozenset({"D"})

    def zeros(self, site: Site) -> frozenset[str]:
        return self.fills

    def __call__(self, params: Tensors, W: Tensor, site: Site, scale: float, generator: torch.Generator) -> None:
        nn.init.zeros_(params["D"])


@preset(
    "miss",
    aliases=("bone", "disha"),
    citation="Kang and Yin 2024, arXiv:2409.15371",
    lr=2e-5,
    when="For fast steps in little memory: one trained matrix per layer, and no inputs kept for backward.",
)
def miss(r: int = 64, mini_r: int | None = None) -> dict[str, Any]:
    """y = W x + b + D (x_1 + ... + x_g)

    Args:
        r: the inputs of a shard, and the rank: half as many parameters as LoRA of this rank where layers are square.
        mini_r: rows of D, which are repeated down the outputs; None: one for each output.
    """
    return {"delta": SharedShards(r, mini_r), "init": ZeroShards(), "scale": ConstantScale(1.0)}
