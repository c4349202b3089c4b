"""BitFit: only the biases train, all of them, those of the normalisations included.

Ben Zaken et al. 2021, arXiv:2106.10199. Models without biases (Llama and its kin) have nothing to train: the plan
says so instead of training nothing.
"""

from __future__ import annotations

from typing import Any

from lorary.preset import preset


@preset(
    "bitfit",
    citation="Ben Zaken et al. 2021, arXiv:2106.10199",
    adapts=False,
    lr=1e-3,
    when="For little data on a model that has biases, or beside an adapter.",
)
def bitfit() -> dict[str, Any]:
    """y = W x + b, b trains"""
    return {"full": ("bias",)}
