"""rsLoRA: y = W x + b + s B A x with s = alpha / sqrt(r).

One optimizer step moves the output in proportion to s^2 r, so this scale keeps the size of the update independent of
the rank: a high rank learns no more slowly than a low one.

Kalajdzievski 2023, arXiv:2312.03732, theorem 3.2.
"""

from __future__ import annotations

import math
from dataclasses import field
from typing import Any

from lorary.spec.fields import POSITIVE
from lorary.spec.interfaces import component
from lorary.spec.presets import preset


@component
class AlphaOverSqrtRank:
    """s = alpha / sqrt(r)."""

    alpha: float = field(metadata=POSITIVE)

    def __call__(self, r: int) -> float:
        return self.alpha / math.sqrt(r)


@preset(
    "rslora",
    citation="Kalajdzievski 2023, arXiv:2312.03732",
    when="For ranks of 64 and more, at which LoRA's update fades.",
)
def rslora(alpha: float = 32.0) -> dict[str, Any]:
    """y = W x + b + (alpha / sqrt(r)) B A x

    Args:
        alpha: the same for every rank; switching from LoRA multiplies s by sqrt(r), so retune the learning rate.
    """
    return {"scale": AlphaOverSqrtRank(alpha)}
