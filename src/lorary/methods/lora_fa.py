"""LoRA-FA: y = W x + b + s B A x, with A frozen at its random start.

Only B trains, which saves activation memory: without a gradient for A the backward pass needs the r numbers A x per
token instead of the layer's input. The update stays in the row space of A.

Zhang et al. 2023, arXiv:2308.03303, section 3.
"""

from __future__ import annotations

from typing import Any

from lorary.spec.presets import preset


@preset(
    "lora-fa",
    citation="Zhang et al. 2023, arXiv:2308.03303",
    lr=4e-4,
    when="When activations do not fit into memory.",
    answers={"memory=tight": {}},
)
def lora_fa() -> dict[str, Any]:
    """y = W x + b + s B A x, A frozen"""
    return {"frozen": frozenset({"A"})}
