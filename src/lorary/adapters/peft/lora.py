"""PEFT's LORA: LoRA, rank-stabilised with `use_rslora`, DoRA with `use_dora`, aLoRA with `alora_invocation_tokens`.

    linear, transposed   <site>.lora_A.weight (R, in)             <site>.lora_B.weight (out, R)
    embedding            <site>.lora_embedding_A (R, vocabulary)  <site>.lora_embedding_B (width, R)
    convolution          <site>.lora_A.weight (R, in, *kernel)    <site>.lora_B.weight (out, R, 1, ...)
    DoRA                 and <site>.lora_magnitude_vector (out,), of a convolution (1, out, 1, ...)
    `lora_bias`          and <site>.lora_B.bias (out,)

A fused weight adapted in parts is, for PEFT, one LoRA of rank R = parts * r whose B is zero outside the parts' blocks:
the same update, number for number. O-LoRA's earlier tasks follow as further rank directions.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from lorary.adapters.adapter import Adapter
from lorary.adapters.peft import attention, experts, joins
from lorary.adapters.peft.config import PeftConfig, json_number, value_patterns
from lorary.adapters.peft.factors import bias_of_parts, blocks_of_parts, encode_factors, factor_layout, factor_names
from lorary.adapters.peft.fields import (
    ALPHA,
    EXCLUDE,
    PARAMETERS,
    PROBABILITY,
    RANK,
    SHARED,
    Field,
    by_pattern,
    field,
    tokens_by_name,
    unsupported,
)
from lorary.adapters.peft.keys import BIAS, MAGNITUDE
from lorary.adapters.peft.token_rows import indices_field, rows_beside
from lorary.adapters.peft.types import ROWS_FIELD, PeftType, register, without_rows
from lorary.adapters.shared_tensors import SharedTensors
from lorary.adapters.tensor_checks import Layout
from lorary.files.strict_json import show
from lorary.methods.lora import Add, AlphaOverRank, Kaiming, LowRank
from lorary.methods.o_lora import SequentialLoRA
from lorary.methods.rslora import AlphaOverSqrtRank
from lorary.spec.fields import FLAG, one_of
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite, replaces_rows
from lorary.spec.site import PROJECTIONS, Site

_RESIDUAL_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")  # they change the base
_UNSUPPORTED_FEATURES = {  # features that change the adapter's function
    "enable_lora": "adapters on parts of a fused weight (files of 2023) are not supported",
    "use_qalora": "QA-LoRA pools its input, which is not supported",
    "use_bdlora": "block-diagonal factors are not supported",
    "lora_bias": "biases beside B are not supported",
    "target_parameters": "adapters on bare parameters are not supported",
    ROWS_FIELD: "rows of an embedding trained apart are not supported",
    "ensure_weight_tying": "adapters tied between two layers are not supported",
    "layer_replication": "a model with repeated layers is not supported",
    "alora_invocation_tokens": "adapters that start at a token (aLoRA) are not supported",
    "arrow_config": "routing between adapters (Arrow) is not supported",
    "kasa_config": "KaSA changes the base weight, which is not supported",
    "velora_config": "VeLoRA is not supported",
    "monteclora_config": "MonteCLoRA is not supported",
    "megatron_config": "Megatron's layers are not supported",
}
UNSUPPORTED = {key: unsupported(why) for key, why in _UNSUPPORTED_FEATURES.items()}


def _init(value: Any, budget: object) -> None:
    name = value.lower() if isinstance(value, str) else value
    if isinstance(name, bool | None) or name in ("gaussian", "eva", "orthogonal"):
        return
    if isinstance(name, str) and name.startswith(_RESIDUAL_INITS):
        raise ValueError(
            f"is {show(value)}: these factors belong to a base that PEFT changes while loading; let PEFT convert the "
            "adapter (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    raise ValueError(f"is {show(value)}, an initialisation that lorary does not know")


class Lora(PeftType):
    """W + s B A, at all layers with DoRA's magnitudes, with biases, from an invocation on, or plain.

    Rows of tokens may train beside it.
    """

    name, title = "LORA", "LoRA"
    methods = (*((LowRank, join) for join in joins.JOINS), (SequentialLoRA, Add))
    fields = {  # noqa: RUF012 (never written)
        **SHARED,
        **UNSUPPORTED,
        "target_parameters": PARAMETERS,
        ROWS_FIELD: Field(tokens_by_name, nullable=True),
        "ensure_weight_tying": field(FLAG, False, nullable=True),
        "r": field(RANK, 8),
        "lora_alpha": field(ALPHA, 8.0),
        "lora_dropout": field(PROBABILITY, 0.0),
        "use_rslora": field(FLAG, False),
        **joins.FIELDS,
        "exclude_modules": EXCLUDE,
        "rank_pattern": by_pattern(field(RANK)),
        "alpha_pattern": by_pattern(field(ALPHA, 8.0)),
        "init_lora_weights": Field(_init),
        "lora_B_layout": field(one_of(*experts.LAYOUTS), nullable=True),
    }
    leaves = {  # noqa: RUF012
        "lora_A.weight": "A",
        "lora_B.weight": "B",
        "lora_embedding_A": "A",
        "lora_embedding_B": "B",
    }
    factors = (("lora_embedding_A", "lora_embedding_B"), ("lora_A.weight", "lora_B.weight"))
    refused_leaves = {  # noqa: RUF012
        MAGNITUDE: "belongs to DoRA, which the configuration does not name",
        BIAS: "is a bias beside B, which the configuration does not name (lora_bias)",
        "lora_diag": "belongs to KaSA, which is not supported",
    }

    def to_method(self, config: PeftConfig, site: str = "") -> Method:
        weight = site and config.targets_parameter(f"{site}.weight")
        name = f"{site}.weight" if weight else site  # as PEFT matches its patterns
        r, alpha = config.value_at("rank_pattern", "r", name), config.value_at("alpha_pattern", "lora_alpha", name)
        join, context = joins.join_of(config)
        return _method(r, alpha, config["use_rslora"], join, context, config["lora_dropout"])

    def site_mismatches(self, config: PeftConfig, sites: set[str]) -> list[tuple[str, str]]:
        return joins.join_mismatches(config, sites)

    def peft_incompatibilities(self, adapter: Adapter, shared: SharedTensors) -> list[str]:
        reasons = {
            "PEFT finds an invocation only in a model of the task CAUSAL_LM": joins.waits_in_vain(adapter),
            "PEFT's LoRA has DoRA's magnitudes, biases or an invocation at all layers or at none": len(
                {type(adapted.join) for adapted in without_rows(adapter)}
            )
            > 1,
            "PEFT's LoRA has one tensor for all tasks, and these are of two dtypes": any(
                adapted.delta.fixed_roles and len({t.dtype for t in adapter.tensors[adapted.site.name].values()}) > 1
                for adapted in without_rows(adapter)
            ),
            "PEFT has one rank and alpha for both projections of nn.MultiheadAttention": attention.differ(
                {adapted.site.name: (_rank(adapted), adapted.scale) for adapted in without_rows(adapter)},
                without_rows(adapter),
            ),
        }
        return [what for what, holds in reasons.items() if holds]

    def from_adapter(self, adapter: Adapter, shared: SharedTensors) -> dict[str, Any]:
        sites = without_rows(adapter)
        root = all(isinstance(adapted.method.scale, AlphaOverSqrtRank) for adapted in sites)
        sizes = {attention.attention_of(p.site): (_rank(p), _alpha(p, root)) for p in sites}
        fields = lora_fields(adapter, sizes, root=root, dora=joins.is_dora(sites[0]), bias=joins.has_bias(sites[0]))
        beside = len(sites) < len(adapter.sites)
        fields |= joins.join_fields(adapter)
        return fields | {ROWS_FIELD: indices_field(adapter)} if beside else fields

    def targets(self, adapter: Adapter) -> list[str]:
        sites = [adapted.site for adapted in without_rows(adapter) if not adapted.site.experts]
        return list(dict.fromkeys(map(attention.attention_of, sites)))

    def why_not_adaptable(self, site: Site, layer: nn.Module | None = None) -> str:
        if site.kind in PROJECTIONS:
            return attention.why_not_in_peft(site)
        return experts.why_not_in_peft(site, layer) if site.experts else super().why_not_adaptable(site, layer)

    def leaves_of(self, config: PeftConfig) -> Mapping[str, str]:
        return {**self.leaves, **joins.leaves_of_join(config)}

    def layout(self, adapted: AdaptedSite) -> Layout:
        if replaces_rows(adapted):
            return rows_beside(adapted)
        dora, bias = joins.is_dora(adapted), joins.has_bias(adapted)
        return factor_layout(adapted.site, _rank(adapted), dora=dora, bias=bias)

    def canonical_name(self, name: str) -> str:
        # written as a module's weight, for Transformers; PEFT itself writes it without this end
        return name.removesuffix(".weight") if name.endswith(f".{MAGNITUDE}.weight") else name

    def read_shape(
        self, adapted: AdaptedSite, role: str, shape: tuple[int, ...], found: tuple[int, ...]
    ) -> tuple[int, ...]:
        if adapted.site.experts:
            return experts.checked_shape(adapted.site, role, shape, found)
        return joins.magnitude_shape(adapted.site, shape, found) if role == "m" else shape

    def encode(self, adapted: AdaptedSite, roles: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if replaces_rows(adapted):
            return super().encode(adapted, roles)
        if adapted.site.experts:
            B, A = adapted.factors(roles)
            return encode_factors(adapted.site, A, B)
        A, B = roles["A"], roles["B"]
        if "A_past" in roles:
            B = torch.cat([adapted.site.place(B), roles["B_past"]], 1)
            A = torch.cat([A, roles["A_past"]])
        return encode_factors(adapted.site, A, B, roles.get("m"), adapted.join.whole(adapted.site, roles).get("c"))

    def decode(self, adapted: AdaptedSite, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if replaces_rows(adapted):
            return super().decode(adapted, tensors)
        site, rank, (name_A, name_B) = adapted.site, _rank(adapted), factor_names(adapted.site)
        if site.experts:
            A, B = experts.decode(site, tensors[name_A], tensors[name_B])
        else:
            A = tensors[name_A].reshape(rank, site.in_features)
            B = attention.up_factor_here(site, tensors[name_B].reshape(site.out_features, rank))
        found = {}
        if joins.is_dora(adapted):
            found["m"] = tensors[f"{site.name}.{MAGNITUDE}"].reshape(site.out_features)
        if joins.has_bias(adapted):
            found["c"] = bias_of_parts(adapted, tensors[f"{site.name}.{BIAS}"])
        if "A_past" in adapted.shapes:
            sizes = [adapted.shapes[role][-2] for role in ("A", "A_past")]
            (A, A_past), (B, B_past) = A.split(sizes, -2), B.split(sizes, -1)
            A, B, found = A.clone(), B.clone(), found | {"A_past": A_past.clone(), "B_past": B_past.clone()}
        return {"A": A, "B": blocks_of_parts(adapted, B, name_B)} | found


@lru_cache(maxsize=1024, typed=True)  # every site asks; typed: 8 and 8.0 are written as they were read
def _method(r: int, alpha: float, root: bool, join: Any, context: Any, dropout: float) -> Method:
    scale = AlphaOverSqrtRank(alpha) if root else AlphaOverRank(alpha)
    return Method(LowRank(r), Kaiming(), scale, join, dropout=dropout, context=context)


def with_rows_as_lora(adapter: Adapter) -> Adapter:
    """The adapter with every site of a LoRA's type, for the fields that name sites: rows are written as factors too."""
    plain = _method(1, 1.0, False, Add(), None, 0.0)
    sites = (dataclasses.replace(a, method=plain) if replaces_rows(a) else a for a in adapter.sites)
    return dataclasses.replace(adapter, sites=tuple(sites))


