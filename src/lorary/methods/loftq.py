"""LoftQ: y = Q x + b + s B A x, where Q in 4 bits and s B0 A0 of rank r together approximate W.

Q and s B A start at 0. In each of T rounds Q becomes the quantised W - s B A, and s B A the r largest singular
directions of the error W - Q. Training starts closer to the pretrained model than after quantising alone.

Li et al. 2023, arXiv:2310.08659, algorithm 1. T is 5, or 1, in the paper; the roots of the singular values are in both
factors as there. The division by s, which allows any alpha, is not in the paper, whose s is 1.

Differs from the paper: W - s B0 A0 is quantised once more after the last round, so that the start, which is saved,
determines the base. PEFT's `loftq` ignores s: with alpha other than r its model does not start near W.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any

import torch
from torch import Tensor

from lorary.layers.nf4 import NF4
from lorary.methods.pissa import exact_svd, start_by_parts, too_small
from lorary.spec.fields import COUNT
from lorary.spec.interfaces import Init, Tensors, component
from lorary.spec.presets import preset
from lorary.spec.site import Site


@component
class QuantizationErrorInit(Init):
    """The start at the r largest singular directions of the quantisation error; the parts of a fused weight by parts.

    Args:
        rounds: T, the alternations of quantisation and decomposition.
    """

    rounds: int = field(default=5, metadata=COUNT)

    fills = frozenset({"A", "B"})
    residual_init = True
    starts_at_error = True

    def __call__(self, params: Tensors, W: Tensor, site: Site, scale: float, generator: torch.Generator) -> None:
        r = params["B"].shape[1]

        def largest(part: Tensor) -> tuple[Tensor, Tensor]:
            U, S, Vh = exact_svd(part, r)
            root = (S / scale).sqrt()
            return U * root, root[:, None] * Vh

        start_by_parts(params, W, site, largest)

    def problems(self, site: Site, r: int) -> list[str]:
        return too_small(site, r, "singular directions")


@preset(
    "loftq",
    citation="Li et al. 2023, arXiv:2310.08659",
    when="Like QLoRA, if the loss from quantising the base shows at the start of training.",
    restrictions={"lora+": "the ratio was derived for B = 0 at the start: retune it"},
)
def loftq(rounds: int = 5) -> dict[str, Any]:
    """y = Dq(Wq) x + b + s B A x, Wq + s B0 A0 = W but for the smallest part

    Args:
        rounds: alternations of quantisation and decomposition.
    """
    return {"init": QuantizationErrorInit(rounds), "storage": NF4()}
