"""rsLoRA: LoRA with s = alpha / sqrt(r).

The update keeps its size as r grows, so that a high rank learns no slower than a low one: after one step the output
moves in proportion to s^2 r.

Kalajdzievski 2023, arXiv:2312.03732, theorem 3.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from lorary.fields import POSITIVE
from lorary.preset import preset
from lorary.words import word


@word
@dataclass(frozen=True)
class BySqrtRank:
    """s = alpha / sqrt(r)."""

    alpha: float = field(metadata=POSITIVE)

    def __call__(self, r: int) -> float:
        return self.alpha / math.sqrt(r)


@preset(
    "rslora",
    citation="Kalajdzievski 2023, arXiv:2312.03732",
    when="For a high rank, 64 and more, where LoRA's update fades.",
)
def rslora(alpha: float = 32.0) -> dict[str, Any]:
    """y = W x + b + (alpha / sqrt(r)) B A x

    Args:
        alpha: the same for every rank; going from LoRA to rsLoRA multiplies s by sqrt(r), so retune the rate.
    """
    return {"scale": BySqrtRank(alpha)}
