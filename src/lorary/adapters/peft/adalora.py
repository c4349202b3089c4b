"""PEFT's ADALORA: AdaLoRA, with the rank directions left at each layer.

    <site>.lora_A  (R, in) = Q        <site>.lora_B  (out, R) = P        <site>.lora_E  (R, 1)

`rank_pattern` has a mask over the initial directions for every layer that has lost some. PEFT uses only the number of
directions left; which ones they were is not stored here, so the first ones are marked.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from lorary.adapters.adapter import Adapter
from lorary.adapters.peft.config import PeftConfig, json_number
from lorary.adapters.peft.fields import ALPHA, EXCLUDE, PROBABILITY, RANK, SHARED, field, masks, unsupported, unused
from lorary.adapters.peft.lora import UNSUPPORTED
from lorary.adapters.peft.types import PeftType, register
from lorary.adapters.shared_tensors import SharedTensors
from lorary.adapters.tensor_checks import Layout
from lorary.files.strict_json import show
from lorary.methods.adalora import AlphaOverInitialRank, OrthogonalityPenalty, SVDDelta, SVDDeltaInit
from lorary.methods.adalora_budget import RankBudget
from lorary.methods.lora import Add
from lorary.spec.fields import AMOUNT, COUNT, SHARE, WHOLE
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite

_E = ".lora_E"


class AdaLora(PeftType):
    """W + s P diag(E) Q, with one initial rank and one alpha for all layers."""

    name, title = "ADALORA", "AdaLoRA"
    methods = ((SVDDelta, Add),)
    fields = {  # noqa: RUF012 (never written)
        **SHARED,
        **UNSUPPORTED,
        "r": field(RANK, 8),  # inherited; `init_r` is meant
        "init_r": field(RANK, 12),
        "target_r": field(RANK, 8),
        "lora_alpha": field(ALPHA, 8.0),
        "lora_dropout": field(PROBABILITY, 0.0),
        "exclude_modules": EXCLUDE,
        "rank_pattern": masks(_E),
        "tinit": field(WHOLE, 0),
        "tfinal": field(WHOLE, 0),
        "deltaT": field(COUNT, 1),
        "beta1": field(SHARE, 0.85),
        "beta2": field(SHARE, 0.85),
        "orth_reg_weight": field(AMOUNT, 0.5),
        "total_step": field(COUNT),
        "use_rslora": unused("AdaLoRA", False),
        "use_dora": unsupported("PEFT's AdaLoRA has no magnitudes"),
        "alpha_pattern": unused("AdaLoRA", {}, None),
        "init_lora_weights": unused("AdaLoRA", True, False, None),
    }
    leaves = {"lora_A": "Q", "lora_B": "P", "lora_E": "E"}  # noqa: RUF012
    factors = (("lora_A", "lora_B"),)
    kinds = ("linear", "transposed", "conv2d")
    dilates = True

    def to_method(self, config: PeftConfig, site: str = "") -> Method:
        r, mask = config["init_r"], config["rank_pattern"].get(site)
        # PEFT accepts a target above the initial rank, which prunes nothing
        betas = config["beta1"], config["beta2"]
        budget = RankBudget(min(config["target_r"], r), config["tinit"], config["tfinal"], config["deltaT"], *betas)
        delta, scale = SVDDelta(r, None if mask is None else sum(mask)), AlphaOverInitialRank(config["lora_alpha"])
        return _method(delta, scale, budget, OrthogonalityPenalty(config["orth_reg_weight"]), config["lora_dropout"])

    def site_mismatches(self, config: PeftConfig, sites: set[str]) -> list[tuple[str, str]]:
        r, found = config["init_r"], []
        for name, mask in config["rank_pattern"].items():
            if len(mask) != r:
                what = f"has {len(mask)} entries for {show(name)}, and there were {r} directions at the start"
                found.append(("rank_pattern", what))
            if name not in sites:
                found.append(("rank_pattern", f"is about {show(name)}, which is not adapted"))
        return found

    def peft_incompatibilities(self, adapter: Adapter, shared: SharedTensors) -> list[str]:
        scales = {adapted.method.scale for adapted in adapter.sites}
        reasons = {
            "PEFT's AdaLoRA has one rank at the start and one alpha for all layers": len(scales) > 1
            or len({adapted.r for adapted in adapter.sites}) > 1,
            "PEFT's AdaLoRA takes `default` in a path for an adapter's name": any(
                "default" in name for name in _masks(adapter)
            ),
            "PEFT's AdaLoRA has alpha / (r + 1e-5) for its scale": not all(
                isinstance(s, AlphaOverInitialRank) for s in scales
            ),
        }
        return [what for what, holds in reasons.items() if holds]

    def from_adapter(self, adapter: Adapter, shared: SharedTensors) -> dict[str, Any]:
        """The AdaLoRA-specific fields of a configuration.

        An adapter does not store the length of its run: `total_step` is the smallest that PEFT accepts with these
        phases, and a phase that is a fraction of the run becomes 0 steps.
        """
        first, rules = adapter.sites[0], adapter.method.rules
        budget = next((rule for rule in rules if isinstance(rule, RankBudget)), RankBudget(first.r))
        penalty = next((rule for rule in rules if isinstance(rule, OrthogonalityPenalty)), OrthogonalityPenalty(0.0))
        start, final = (int(steps) if steps >= 1 else 0 for steps in (budget.start_at, budget.final))
        return {
            "r": 8,  # PEFT's default, which its AdaLoRA ignores
            "init_r": first.r,
            "target_r": budget.target,
            "tinit": start,
            "tfinal": final,
            "total_step": start + final + 1,
            "deltaT": budget.every,
            "beta1": budget.beta1,
            "beta2": budget.beta2,
            "orth_reg_weight": penalty.weight,
            "lora_alpha": json_number(first.alpha),
            "lora_dropout": adapter.method.dropout,
            "init_lora_weights": True,
            "rank_pattern": _masks(adapter) or None,
        }

    def layout(self, adapted: AdaptedSite) -> Layout:
        names = super().layout(adapted)
        name, shape = names["E"]
        return names | {"E": (name, (*shape, 1))}


def _masks(adapter: Adapter) -> dict[str, list[bool]]:
    """`rank_pattern`: a mask for each layer that has lost directions."""
    sizes = {f"{a.site.name}{_E}": (a.shapes["E"][0], a.r) for a in adapter.sites}
    return {name: [i < left for i in range(r)] for name, (left, r) in sorted(sizes.items()) if left < r}


@lru_cache(maxsize=1024, typed=True)  # every site asks
def _method(
    delta: SVDDelta, scale: AlphaOverInitialRank, budget: RankBudget, penalty: OrthogonalityPenalty, dropout: float
) -> Method:
    return Method(delta, SVDDeltaInit(), scale, Add(), rules=(budget, penalty), dropout=dropout)


register(AdaLora())
