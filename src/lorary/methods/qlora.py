"""QLoRA: y = Dq(Wq) x + b + s B A x, with the base weight in 4 bits and the adapter in 32.

Gradients pass through the dequantised weight, and only the adapter trains. Every linear layer but the output head is
quantised, adapted or not, and the fused matrices of experts are.

Dettmers et al. 2023, arXiv:2305.14314, equations 5 and 6; `lorary.layers.nf4` is their NF4.

Differs from the paper: products are computed in the dtype of the layer's input unless `compute` says otherwise.
"""

from __future__ import annotations

from typing import Any

from lorary.errors import Diagnostic, MethodError, did_you_mean
from lorary.layers.bitsandbytes import BnbNF4
from lorary.layers.nf4 import NF4
from lorary.spec.presets import preset

_BACKENDS = ["lorary", "bitsandbytes"]


@preset(
    "qlora",
    citation="Dettmers et al. 2023, arXiv:2305.14314",
    when="When the base does not fit into memory: it takes a quarter of its size in 16 bits.",
    answers={"memory=short": {}},
)
def qlora(
    double: bool = True,
    block: int = 64,
    compute: str | None = None,
    embeddings: bool = False,
    experts: bool = True,
    backend: str = "lorary",
) -> dict[str, Any]:
    """y = Dq(Wq) x + b + s B A x, Wq = W in 4 bits

    Args:
        double: quantise the scale of every block as well, to 8 bits.
        block: numbers that share a scale.
        compute: the dtype of the products (float32, bfloat16, float16); None: the input's.
        embeddings: quantise the token embeddings as well, unless they are tied to another layer.
        experts: quantise fused experts as well; bitsandbytes cannot.
        backend: `lorary`, or `bitsandbytes` if it is installed; the codes are the same.
    """
    if problems := _problems(embeddings, backend):
        raise MethodError("invalid method:", problems)
    if backend == "bitsandbytes":
        return {"storage": BnbNF4(block, double, compute)}
    return {"storage": NF4(block, double, compute, embeddings, experts)}


def _problems(embeddings: bool, backend: str) -> list[Diagnostic]:
    """The invalid or unsupported options of a backend."""
    if backend not in _BACKENDS:
        return [Diagnostic("backend", f"{backend!r} is unknown", did_you_mean(str(backend), _BACKENDS))]
    if embeddings and backend == "bitsandbytes":
        what = "bitsandbytes cannot save an embedding that it has quantised"
        return [Diagnostic("embeddings", what, "set backend='lorary', or embeddings=False")]
    return []
