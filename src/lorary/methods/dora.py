"""DoRA: W' = diag(m) (W + s B A) / ||W + s B A||, with the norm of every output row.

The weight is split into a magnitude per output, m, which trains by itself, and a direction, which LoRA updates. The
norm is a constant in the backward pass, as published; `exact` differentiates through it.

Liu et al. 2024, arXiv:2402.09353, equations 5 and 11 (their W is the transpose of ours: their columns are our rows).

The norm is computed from the factors (`lorary.kernels.row_norms`) and the weight as it is stored, in every forward
pass: no cheap check reveals that a tensor was written. Inside `lorary.cached` it is computed once. Dropout acts on the
input of everything that the magnitude scales: y = W x + b + (g - 1) W x~ + g s B A x~ with g = m / ||W + s B A||, as in
the authors' code. The bias is not part of the direction and is never scaled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorary.kernels.row_norms import row_norms, scale_rows
from lorary.spec.fields import FLAG
from lorary.spec.interfaces import Factors, Join, Layer, Shapes, Tensors, component
from lorary.spec.presets import Restriction, preset
from lorary.spec.site import Site


@component
class MagnitudeDirection(Join):
    """W' = diag(m) V / ||V|| with V = W + s B A: a norm and a magnitude for every output row.

    Args:
        exact: differentiate through the norm instead of holding it constant; the gradient of V is then orthogonal
            to V.
    """

    exact: bool = field(default=False, metadata=FLAG)

    roles = frozenset({"m"})
    per_expert = True

    def shapes(self, site: Site) -> Shapes:
        return {"m": (site.out_features,)}

    def setup(self, layer: Layer, generator: torch.Generator) -> None:
        layer.params["m"].copy_(self._norms(layer))

    def forward(self, layer: Layer, x: Tensor) -> Tensor:
        norms = self._norms(layer) if self.exact else layer.once("norms", lambda: self._norms(layer))
        gain, bias = layer.params["m"] / norms, layer.bias
        if not layer.kind.rowwise:
            along = layer.kind.broadcast_over_rows
            gain, bias = along(gain), None if bias is None else along(bias)
        if not layer.dropout or not x.is_floating_point():
            return scale_rows(layer.add_delta(layer.run_base(x), x), gain, bias)
        dropped = F.dropout(x, layer.dropout)
        v = layer.run_base(dropped)
        undropped: Tensor = layer.run_base(x) - v  # W (x - x~): not scaled
        return undropped + scale_rows(layer.add_delta(v, dropped, dropout=0.0), gain, bias)

    def merged(self, params: Tensors, W: Tensor, b: Tensor | None, BA: Factors) -> tuple[Tensor, Tensor | None]:
        B, A = BA
        gain = params["m"].to(W.dtype) / row_norms(W, *BA, 1.0)
        return gain[:, None] * (W + B @ A), b

    def on_output(
        self, params: Tensors, W: Callable[[], Tensor], b: Callable[[], Tensor | None], BA: Factors
    ) -> tuple[Factors, Tensor | None, Tensor | None]:
        weight = W()
        return BA, params["m"].to(weight.dtype) / row_norms(weight, *BA, 1.0), None

    def _norms(self, layer: Layer) -> Tensor:
        """[out] ||W + s B A||, as a constant unless `exact`."""
        if self.exact:
            return row_norms(layer.matrix.detach(), *layer.factors(), layer.scale, layer.weight_times)
        with torch.no_grad():
            return row_norms(layer.matrix, *layer.factors(), layer.scale)


@preset(
    "dora",
    citation="Liu et al. 2024, arXiv:2402.09353",
    lr=1e-4,
    when="When quality matters more than the time of a step; half of LoRA's rank is often enough.",
    answers={"quality=best": {}},
    restrictions={
        "lora+": "the ratio is between B and A; m learns at A's rate",
        "lora-fa": Restriction(
            "most of the memory saved is lost: the gradient of the magnitude needs the layer's output", advised=False
        ),
    },
)
def dora(exact: bool = False) -> dict[str, Any]:
    """y = diag(m) (W + s B A) x / ||W + s B A|| + b

    Args:
        exact: differentiate through the norm instead of holding it constant as the paper does.
    """
    return {"join": MagnitudeDirection(exact)}
