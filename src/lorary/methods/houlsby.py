"""Houlsby adapters: y = h + W2 phi(W1 h + b1) + b2 with h = W x + b, after the attention and feed-forward blocks.

A two-layer network with a narrow middle of m numbers transforms the output of each block's last layer, before the
residual sum. The normalisations train as well. phi is not linear, so that no weight has the same function: these
adapters cannot be merged, and every forward pass runs their two products one after the other.

Houlsby et al. 2019, arXiv:1902.00751, section 2.1 and figure 2; 2 L (2 m d + d + m) numbers besides the normalisations.
The biases, the start (a truncated normal of deviation 1e-3) and GELU are those of the authors' code. One adapter in
each layer, after the feed-forward block, is Pfeiffer et al. 2020, arXiv:2005.00247: `position="feed-forward"`.

Differs from the authors' code: the adapter stands before the block's dropout, not after it. Without dropout, as in
evaluation, both are the same function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorary.errors import Diagnostic, MethodError
from lorary.methods.lora import ConstantScale
from lorary.spec.fields import COUNT, FLAG, one_of
from lorary.spec.interfaces import Join, Layer, Shapes, component
from lorary.spec.no_update import NoInit, NoUpdate
from lorary.spec.presets import preset
from lorary.spec.site import Site

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
_POSITIONS = {"both": ("attention-output", "mlp-output"), "feed-forward": ("mlp-output",)}
_STD = 1e-3  # of the authors' code


@component
class Bottleneck(Join):
    """y = h + W2 phi(W1 h + b1) + b2 with h = W x + b, W1 [m, out] and W2 [out, m].

    Args:
        m: the width of the middle.
        activation: phi.
        position: both, after attention and the feed-forward block, or feed-forward, after the latter alone.
    """

    m: int = field(default=64, metadata=COUNT)
    activation: str = field(default="gelu", metadata=one_of(*_ACTIVATIONS))
    position: str = field(default="both", metadata=one_of(*_POSITIONS))

    roles = frozenset({"W1", "b1", "W2", "b2"})
    supports_dropout = False
    adds_delta = False
    why_not_merged = "transforms the layer's output by a non-linear network, which no weight and bias can"
    exact_start = False

    @property
    def targets(self) -> tuple[str, ...]:  # type: ignore[override]
        return _POSITIONS.get(self.position, ())

    def shapes(self, site: Site) -> Shapes:
        out, m = site.out_features, self.m
        return {"W1": (m, out), "b1": (m,), "W2": (out, m), "b2": (out,)}

    def setup(self, layer: Layer, generator: torch.Generator) -> None:
        for role in ("W1", "W2"):
            drawn = torch.empty(layer.params[role].shape, device="cpu")  # the same numbers on every machine
            nn.init.trunc_normal_(drawn, std=_STD, a=-2 * _STD, b=2 * _STD, generator=generator)
            layer.params[role].copy_(drawn)

    def forward(self, layer: Layer, x: Tensor) -> Tensor:
        h, params = layer.run_base(x), layer.params
        W1, b1, W2, b2 = (params[role].to(h.dtype) for role in ("W1", "b1", "W2", "b2"))
        middle = _ACTIVATIONS[self.activation](F.linear(h, W1, b1))
        return h + F.linear(middle, W2, b2)

    def problems(self, site: Site) -> list[str]:
        if site.kind not in ("linear", "transposed"):
            return [f"a bottleneck adapter transforms the output of a linear layer, and this is of kind {site.kind}"]
        return ["a bottleneck adapter transforms the whole output, not single projections"] if site.parts else []


@preset(
    "houlsby",
    aliases=("adapters", "bottleneck", "houlsby adapters", "bottleneck adapters"),
    citation="Houlsby et al. 2019, arXiv:1902.00751",
    lr=3e-4,
    when="As the baseline that LoRA is compared with; it stays beside the model and slows it down.",
)
def houlsby(m: int = 64, activation: str = "gelu", position: str = "both", norms: bool = True) -> dict[str, Any]:
    """y = h + W2 phi(W1 h + b1) + b2, h = W x + b; normalisations train

    Args:
        m: the width of the bottleneck.
        activation: phi: gelu, relu, silu or tanh.
        position: both, after attention and the feed-forward block; or feed-forward, after the latter alone (Pfeiffer).
        norms: train the normalisations in full.
    """
    if not FLAG["check"](norms):
        what = f"is {norms!r}; it takes {FLAG['expects']}"
        raise MethodError("invalid method:", [Diagnostic("norms", what)])
    return {
        "delta": NoUpdate(),
        "init": NoInit(),
        "scale": ConstantScale(1.0),
        "join": Bottleneck(m, activation, position),
        "full": ("norms",) if norms else (),
    }
