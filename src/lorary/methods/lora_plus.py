"""LoRA+: lr_B = ratio * lr_A.

B learns faster than A. In the limit of wide layers both factors learn features only if lr_B / lr_A grows with the
width; with equal rates one of them is lazy. The learning rate that is configured is A's.

Hayou et al. 2024, arXiv:2402.12354, section 4.

Differs from the authors' code: a tensor's group follows from its role, never from its name or its number of dimensions
(there, biases and norms land in B's group, and embeddings in one of their own at 1e-6).
"""

from __future__ import annotations

from typing import Any

from lorary.spec.presets import preset


@preset(
    "lora+",
    citation="Hayou et al. 2024, arXiv:2402.12354",
    aliases=("loraplus",),
    lr=1e-4,
    when="For fewer steps at no extra cost, if the learning rate can be tuned.",
    answers={"convergence=fast": {}},
)
def loraplus(ratio: float = 16.0) -> dict[str, Any]:
    """lr_B = ratio * lr_A

    Args:
        ratio: B's learning rate over A's, at least 1 in the paper; larger for harder tasks.
    """
    return {"lr": {"B": ratio}}
