"""LoRA: y = W x + b + s B A x with s = alpha / r.

A trainable low-rank update is added to the frozen weight: A [r, in] projects down to r dimensions, B [out, r] back up.
Its components are the defaults of every other method.

Hu et al. 2021, arXiv:2106.09685, equation 3 (section 4.1). The distribution of A (the paper only says Gaussian) and
the reversed start of embeddings are those of the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import field
from typing import Any

import torch
from torch import Tensor, nn

from lorary.errors import Diagnostic, MethodError
from lorary.kernels.low_rank import add_low_rank
from lorary.spec.fields import COUNT, FLAG, POSITIVE
from lorary.spec.interfaces import Delta, Factors, Init, Join, Layer, Shapes, Tensors, component
from lorary.spec.presets import preset
from lorary.spec.resizable import PairsOfFactors
from lorary.spec.site import Site


@component
class LowRank(PairsOfFactors, Delta):
    """B [out, r] and A [r, in]; every part of a fused site has its own pair."""

    r: int = field(metadata=COUNT)

    roles = frozenset({"A", "B"})
    arbitrary_factors = True
    batched = True

    def shapes(self, site: Site) -> Shapes:
        return {"A": (self.r * len(site.rows), site.in_features), "B": (sum(site.rows), self.r)}

    def factors(self, site: Site, params: Tensors) -> Factors:
        return site.place(params["B"]), params["A"]

    def add(self, layer: Layer, y: Tensor, x: Tensor, dropout: float) -> Tensor:
        params = layer.params
        return add_low_rank(y, x, params["A"], params["B"], layer.scale, dropout)


@component
class Kaiming(Init):
    """A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0. An embedding starts the other way round: A = 0, B ~ N(0, 1).

    in is the number of inputs of a row of A: those of one slice if A is block-diagonal.
    """

    fills = frozenset({"A", "B"})

    def zeros(self, site: Site) -> frozenset[str]:
        return frozenset("A" if site.kind == "embedding" else "B")

    def __call__(self, params: Tensors, W: Tensor, site: Site, scale: float, generator: torch.Generator) -> None:
        if site.kind == "embedding":
            nn.init.zeros_(params["A"])
            nn.init.normal_(params["B"], generator=generator)
        else:
            nn.init.kaiming_uniform_(params["A"], a=math.sqrt(5), generator=generator)
            nn.init.zeros_(params["B"])


@component
class Gaussian(Init):
    """A ~ N(0, 1/r^2), B = 0: PEFT's reading of the paper's Gaussian. Embeddings start as under `Kaiming`."""

    fills = frozenset({"A", "B"})

    def zeros(self, site: Site) -> frozenset[str]:
        return Kaiming().zeros(site)

    def __call__(self, params: Tensors, W: Tensor, site: Site, scale: float, generator: torch.Generator) -> None:
        Kaiming()(params, W, site, scale, generator)
        if site.kind != "embedding":
            rank = params["B"].shape[1]
            nn.init.normal_(params["A"], std=1 / rank, generator=generator)


@component
class AlphaOverRank:
    """s = alpha / r."""

    alpha: float = field(metadata=POSITIVE)

    def __call__(self, r: int) -> float:
        return self.alpha / r


@component
class ConstantScale:
    """A constant s, independent of the rank, as after adapters were added or converted."""

    s: float = field(metadata=POSITIVE)

    def __call__(self, r: int) -> float:
        return self.s


@component
class Add(Join):
    """W' = W + s B A, b' = b."""

    adds_apart = True
    per_expert = True

    def forward(self, layer: Layer, x: Tensor) -> Tensor:
        return layer.add_delta(layer.run_base(x), x)

    def merged(self, params: Tensors, W: Tensor, b: Tensor | None, BA: Factors) -> tuple[Tensor, Tensor | None]:
        B, A = BA
        return torch.addmm(W, B, A), b

    def on_output(
        self, params: Tensors, W: Callable[[], Tensor], b: Callable[[], Tensor | None], BA: Factors
    ) -> tuple[Factors, Tensor | None, Tensor | None]:
        return BA, None, None


@component
class AddWithBias(Join):
    """W' = W + s B A, b' = b + s c: a bias c beside B, over the adapted rows (PEFT's `lora_bias`, 2024; no paper).

    It lets an adapter hold the biases of a model that was trained in full. c starts at zero, as in PEFT. Merging adds
    it to the layer's bias, which it creates where the layer has none; PEFT refuses to.
    """

    roles = frozenset({"c"})
    scaled = frozenset({"c"})
    adds_apart = True
    changes_bias = True

    def shapes(self, site: Site) -> Shapes:
        return {"c": (sum(site.rows),)}

    def whole(self, site: Site, params: Tensors) -> Tensors:
        return {**params, "c": site.place(params["c"][:, None]).sum(1)} if site.parts else params

    def setup(self, layer: Layer, generator: torch.Generator) -> None:
        nn.init.zeros_(layer.params["c"])

    def forward(self, layer: Layer, x: Tensor) -> Tensor:
        y = layer.add_delta(layer.run_base(x), x)
        c = layer.scale * self.whole(layer.site, layer.params)["c"]
        return y + layer.kind.broadcast_over_rows(c.to(y.dtype))

    def merged(self, params: Tensors, W: Tensor, b: Tensor | None, BA: Factors) -> tuple[Tensor, Tensor | None]:
        B, A = BA
        c = params["c"].to(W.dtype)
        return torch.addmm(W, B, A), c if b is None else b + c

    def on_output(
        self, params: Tensors, W: Callable[[], Tensor], b: Callable[[], Tensor | None], BA: Factors
    ) -> tuple[Factors, Tensor | None, Tensor | None]:
        return BA, None, params["c"].to(BA[0].dtype)

    def problems(self, site: Site) -> list[str]:
        return ["is an embedding, which has no bias: leave it out"] if site.kind == "embedding" else []


@preset(
    "lora",
    citation="Hu et al. 2021, arXiv:2106.09685",
    when="To begin with: the baseline of every other method.",
)
def lora(r: int = 16, alpha: float = 32.0, dropout: float = 0.0, lora_bias: bool = False) -> dict[str, Any]:
    """y = W x + b + (alpha / r) B A x

    Args:
        r: the rank.
        alpha: set it once, at the first rank tried; it need not be tuned for every rank.
        dropout: the probability of dropping an input of A in training.
        lora_bias: a trained bias beside B, scaled like B A; it merges into the layer's bias.
    """
    return {
        "delta": LowRank(r),
        "init": Kaiming(),
        "scale": AlphaOverRank(alpha),
        "join": AddWithBias() if _flag("lora_bias", lora_bias) else Add(),
        "dropout": dropout,
    }


def _flag(option: str, value: object) -> bool:
    """The value of an option that is on or off.

    Raises:
        MethodError: it is neither.
    """
    if not isinstance(value, bool):
        raise MethodError("invalid method:", [Diagnostic(option, f"is {value!r}; it takes {FLAG['expects']}")])
    return value
