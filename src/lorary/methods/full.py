"""Full fine-tuning: every base parameter trains. What the family is measured against."""

from __future__ import annotations

from typing import Any

from lorary.preset import preset


@preset(
    "full",
    citation="the baseline",
    aliases=("full-fine-tuning", "fft"),
    adapts=False,
    lr=2e-5,
    when="To see what an adapter should reach, where memory allows it.",
)
def full() -> dict[str, Any]:
    """y = W x + b, everything trains"""
    return {"full": ("*",)}
