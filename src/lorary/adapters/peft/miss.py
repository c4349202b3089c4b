"""PEFT's MISS: MiSS, with one rank for all layers; with `init_weights: mini` also its D of `mini_r` rows.

<site>.miss_block  (r, out), or (r, mini_r)
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from torch import Tensor

from lorary.adapters.adapter import Adapter
from lorary.adapters.peft.config import PeftConfig
from lorary.adapters.peft.fields import EXCLUDE, PROBABILITY, RANK, SHARED, Field, bias, field
from lorary.adapters.peft.types import PeftType, register
from lorary.adapters.shared_tensors import SharedTensors
from lorary.adapters.tensor_checks import Layout
from lorary.files.strict_json import show
from lorary.methods.lora import Add, ConstantScale
from lorary.methods.miss import SharedShards, ZeroShards
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite

_LEAF, _MINI = "miss_block", "mini"


def _variant(value: Any, budget: object) -> Any:
    if value == "bat":
        raise ValueError(
            "is 'bat', a variant whose update multiplies its matrix with the weight, which is not supported; "
            "merge the adapter with PEFT"
        )
    if not isinstance(value, bool) and value != _MINI:
        raise ValueError(f"is {show(value)}; it takes true, false or {_MINI}")
    return value


class Miss(PeftType):
    """W + D repeated along the inputs, of whole linear layers."""

    name, title = "MISS", "MiSS"
    methods = ((SharedShards, Add),)
    fields = {  # noqa: RUF012 (never written)
        **{key: entry for key, entry in SHARED.items() if key not in ("bias", "fan_in_fan_out")},
        "bias": bias("MiSS_only"),
        "r": field(RANK, 64),
        "mini_r": field(RANK, 1),
        "miss_dropout": field(PROBABILITY, 0.0),
        "exclude_modules": EXCLUDE,
        "init_weights": Field(_variant, True),
    }
    leaves = {_LEAF: "D"}  # noqa: RUF012
    kinds = ("linear",)

    def to_method(self, config: PeftConfig, site: str = "") -> Method:
        mini_r = config["mini_r"] if config["init_weights"] == _MINI else None
        return _method(config["r"], mini_r, config["miss_dropout"])

    def peft_incompatibilities(self, adapter: Adapter, shared: SharedTensors) -> list[str]:
        reasons = {
            "PEFT's MiSS adapts whole linear layers": any(adapted.site.parts for adapted in adapter.sites),
            "PEFT's MiSS has one rank for all layers": len({adapted.delta for adapted in adapter.sites}) > 1,
            "PEFT's MiSS has no scale": any(adapted.scale != 1 for adapted in adapter.sites),
        }
        return [what for what, holds in reasons.items() if holds]

    def from_adapter(self, adapter: Adapter, shared: SharedTensors) -> dict[str, Any]:
        delta = adapter.sites[0].delta
        assert isinstance(delta, SharedShards)
        return {
            "r": delta.r,
            "mini_r": delta.mini_r or 1,
            "miss_dropout": adapter.method.dropout,
            "init_weights": True if delta.mini_r is None else _MINI,
            "exclude_modules": None,
        }

    def layout(self, adapted: AdaptedSite) -> Layout:
        rows, r = adapted.shapes["D"]
        return {"D": (f"{adapted.site.name}.{_LEAF}", (r, rows))}

    def encode(self, adapted: AdaptedSite, roles: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: roles["D"].T.contiguous() for name, _ in self.layout(adapted).values()}

    def decode(self, adapted: AdaptedSite, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"D": tensors[name].T.contiguous() for name, _ in self.layout(adapted).values()}


@lru_cache(maxsize=1024, typed=True)  # every site asks
def _method(r: int, mini_r: int | None, dropout: float) -> Method:
    return Method(SharedShards(r, mini_r), ZeroShards(), ConstantScale(1.0), Add(), dropout=dropout)


register(Miss())
