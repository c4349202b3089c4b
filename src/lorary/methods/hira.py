"""HiRA: y = (W + W * (B A)) x + b, where * multiplies element by element.

The product of LoRA's factors multiplies the weight element by element instead of being added to it. With as many
parameters as LoRA, the update W * (B A) has a rank of up to r rank(W). There is no alpha. A zero in W stays zero.

Huang et al. 2025, ICLR, openreview:TwJrTz9cRS, equation 6 (their A [out, r] is our B, their B our A). Rank 32, the
learning rate 1e-3 and the start are the paper's (sections 4.3 and 5.1; its table 7 has 1e-4 and 2e-4) and those of the
authors' command.

It is GLoRA's term A alone, with another start. No matrix of W's size is kept for backward: W * (B A) is computed again
there, of a quantised weight from its codes.

The paper takes a merged weight apart by dividing it by 1 + B A, which has no inverse where that is zero, and rounds
elsewhere: lorary keeps the original weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Any

import torch
from torch import Tensor

from lorary.errors import Diagnostic, MethodError
from lorary.methods.glora import low_rank_scaled
from lorary.methods.lora import ConstantScale, LowRank
from lorary.spec.fields import COUNT
from lorary.spec.interfaces import Delta, Factors, Join, Layer, Shapes, Tensors, component
from lorary.spec.presets import Restriction, preset
from lorary.spec.site import Site


@component
class HadamardFactors(Delta):
    """B [out, r] and A [r, in], which the join multiplies W by; every part of a fused site has its own pair."""

    r: int = field(metadata=COUNT)

    roles = frozenset({"A", "B"})
    join_roles = roles

    def shapes(self, site: Site) -> Shapes:
        return LowRank(self.r).shapes(site)

    def factors(self, site: Site, params: Tensors) -> Factors:
        """Nothing is added to W: factors of rank 0."""
        A = params["A"]
        return A.new_zeros(site.out_features, 0), A.new_zeros(0, site.in_features)


@component
class TimesWeight(Join):
    """W' = W + W * (B A), b' = b. The weight of a convolution is its kernel as [out, in]."""

    uses = frozenset({"A", "B"})

    def whole(self, site: Site, params: Tensors) -> Tensors:
        return {**params, "B": site.place(params["B"])}

    def forward(self, layer: Layer, x: Tensor) -> Tensor:
        params = self.whole(layer.site, layer.params)
        return low_rank_scaled(layer, x, params["B"], params["A"], dropout=layer.dropout)

    def merged(self, params: Tensors, W: Tensor, b: Tensor | None, BA: Factors) -> tuple[Tensor, Tensor | None]:
        return torch.addcmul(W, W, params["B"].to(W.dtype) @ params["A"].to(W.dtype)), b

    def on_output(
        self, params: Tensors, W: Callable[[], Tensor], b: Callable[[], Tensor | None], BA: Factors
    ) -> tuple[Factors, Tensor | None, Tensor | None]:
        what = "W * (B A) has a rank far above r: HiRA is not a low-rank change of W with a gain for every output"
        raise MethodError("", [Diagnostic("join", what, "merge it into the base")])


@preset(
    "hira",
    citation="Huang et al. 2025, ICLR, openreview:TwJrTz9cRS",
    lr=1e-3,
    when="For a high-rank update with as many parameters as LoRA, if the adapter will be merged.",
    restrictions={
        "lora+": "the ratio comes from an analysis of B A x, not of W * (B A)",
        "lora-fa": Restriction(
            "it saves no activations: the gradient of B needs the layer's input, not A x alone", advised=False
        ),
    },
)
def hira(r: int = 32) -> dict[str, Any]:
    """y = (W + W * (B A)) x + b, * element by element

    Args:
        r: the rank of B A.
    """
    return {"delta": HadamardFactors(r), "scale": ConstantScale(1.0), "join": TimesWeight()}
