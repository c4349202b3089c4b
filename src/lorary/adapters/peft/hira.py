"""PEFT's HIRA: HiRA, with one rank for all layers. PEFT 0.21 has a `rank_pattern`, and computes without it.

    linear, transposed   <site>.hira_A (r, in)                    <site>.hira_B (out, r)
    embedding            <site>.hira_embedding_A (r, vocabulary)  <site>.hira_embedding_B (width, r)
    convolution          <site>.hira_A (r, in, *kernel)           <site>.hira_B (out, r, 1, ...)

A fused weight adapted in parts is, for PEFT, one HiRA of rank parts * r whose B is zero outside the parts' blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from lorary.adapters.adapter import Adapter
from lorary.adapters.peft.config import PeftConfig
from lorary.adapters.peft.factors import blocks_of_parts, factor_shapes
from lorary.adapters.peft.fields import EXCLUDE, PROBABILITY, RANK, SHARED, Field, field, unused
from lorary.adapters.peft.types import PeftType, register
from lorary.adapters.shared_tensors import SharedTensors
from lorary.adapters.tensor_checks import Layout
from lorary.files.strict_json import show
from lorary.layers.kinds import embed_scale
from lorary.methods.hira import HadamardFactors, TimesWeight
from lorary.methods.lora import ConstantScale, Kaiming
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite
from lorary.spec.site import Site


def _init(value: Any, budget: object) -> None:
    if not isinstance(value, bool | None) and value != "gaussian":
        raise ValueError(f"is {show(value)}; it takes true, false or gaussian")


class Hira(PeftType):
    """W + W * (B A)."""

    name, title = "HIRA", "HiRA"
    methods = ((HadamardFactors, TimesWeight),)
    fields = {  # noqa: RUF012 (never written)
        **{key: entry for key, entry in SHARED.items() if key != "bias"},
        "r": field(RANK, 32),
        "hira_dropout": field(PROBABILITY, 0.0),
        "exclude_modules": EXCLUDE,
        "rank_pattern": unused("HiRA", {}, None),
        "init_weights": Field(_init),
    }
    leaves = {"hira_A": "A", "hira_B": "B", "hira_embedding_A": "A", "hira_embedding_B": "B"}  # noqa: RUF012
    factors = (("hira_embedding_A", "hira_embedding_B"), ("hira_A", "hira_B"))
    dilates = True

    def to_method(self, config: PeftConfig, site: str = "") -> Method:
        return _method(config["r"], config["hira_dropout"])

    def peft_incompatibilities(self, adapter: Adapter, shared: SharedTensors) -> list[str]:
        several = len({_rank(adapted) for adapted in adapter.sites}) > 1
        return ["PEFT's HiRA has one rank for all layers"] if several else []

    def from_adapter(self, adapter: Adapter, shared: SharedTensors) -> dict[str, Any]:
        return {
            "r": _rank(adapter.sites[0]),
            "hira_dropout": adapter.method.dropout,
            "init_weights": True,
            "exclude_modules": None,
            "rank_pattern": {},
        }

    def why_not_adaptable(self, site: Site, layer: nn.Module | None = None) -> str:
        if layer is not None and site.kind == "embedding" and _is_scaled(layer):
            return f"is a scaled embedding, and PEFT's {self.title} leaves its scale out"
        return super().why_not_adaptable(site, layer)

    def layout(self, adapted: AdaptedSite) -> Layout:
        site, middle = adapted.site, "embedding_" if adapted.site.kind == "embedding" else ""
        shapes = factor_shapes(site, _rank(adapted))
        return {role: (f"{site.name}.hira_{middle}{role}", shape) for role, shape in zip("AB", shapes, strict=True)}

    def encode(self, adapted: AdaptedSite, roles: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return super().encode(adapted, adapted.join.whole(adapted.site, roles))

    def decode(self, adapted: AdaptedSite, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        (name_A, _), (name_B, _) = self.layout(adapted).values()
        A, B = tensors[name_A].reshape(adapted.shapes["A"]), tensors[name_B].reshape(adapted.site.out_features, -1)
        return {"A": A, "B": blocks_of_parts(adapted, B, name_B)}


def _rank(adapted: AdaptedSite) -> int:
    """PEFT's rank at a site: r for each part."""
    return adapted.shapes["A"][0]


def _is_scaled(layer: nn.Module) -> bool:
    scale = embed_scale(layer)
    return isinstance(scale, Tensor) or scale != 1.0


@lru_cache(maxsize=1024, typed=True)  # every site asks
def _method(r: int, dropout: float) -> Method:
    return Method(HadamardFactors(r), Kaiming(), ConstantScale(1.0), TimesWeight(), dropout=dropout)


register(Hira())
