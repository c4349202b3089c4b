"""LoRA-FA: LoRA with A frozen at its random start; only B trains.

What it saves is memory for activations: without a gradient for A the layer's input is not kept for the backward
pass, only the r numbers A x per token. The update stays in the row space of A.

Zhang et al. 2023, arXiv:2308.03303, section 3.
"""

from __future__ import annotations

from typing import Any

from lorary.preset import preset


@preset(
    "lora-fa",
    citation="Zhang et al. 2023, arXiv:2308.03303",
    lr=4e-4,
    when="When memory for activations is what runs out.",
)
def lora_fa() -> dict[str, Any]:
    """y = W x + b + s B A x, A frozen"""
    return {"frozen": frozenset({"A"})}
