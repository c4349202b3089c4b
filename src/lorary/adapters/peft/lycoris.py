"""PEFT's LOHA and LOKR: LyCORIS' methods, with LyCORIS' names for the tensors.

    LoHa   <site>.hada_w1_a  (out, r) = B1     <site>.hada_w1_b  (r, in) = A1     and so hada_w2_a, hada_w2_b
    LoKr   <site>.lokr_w1  (c1, c2) = C        or <site>.lokr_w1_a  (c1, r) = Cb, <site>.lokr_w1_b  (r, c2) = Ca
           <site>.lokr_w2  (d1, d2) = D        or <site>.lokr_w2_a  (d1, r) = Db, <site>.lokr_w2_b  (r, d2) = Da

A convolution's D has its kernel at the end. In the Tucker form (`use_effective_conv2d`) there are cores, hada_t1 and
hada_t2 or lokr_t2 (r, r, *kernel), with a 1 at the end of a Conv1d's, and the first factors beside them are transposed.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, cast

from torch import Tensor, nn

from lorary.adapters.adapter import Adapter
from lorary.adapters.peft.config import PeftConfig, json_number, value_patterns
from lorary.adapters.peft.fields import ALPHA, EXCLUDE, PROBABILITY, RANK, SHARED, Field, by_pattern, field
from lorary.adapters.peft.types import PeftType, register
from lorary.adapters.shared_tensors import SharedTensors
from lorary.adapters.tensor_checks import Layout
from lorary.methods.loha import HadamardInit, LowRankHadamard
from lorary.methods.lokr import FACTOR, KroneckerInit, KroneckerProduct
from lorary.methods.lora import Add, AlphaOverRank
from lorary.spec.fields import FLAG, one_of
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite
from lorary.spec.site import Site

_SHARED = ("target_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "base_model_name_or_path")
_START: dict[str, Any] = {
    "check": lambda value: type(value) is bool or one_of("lycoris")["check"](value),
    "expects": "true, false or lycoris",
}
_FIELDS: dict[str, Field] = {
    **{key: SHARED[key] for key in _SHARED},
    "r": field(RANK, 8),
    "alpha": field(ALPHA, 8.0),
    "use_effective_conv2d": field(FLAG, False),
    "rank_dropout": field(PROBABILITY, 0.0),  # of the outputs, and of whole layers: they matter only in training
    "module_dropout": field(PROBABILITY, 0.0),
    "init_weights": field(_START, True),
    "exclude_modules": EXCLUDE,
    "rank_pattern": by_pattern(field(RANK)),
    "alpha_pattern": by_pattern(field(ALPHA, 8.0)),
}


class Lycoris(PeftType):
    """What both types have in common.

    Attributes:
        cores: the role of a factor [rows, r] -> that of the core beside which files have it transposed.
    """

    kinds = ("linear", "conv1d", "conv2d")
    dilates = True
    cores: Mapping[str, str]

    def peft_incompatibilities(self, adapter: Adapter, shared: SharedTensors) -> list[str]:
        forms = {_form(adapted) for adapted in adapter.sites}
        reasons = {
            f"PEFT's {self.title} adapts whole layers": any(adapted.site.parts for adapted in adapter.sites),
            f"PEFT's {self.title} has one form for all layers": len(forms) > 1,
        }
        return [what for what, holds in reasons.items() if holds]

    def from_adapter(self, adapter: Adapter, shared: SharedTensors) -> dict[str, Any]:
        ranks = {adapted.site.name: adapted.r for adapted in adapter.sites}
        scales = {adapted.site.name: adapted.scale * adapted.r for adapted in adapter.sites}
        alphas = {a.site.name: json_number(scales[a.site.name] if a.alpha is None else a.alpha) for a in adapter.sites}
        r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
        return {
            "r": r,
            "alpha": alpha,
            "use_effective_conv2d": cast(Any, adapter.sites[0].delta).tucker,
            "rank_dropout": 0.0,
            "module_dropout": 0.0,
            "init_weights": True,
            "exclude_modules": None,
            "rank_pattern": value_patterns(ranks, r),
            "alpha_pattern": value_patterns(alphas, alpha),
        }

    def why_not_adaptable(self, site: Site, layer: nn.Module | None = None) -> str:
        return super().why_not_adaptable(dataclasses.replace(site, groups=1), layer)  # a change of the whole weight

    def layout(self, adapted: AdaptedSite) -> Layout:
        leaves = {role: leaf for leaf, role in self.leaves.items() if role in adapted.shapes}
        return {role: (f"{adapted.site.name}.{leaf}", self._shape(adapted, role)) for role, leaf in leaves.items()}

    def _shape(self, adapted: AdaptedSite, role: str) -> tuple[int, ...]:
        """The shape of a tensor in a file."""
        shape, kernel = adapted.shapes[role], adapted.site.kernel_size
        if role in self.cores.values():
            return (*shape[:2], *kernel, *(1,) * (len(kernel) == 1))
        if role == "D" and kernel:
            return (shape[0], shape[1] // math.prod(kernel), *kernel)
        return shape[::-1] if self._is_transposed(adapted, role) else shape

    def _is_transposed(self, adapted: AdaptedSite, role: str) -> bool:
        return self.cores.get(role) in adapted.shapes

    def encode(self, adapted: AdaptedSite, roles: Mapping[str, Tensor]) -> dict[str, Tensor]:
        turned = {role: t.T.contiguous() if self._is_transposed(adapted, role) else t for role, t in roles.items()}
        return super().encode(adapted, turned)

    def decode(self, adapted: AdaptedSite, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for role, (name, _) in self.layout(adapted).items():
            value = tensors[name].T if self._is_transposed(adapted, role) else tensors[name]
            found[role] = value.reshape(adapted.shapes[role]).contiguous()
        return found


def _form(adapted: AdaptedSite) -> Any:
    """A site's delta but for its rank."""
    return dataclasses.replace(cast(Any, adapted.delta), r=1)