def _rank(adapted: AdaptedSite) -> int:
    """PEFT's rank at a site: r for each part, plus the ranks of earlier tasks."""
    return sum(adapted.shapes[role][-2] for role in ("A", "A_past") if role in adapted.shapes)


def _alpha(adapted: AdaptedSite, root: bool) -> float:
    """The alpha of a site's scale at PEFT's rank, as alpha / sqrt(rank) or alpha / rank."""
    rank = _rank(adapted)
    if adapted.alpha is not None and isinstance(adapted.method.scale, AlphaOverSqrtRank if root else AlphaOverRank):
        return adapted.alpha * (math.sqrt(rank / adapted.r) if root else rank / adapted.r)
    return adapted.scale * rank


def lora_fields(
    adapter: Adapter, sizes: Mapping[str, tuple[int, float]], *, root: bool, dora: bool, bias: bool = False
) -> dict[str, Any]:
    """The LoRA-specific fields of a configuration.

    Args:
        adapter: the adapter, for its dropout.
        sizes: site -> (rank, alpha).
        root: whether the scale is alpha / sqrt(rank).
        dora: whether it has magnitudes.
        bias: whether it has biases beside B.
    """
    ranks = {name: rank for name, (rank, _) in sizes.items()}
    alphas = {name: json_number(alpha) for name, (_, alpha) in sizes.items()}
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": adapter.method.dropout,
        "use_rslora": root,
        "use_dora": dora,
        "lora_bias": bias,
        "init_lora_weights": True,
        "exclude_modules": None,
        "rank_pattern": value_patterns(ranks, r),
        "alpha_pattern": value_patterns(alphas, alpha),
    }


LORA = Lora()
register(LORA)
