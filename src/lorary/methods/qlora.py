"""QLoRA: y = Dq(Wq) x + b + s B A x, the base kept in 4 bits a number and the adapter beside it in 32.

The gradient goes through the packed weight to what comes before; only the adapter is trained. Every linear layer is
packed, adapted or not, but the output head.

Dettmers et al. 2023, arXiv:2305.14314, equations 5 and 6; `lorary.storage.nf4` is their NF4.

Differs from the paper: the products are taken in the precision of the layer's input, where nothing else is said.
"""

from __future__ import annotations

from typing import Any

from lorary.preset import preset
from lorary.storage.nf4 import NF4


@preset(
    "qlora",
    citation="Dettmers et al. 2023, arXiv:2305.14314",
    when="When the base does not fit in memory: it takes a quarter of what it takes in 16 bits.",
)
def qlora(double: bool = True, block: int = 64, compute: str | None = None, embeddings: bool = False) -> dict[str, Any]:
    """y = Dq(Wq) x + b + s B A x, Wq = W in 4 bits a number

    Args:
        double: keep the largest value of every block in 8 bits as well, instead of in 32.
        block: how many numbers share a largest value.
        compute: the precision of the products (float32, bfloat16, float16); None takes that of the input.
        embeddings: pack the token embeddings, too, where no other layer has the same weight.
    """
    return {"storage": NF4(block, double, compute, embeddings)}