class LoHa(Lycoris):
    """W + s (B1 A1) * (B2 A2)."""

    name, title = "LOHA", "LoHa"
    methods = ((LowRankHadamard, Add),)
    fields = _FIELDS
    leaves = {  # noqa: RUF012 (never written)
        **{"hada_w1_a": "B1", "hada_w1_b": "A1", "hada_t1": "T1"},
        **{"hada_w2_a": "B2", "hada_w2_b": "A2", "hada_t2": "T2"},
    }
    cores = {"B1": "T1", "B2": "T2"}  # noqa: RUF012

    def to_method(self, config: PeftConfig, site: str = "") -> Method:
        r, alpha = config.value_at("rank_pattern", "r", site), config.value_at("alpha_pattern", "alpha", site)
        return hadamard_method(LowRankHadamard(r, config["use_effective_conv2d"]), alpha)


class LoKr(Lycoris):
    """W + s C kron D."""

    name, title = "LOKR", "LoKr"
    methods = ((KroneckerProduct, Add),)
    fields = {  # noqa: RUF012
        **_FIELDS,
        "decompose_both": field(FLAG, False),
        "decompose_factor": field(FACTOR, -1),
        "rank_dropout_scale": field(FLAG, False),
    }
    leaves = {  # noqa: RUF012
        **{"lokr_w1": "C", "lokr_w1_a": "Cb", "lokr_w1_b": "Ca"},
        **{"lokr_w2": "D", "lokr_w2_a": "Db", "lokr_w2_b": "Da", "lokr_t2": "T"},
    }
    cores = {"Db": "T"}  # noqa: RUF012

    def to_method(self, config: PeftConfig, site: str = "") -> Method:
        r, alpha = config.value_at("rank_pattern", "r", site), config.value_at("alpha_pattern", "alpha", site)
        form = config["decompose_factor"], config["decompose_both"], config["use_effective_conv2d"]
        return kronecker_method(KroneckerProduct(r, *form), alpha)

    def peft_incompatibilities(self, adapter: Adapter, shared: SharedTensors) -> list[str]:
        deltas = [cast(KroneckerProduct, adapted.delta) for adapted in adapter.sites]
        sizes = any(delta.sizes for delta in deltas)
        own = ["PEFT's LoKr has the sizes of its own rule"] if sizes else []
        own += list(filter(None, map(self.why_another_function, adapter.sites)))[:1]
        return super().peft_incompatibilities(adapter, shared) + own

    def from_adapter(self, adapter: Adapter, shared: SharedTensors) -> dict[str, Any]:
        delta = cast(KroneckerProduct, adapter.sites[0].delta)
        own = {"decompose_both": delta.decompose_both, "decompose_factor": delta.factor, "rank_dropout_scale": False}
        return super().from_adapter(adapter, shared) | own

    def why_another_function(self, adapted: AdaptedSite) -> str:
        if "D" in adapted.shapes and len(adapted.site.kernel_size) == 1:  # `torch.kron` aligns them at the end
            return "PEFT's LoKr of a Conv1d multiplies C with the wrong dimensions of a whole D"
        return ""


@lru_cache(maxsize=1024, typed=True)  # every site asks
def hadamard_method(delta: LowRankHadamard, alpha: float) -> Method:
    """A LoHa with this alpha."""
    return Method(delta, HadamardInit(), AlphaOverRank(alpha), Add())


@lru_cache(maxsize=1024, typed=True)
def kronecker_method(delta: KroneckerProduct, alpha: float) -> Method:
    """A LoKr with this alpha."""
    return Method(delta, KroneckerInit(), AlphaOverRank(alpha), Add())


LOHA, LOKR = LoHa(), LoKr()
register(LOHA)
register(LOKR)
