"""Full fine-tuning: y = W x + b, where everything trains.

The baseline that the family is measured against.
"""

from __future__ import annotations

from typing import Any

from lorary.spec.presets import preset


@preset(
    "full",
    citation="the baseline",
    aliases=("full-fine-tuning", "fft"),
    adapts=False,
    lr=2e-5,
    when="As the reference for an adapter, if memory allows it.",
)
def full() -> dict[str, Any]:
    """y = W x + b, everything trains"""
    return {"full": ("*",)}
