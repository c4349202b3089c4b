"""PEFT's VERA: VeRA, with one pair of projections for all layers.

    <site>.vera_lambda_b  (out,)         <site>.vera_lambda_d  (r,)
    base_model.vera_A  (r, widest in)    base_model.vera_B  (widest out, r)

With `save_projection` false, the two projections are regenerated from `projection_prng_key`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from lorary.adapters.adapter import Adapter
from lorary.adapters.peft.config import PeftConfig
from lorary.adapters.peft.fields import PROBABILITY, RANK, SHARED, bias, field
from lorary.adapters.peft.types import PeftType, register
from lorary.adapters.shared_tensors import SharedTensors
from lorary.methods.lora import Add, ConstantScale
from lorary.methods.vera import SharedProjectionDelta, SharedProjectionInit
from lorary.spec.fields import FLAG, POSITIVE, SEED
from lorary.spec.method import Method


class Vera(PeftType):
    """W + diag(b) B diag(d) A of whole linear layers, with one rank for all."""

    name, title = "VERA", "VeRA"
    methods = ((SharedProjectionDelta, Add),)
    fields = SHARED | {
        "r": field(RANK, 256),
        "bias": bias("vera_only"),
        "vera_dropout": field(PROBABILITY, 0.0),
        "projection_prng_key": field(SEED, 0),
        "save_projection": field(FLAG, True),
        "d_initial": field(POSITIVE, 0.1),
        "init_weights": field(FLAG, True),
    }
    leaves = {"vera_lambda_b": "b", "vera_lambda_d": "d"}  # noqa: RUF012 (never written)
    shared = {"A": "vera_A", "B": "vera_B"}  # noqa: RUF012
    kinds = ("linear", "transposed")

    def to_method(self, config: PeftConfig, site: str = "") -> Method:
        init = SharedProjectionInit(config["projection_prng_key"], config["d_initial"], config["save_projection"])
        return _method(config["r"], init, config["vera_dropout"])

    def peft_incompatibilities(self, adapter: Adapter, shared: SharedTensors) -> list[str]:
        reasons = {
            "PEFT's VeRA adapts whole linear layers": any(adapted.site.parts for adapted in adapter.sites),
            "PEFT's VeRA has one rank for all layers": len({adapted.r for adapted in adapter.sites}) > 1,
            "PEFT's VeRA has no scale": any(adapted.scale != 1 for adapted in adapter.sites),
            "PEFT draws VeRA's projections in 32 bits": not shared.stored
            and any(t.dtype != torch.float32 for t in shared.tensors.values()),
        }
        return [what for what, holds in reasons.items() if holds]

    def from_adapter(self, adapter: Adapter, shared: SharedTensors) -> dict[str, Any]:
        init = adapter.method.init
        start = init if isinstance(init, SharedProjectionInit) else SharedProjectionInit()
        return {
            "r": adapter.sites[0].r,
            "vera_dropout": adapter.method.dropout,
            "d_initial": start.d,
            "projection_prng_key": start.seed,
            "save_projection": shared.stored,
            "init_weights": True,
        }


@lru_cache(maxsize=1024, typed=True)  # every site asks
def _method(r: int, init: SharedProjectionInit, dropout: float) -> Method:
    delta = SharedProjectionDelta(r)
    return Method(delta, init, ConstantScale(1.0), Add(), frozen=delta.shared, dropout=dropout)


register(Vera())
