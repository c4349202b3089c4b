"""QLoRA: y = Dq(Wq) x + b + s B A x, the base kept in 4 bits a number and the adapter beside it in 32.

The gradient goes through the packed weight to what comes before; only the adapter is trained. Every linear layer is
packed, adapted or not, but the output head.

Dettmers et al. 2023, arXiv:2305.14314, equations 5 and 6; `lorary.storage.nf4` is their NF4.

Differs from the paper: the products are taken in the precision of the layer's input, where nothing else is said.
"""

from __future__ import annotations

from typing import Any

from lorary.errors import MethodError, Problem, did_you_mean
from lorary.preset import preset
from lorary.storage.bnb_nf4 import BnbNF4
from lorary.storage.nf4 import NF4

_BACKENDS = ["lorary", "bitsandbytes"]


@preset(
    "qlora",
    citation="Dettmers et al. 2023, arXiv:2305.14314",
    when="When the base does not fit in memory: it takes a quarter of what it takes in 16 bits.",
)
def qlora(
    double: bool = True,
    block: int = 64,
    compute: str | None = None,
    embeddings: bool = False,
    backend: str = "lorary",
) -> dict[str, Any]:
    """y = Dq(Wq) x + b + s B A x, Wq = W in 4 bits a number

    Args:
        double: keep the largest value of every block in 8 bits as well, instead of in 32.
        block: how many numbers share a largest value.
        compute: the precision of the products (float32, bfloat16, float16); None takes that of the input.
        embeddings: pack the token embeddings, too, where no other layer has the same weight.
        backend: who computes with the same codes: `lorary`, or `bitsandbytes` where it is installed.
    """
    if problems := _problems(embeddings, backend):
        raise MethodError("invalid method:", problems)
    if backend == "bitsandbytes":
        return {"storage": BnbNF4(block, double, compute)}
    return {"storage": NF4(block, double, compute, embeddings)}


def _problems(embeddings: bool, backend: str) -> list[Problem]:
    """What a backend does not know."""
    if backend not in _BACKENDS:
        return [Problem("backend", f"{backend!r} is unknown", did_you_mean(str(backend), _BACKENDS))]
    if embeddings and backend == "bitsandbytes":
        what = "bitsandbytes cannot save an embedding that it has packed"
        return [Problem("embeddings", what, "set backend='lorary', or leave the embeddings plain")]
    return []
