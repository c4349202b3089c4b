"""BitFit: y = W x + b, where only b trains.

All biases train, those of the normalisations included, and nothing else. A model without biases (Llama and its kin)
has nothing to train, and the plan says so.

Ben Zaken et al. 2021, arXiv:2106.10199.
"""

from __future__ import annotations

from typing import Any

from lorary.spec.presets import Restriction, preset


@preset(
    "bitfit",
    citation="Ben Zaken et al. 2021, arXiv:2106.10199",
    adapts=False,
    lr=1e-3,
    when="For little data on a model that has biases, or beside an adapter.",
    restrictions={
        "alora": "the biases act before the invocation too, so the base's cache does not fit",
        "qlora": "the biases train beside quantised weights",
        "o-lora": Restriction("for the last task only: trained biases cannot stay under a later task", advised=False),
    },
)
def bitfit() -> dict[str, Any]:
    """y = W x + b, b trains"""
    return {"full": ("bias",)}
