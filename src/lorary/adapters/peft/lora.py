"""PEFT's LORA: LoRA, rank-stabilised with `use_rslora`, DoRA with `use_dora`.

    linear, transposed   <site>.lora_A.weight (R, in)             <site>.lora_B.weight (out, R)
    embedding            <site>.lora_embedding_A (R, vocabulary)  <site>.lora_embedding_B (width, R)
    convolution          <site>.lora_A.weight (R, in, *kernel)    <site>.lora_B.weight (out, R, 1, ...)
    DoRA                 and <site>.lora_magnitude_vector (out,), of a convolution (1, out, 1, ...)

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
from lorary.adapters.peft import experts
from lorary.adapters.peft.config import PeftConfig, json_number, value_patterns
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
from lorary.adapters.peft.token_rows import indices_field, rows_beside
from lorary.adapters.peft.types import ROWS_FIELD, PeftType, register, without_rows
from lorary.adapters.shared_tensors import SharedTensors
from lorary.adapters.tensor_checks import Layout
from lorary.errors import Diagnostic, FileError
from lorary.files.strict_json import show
from lorary.methods.dora import MagnitudeDirection
from lorary.methods.lora import Add, AlphaOverRank, Kaiming, LowRank
from lorary.methods.o_lora import SequentialLoRA
from lorary.methods.rslora import AlphaOverSqrtRank
from lorary.spec.fields import FLAG
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite, replaces_rows
from lorary.spec.site import Site

MAGNITUDE = "lora_magnitude_vector"
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
    """W + s B A, with DoRA's magnitudes at all layers or at none."""

    name, title = "LORA", "LoRA"
    methods = ((LowRank, Add), (SequentialLoRA, Add), (LowRank, MagnitudeDirection))
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
        "use_dora": field(FLAG, False, nullable=True),
        "exclude_modules": EXCLUDE,
        "rank_pattern": by_pattern(field(RANK)),
        "alpha_pattern": by_pattern(field(ALPHA, 8.0)),
        "init_lora_weights": Field(_init),
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
        "lora_B.bias": "is a bias beside B, which is not supported",
        "lora_diag": "belongs to KaSA, which is not supported",
    }

    def to_method(self, config: PeftConfig, site: str = "") -> Method:
        weight = site and config.targets_parameter(f"{site}.weight")
        name = f"{site}.weight" if weight else site  # as PEFT matches its patterns
        r, alpha = (
            next((value for ending, value in config[pattern] if name and ending.fullmatch(name)), config[usual])
            for pattern, usual in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
        )
        return _method(r, alpha, config["use_rslora"], config["use_dora"], config["lora_dropout"])

    def peft_incompatibilities(self, adapter: Adapter, shared: SharedTensors) -> list[str]:
        reasons = {
            "PEFT's LoRA has DoRA's magnitudes at all layers or at none": len(
                {is_dora(adapted) for adapted in without_rows(adapter)}
            )
            > 1,
            "PEFT's LoRA has one tensor for all tasks, and these are of two dtypes": any(
                adapted.delta.fixed_roles and len({t.dtype for t in adapter.tensors[adapted.site.name].values()}) > 1
                for adapted in without_rows(adapter)
            ),
        }
        return [what for what, holds in reasons.items() if holds]

    def from_adapter(self, adapter: Adapter, shared: SharedTensors) -> dict[str, Any]:
        sites = without_rows(adapter)
        root = all(isinstance(adapted.method.scale, AlphaOverSqrtRank) for adapted in sites)
        sizes = {adapted.site.name: (_rank(adapted), _alpha(adapted, root)) for adapted in sites}
        fields = lora_fields(adapter, sizes, root=root, dora=is_dora(sites[0]))
        beside = len(sites) < len(adapter.sites)
        return fields | {ROWS_FIELD: indices_field(adapter)} if beside else fields

    def targets(self, adapter: Adapter) -> list[str]:
        return [adapted.site.name for adapted in without_rows(adapter) if not adapted.site.experts]

    def why_not_adaptable(self, site: Site, layer: nn.Module | None = None) -> str:
        return experts.why_not_in_peft(site, layer) if site.experts else super().why_not_adaptable(site, layer)

    def leaves_of(self, config: PeftConfig) -> Mapping[str, str]:
        return self.leaves | ({MAGNITUDE: "m"} if config["use_dora"] else {})

    def layout(self, adapted: AdaptedSite) -> Layout:
        rows = replaces_rows(adapted)
        return rows_beside(adapted) if rows else _layout(adapted.site, _rank(adapted), is_dora(adapted))

    def canonical_name(self, name: str) -> str:
        # some programs write it as a module's weight
        return name.removesuffix(".weight") if name.endswith(f".{MAGNITUDE}.weight") else name

    def read_shape(
        self, adapted: AdaptedSite, role: str, shape: tuple[int, ...], found: tuple[int, ...]
    ) -> tuple[int, ...]:
        """The shape of DoRA's magnitudes, which has been written in several ways.

        A row (1, out) differs from magnitudes per input, which other programs write, only if the layer is not square.
        """
        if role != "m":
            return shape
        site, ones = adapted.site, (1,) * len(adapted.site.kernel_size)
        column, row = (site.out_features, 1, *ones), (1, site.out_features, *ones)
        if found in ((site.out_features,), column) or (
            found == row and (site.kernel_size or site.out_features != site.in_features)
        ):
            return found
        if found[:1] == (1,) and math.prod(found) == site.in_features:
            what = f"has the shape {list(found)}, a magnitude for each input; DoRA as published has one per output"
            fix = f"if they are the outputs' after all, write them as [{site.out_features}]"
            raise FileError("", [Diagnostic(f"{site.name}.{MAGNITUDE}", what, fix)])
        return shape

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
        return encode_factors(adapted.site, A, B, roles.get("m"))

    def decode(self, adapted: AdaptedSite, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if replaces_rows(adapted):
            return super().decode(adapted, tensors)
        site, rank, (name_A, name_B) = adapted.site, _rank(adapted), factor_names(adapted.site)
        if site.experts:
            A, B = experts.decode(site, tensors[name_A], tensors[name_B])
        else:
            A = tensors[name_A].reshape(rank, site.in_features)
            B = tensors[name_B].reshape(site.out_features, rank)
        found = {"m": tensors[f"{site.name}.{MAGNITUDE}"].reshape(site.out_features)} if is_dora(adapted) else {}
        if "A_past" in adapted.shapes:
            sizes = [adapted.shapes["A"][0], adapted.shapes["A_past"][0]]
            (A, A_past), (B, B_past) = A.split(sizes), B.split(sizes, 1)
            A, B, found = A.clone(), B.clone(), found | {"A_past": A_past.clone(), "B_past": B_past.clone()}
        return {"A": A, "B": blocks_of_parts(adapted, B, name_B)} | found


@lru_cache(maxsize=1024, typed=True)  # every site asks; typed: 8 and 8.0 are written as they were read
def _method(r: int, alpha: float, root: bool, dora: bool, dropout: float) -> Method:
    scale = AlphaOverSqrtRank(alpha) if root else AlphaOverRank(alpha)
    return Method(LowRank(r), Kaiming(), scale, MagnitudeDirection() if dora else Add(), dropout=dropout)


def with_rows_as_lora(adapter: Adapter) -> Adapter:
    """The adapter with every site of a LoRA's type, for the fields that name sites: rows are written as factors too."""
    plain = _method(1, 1.0, False, False, 0.0)
    sites = (dataclasses.replace(a, method=plain) if replaces_rows(a) else a for a in adapter.sites)
    return dataclasses.replace(adapter, sites=tuple(sites))


def is_dora(adapted: AdaptedSite) -> bool:
    """Whether a site has DoRA's magnitudes."""
    return isinstance(adapted.method.join, MagnitudeDirection)


def _rank(adapted: AdaptedSite) -> int:
    """PEFT's rank at a site: r for each part, plus the ranks of earlier tasks."""
    return sum(adapted.shapes[role][-2] for role in ("A", "A_past") if role in adapted.shapes)


def _alpha(adapted: AdaptedSite, root: bool) -> float:
    """The alpha of a site's scale at PEFT's rank, as alpha / sqrt(rank) or alpha / rank."""
    rank = _rank(adapted)
    if adapted.alpha is not None and isinstance(adapted.method.scale, AlphaOverSqrtRank if root else AlphaOverRank):
        return adapted.alpha * (math.sqrt(rank / adapted.r) if root else rank / adapted.r)
    return adapted.scale * rank


def factor_names(site: Site) -> tuple[str, str]:
    """The names of A and B of a site, without prefix."""
    middle, ending = ("embedding_", "") if site.kind == "embedding" else ("", ".weight")
    return f"{site.name}.lora_{middle}A{ending}", f"{site.name}.lora_{middle}B{ending}"


def blocks_of_parts(adapted: AdaptedSite, B: Tensor, name: str) -> Tensor:
    """[rows of the parts, r] of PEFT's B [out, parts * r] of this name at a fused site; elsewhere B itself.

    Raises:
        FileError: it is not zero outside the parts' blocks.
    """
    site, r = adapted.site, adapted.r
    if not site.parts:
        return B
    blocks = torch.cat([B[part.rows(), i * r : (i + 1) * r] for i, part in enumerate(site.parts)])
    if torch.equal(site.place(blocks), B):
        return blocks
    what = f"is not zero outside the blocks of {', '.join(part.name for part in site.parts)}"
    raise FileError("", [Diagnostic(name, what)])


def factor_shapes(site: Site, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of A and B of rank r, which PEFT keeps as filters at a convolution."""
    channels, ones = site.in_features // math.prod(site.kernel_size), (1,) * len(site.kernel_size)
    return (r, channels, *site.kernel_size), (site.out_features, r, *ones)


def _layout(site: Site, r: int, dora: bool) -> Layout:
    """role -> (name, shape) of a LoRA of rank r, or a DoRA."""
    shapes = experts.shapes(site, r) if site.experts else factor_shapes(site, r)
    found = dict(zip("AB", zip(factor_names(site), shapes, strict=True), strict=True))
    m = (1, site.out_features, *(1,) * len(site.kernel_size)) if site.kernel_size else (site.out_features,)
    return found | ({"m": (f"{site.name}.{MAGNITUDE}", m)} if dora else {})


def encode_factors(site: Site, A: Tensor, B: Tensor, m: Tensor | None = None) -> dict[str, Tensor]:
    """The tensors of a LoRA at one site by their names without prefix.

    Args:
        site: the site.
        A: [R, in], or [E, R, in] for experts.
        B: [out, R], or [rows of the parts, r] at a fused site, or [E, out, R].
        m: [out], DoRA's magnitudes.
    """
    if site.experts:
        return dict(zip(factor_names(site), experts.encode(site, A, B), strict=True))
    B = site.place(B) if site.parts and tuple(B.shape) != (site.out_features, A.shape[0]) else B
    roles = {"A": A, "B": B} if m is None else {"A": A, "B": B, "m": m}
    layout = _layout(site, A.shape[0], dora=m is not None)
    return {name: roles[role].reshape(shape) for role, (name, shape) in layout.items()}


def lora_fields(adapter: Adapter, sizes: Mapping[str, tuple[int, float]], *, root: bool, dora: bool) -> dict[str, Any]:
    """The LoRA-specific fields of a configuration.

    Args:
        adapter: the adapter, for its dropout.
        sizes: site -> (rank, alpha).
        root: whether the scale is alpha / sqrt(rank).
        dora: whether it has magnitudes.
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
        "lora_bias": False,
        "init_lora_weights": True,
        "exclude_modules": None,
        "rank_pattern": value_patterns(ranks, r),
        "alpha_pattern": value_patterns(alphas, alpha),
    }


LORA = Lora()
register(LORA)
