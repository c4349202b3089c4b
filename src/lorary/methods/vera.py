"""VeRA: y = W x + b + diag(b) B diag(d) A x, with A and B random, frozen and shared by all layers.

Only two vectors train at every site. A [r, the largest input] and B [the largest out, r] are one pair for the whole
model, and a layer uses its leading columns and rows. There is no alpha: b and d hold the scale.

Kopiczko et al. 2023, arXiv:2310.11454, equation 2. Start and slicing are those of PEFT, to which the authors' own code
points.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any

import torch
from torch import Tensor, nn

from lorary.kernels.shared_projection import add_shared_projection
from lorary.methods.lora import ConstantScale
from lorary.spec.fields import COUNT, FLAG, POSITIVE, SEED
from lorary.spec.interfaces import Delta, Factors, Init, Layer, Shapes, Tensors, component
from lorary.spec.presets import preset
from lorary.spec.site import Site


@component
class SharedProjectionDelta(Delta):
    """b [out] and d [r] around the shared B [out, r] and A [r, in]; every part of a fused site has its own b and d."""

    r: int = field(metadata=COUNT)

    roles = frozenset({"A", "B", "b", "d"})
    shared = frozenset({"A", "B"})

    def shapes(self, site: Site) -> Shapes:
        rows = site.rows
        return {
            "A": (self.r, site.in_features),
            "B": (max(rows), self.r),
            "b": (sum(rows),),
            "d": (self.r * len(rows),),
        }

    def factors(self, site: Site, params: Tensors) -> Factors:
        rows = site.rows
        pairs = zip(params["b"].split(rows), params["d"].split(self.r), strict=True)
        B = torch.cat([b[:, None] * params["B"][: len(b)] * d for b, d in pairs])
        return site.place(B), params["A"].repeat(len(rows), 1)

    def add(self, layer: Layer, y: Tensor, x: Tensor, dropout: float) -> Tensor:
        params = layer.tensors
        return add_shared_projection(
            y, x, params["A"], params["B"], params["b"], params["d"], layer.scale, dropout, layer.shared.last_product
        )


@component
class SharedProjectionInit(Init):
    """A, B ~ U(-sqrt(6 / fan), sqrt(6 / fan)) for all layers from one seed, d constant, b = 0.

    Args:
        seed: of A and B. Adapters of one seed, r and set of layers have the same A and B.
        d: the initial value of d.
        store_shared: whether files hold A and B; otherwise they are regenerated and checked against a checksum.
    """

    seed: int = field(default=0, metadata=SEED)
    d: float = field(default=0.1, metadata=POSITIVE)
    store_shared: bool = field(default=True, metadata=FLAG)

    fills = frozenset({"A", "B", "b", "d"})

    def zeros(self, site: Site) -> frozenset[str]:
        return frozenset({"b"})

    def share(self, shared: Tensors) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        for role in ("A", "B"):  # in this order, on the CPU, in 32 bits: the same numbers on every machine
            drawn = nn.init.kaiming_uniform_(torch.empty(shared[role].shape), generator=generator)
            shared[role].copy_(drawn)

    def __call__(self, params: Tensors, W: Tensor, site: Site, scale: float, generator: torch.Generator) -> None:
        nn.init.zeros_(params["b"])
        nn.init.constant_(params["d"], self.d)


@preset(
    "vera",
    citation="Kopiczko et al. 2023, arXiv:2310.11454",
    lr=4e-3,
    when="For very many adapters on one base, each of them tiny.",
    answers={"adapters=many": {"save_projections": False}},
)
def vera(r: int = 256, seed: int = 0, d: float = 0.1, save_projections: bool = True) -> dict[str, Any]:
    """y = W x + b + diag(b) B diag(d) A x, A and B random, frozen and shared

    Args:
        r: the rank, much larger than LoRA's: each adds only one trainable number to a layer.
        seed: of A and B.
        d: the initial value of d.
        save_projections: save A and B; otherwise they are regenerated from the seed.
    """
    return {
        "delta": SharedProjectionDelta(r),
        "init": SharedProjectionInit(seed, d, save_projections),
        "scale": ConstantScale(1.0),
        "frozen": frozenset({"A", "B"}),
    }
