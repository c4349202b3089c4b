"""(IA)³: y = l * (W x + b) at the keys and values, y = W (l * x) + b at the end of a feed-forward block.

A vector rescales the activations of every adapted layer: the outputs of the key and value projections, and the inputs
of the feed-forward block's last layer. It starts at 1, and nothing else trains: L (d_k + d_v + d_ff) numbers. It merges
exactly, W' = diag(l) W with b' = l * b, or W' = W diag(l), and the merged model costs what the base does.

Liu et al. 2022, arXiv:2205.05638, section 3.3. Learning rate 3e-3, as published: a factor of about 1 must move by a few
percent to have an effect, and is alone in its layer. The authors train with Adafactor, a linear decay and 60 steps of
warm-up.

Scaling the outputs scales the bias too, as in PEFT; T5, which the paper is about, has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import field
from typing import Any

import torch
from torch import Tensor, nn

from lorary.errors import Diagnostic, MethodError
from lorary.layers.block_names import ends_feed_forward
from lorary.methods.lora import ConstantScale
from lorary.spec.fields import NAMES, optional
from lorary.spec.interfaces import Factors, Join, Layer, Shapes, Tensors, component
from lorary.spec.no_update import NoInit, NoUpdate
from lorary.spec.presets import preset
from lorary.spec.site import Site


@component
class Rescaling(Join):
    """y = l * (W x + b), or y = W (l_ff * x) + b at the end of a feed-forward block.

    Args:
        feed_forward: whole components at the end of the paths of the layers whose inputs are scaled; None: the last
            layers of feed-forward blocks, by the names that `mlp-output` knows.
    """

    feed_forward: tuple[str, ...] | None = field(default=None, metadata=optional(NAMES))

    roles = frozenset({"l", "l_ff"})
    supports_dropout = False
    adds_delta = False
    scales_bias = True
    per_expert = True
    targets = ("attention-kv", "mlp-output")

    def scales_input(self, name: str) -> bool:
        """Whether the vector of the layer of this name scales its inputs."""
        if self.feed_forward is None:
            return ends_feed_forward(name)
        return any(f".{name}".endswith(f".{end}") for end in self.feed_forward)

    def shapes(self, site: Site) -> Shapes:
        return {"l_ff": (site.in_features,)} if self.scales_input(site.name) else {"l": (sum(site.rows),)}

    def whole(self, site: Site, params: Tensors) -> Tensors:
        if not site.parts:  # inputs are scaled in whole layers only
            return params
        gain = params["l"]
        whole = gain.new_ones(*gain.shape[:-1], site.out_features)
        return {"l": whole.index_copy(-1, site.part_rows(gain.device), gain)}

    def setup(self, layer: Layer, generator: torch.Generator) -> None:
        for vector in layer.params.values():
            nn.init.ones_(vector)

    def forward(self, layer: Layer, x: Tensor) -> Tensor:
        params = self.whole(layer.site, layer.params)
        if "l_ff" in params:
            return layer.run_base((x * layer.kind.broadcast_over_rows(params["l_ff"])).to(x.dtype))
        y = layer.run_base(x)
        # a factor close to 1 would be rounded away in 16 bits
        return (y * layer.kind.broadcast_over_rows(params["l"])).to(y.dtype)

    def merged(self, params: Tensors, W: Tensor, b: Tensor | None, BA: Factors) -> tuple[Tensor, Tensor | None]:
        l_ff = params.get("l_ff")
        if l_ff is not None:
            return W * l_ff.to(W.dtype), b
        gain = params["l"].to(W.dtype)
        return gain[:, None] * W, None if b is None else gain * b

    def on_output(
        self, params: Tensors, W: Callable[[], Tensor], b: Callable[[], Tensor | None], BA: Factors
    ) -> tuple[Factors, Tensor | None, Tensor | None]:
        if "l_ff" in params:
            what = "scales the inputs: W diag(l_ff) - W has full rank, so this is no low-rank change with a gain"
            raise MethodError("", [Diagnostic("l_ff", what, "merge it into the base")])
        gain, bias = params["l"].float(), b()
        return BA, gain, None if bias is None else (gain - 1) * bias

    def problems(self, site: Site) -> list[str]:
        if not self.scales_input(site.name):
            return []
        if site.kind not in ("linear", "transposed"):
            return [f"(IA)³ scales the inputs of linear layers only: name this {site.kind} in no `feed_forward`"]
        return ["(IA)³ scales the inputs of whole layers, not of single projections"] if site.parts else []


@preset(
    "ia3",
    aliases=("(ia)3", "(ia)³", "ia³"),
    citation="Liu et al. 2022, arXiv:2205.05638",
    lr=3e-3,
    when="For few examples and very many tasks: few numbers, and no cost after merging.",
)
def ia3(feed_forward: str | Sequence[str] | None = None) -> dict[str, Any]:
    """y = l * (W x + b) at k and v; y = W (l * x) + b at the end of the feed-forward block

    Args:
        feed_forward: names of the layers whose inputs are scaled; None: those that `mlp-output` knows.
    """
    names = (feed_forward,) if isinstance(feed_forward, str) else feed_forward
    return {
        "delta": NoUpdate(),
        "init": NoInit(),
        "scale": ConstantScale(1.0),
        "join": Rescaling(tuple(names) if isinstance(names, Sequence) else names),
    }
