"""LoRA+: B learns `ratio` times faster than A.

In the limit of wide layers both factors learn features only if lr_B / lr_A grows with the width; equal rates leave
one of them lazy. The rate that is given is A's.

Hayou et al. 2024, arXiv:2402.12354, section 4.

Differs from the authors' code: a tensor belongs to its role's group, never to one guessed from its name or number
of dimensions (there, biases and norms land in B's group, and embeddings in one of their own at 1e-6).
"""

from __future__ import annotations

from typing import Any

from lorary.preset import preset


@preset(
    "lora+",
    citation="Hayou et al. 2024, arXiv:2402.12354",
    aliases=("loraplus",),
    lr=1e-4,
    when="For fewer steps at no cost, where the learning rate can be tuned.",
)
def loraplus(ratio: float = 16.0) -> dict[str, Any]:
    """lr_B = ratio * lr_A

    Args:
        ratio: of B's learning rate to A's, at least 1 in the paper; larger for harder tasks.
    """
    return {"lr": {"B": ratio}}
