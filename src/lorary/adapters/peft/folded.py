"""The folded form of a LoRA in PEFT's files, for readers that know only `r`, `lora_alpha` and a list of targets.

Some programs ignore `use_rslora`, `rank_pattern` and `alpha_pattern`, or take `target_modules` for a list, and compute
something else without a word. In the folded form every site has the largest rank, by rows and columns of zeros, and
alpha is rank times scale; where sites differ in their scale, the difference is in B. Each expert of a fused parameter
has that rank too.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorary.adapters.adapter import Adapter
from lorary.adapters.peft import keys
from lorary.adapters.peft.config import json_number
from lorary.adapters.peft.experts import paths_in_file
from lorary.adapters.peft.factors import factor_names
from lorary.adapters.peft.keys import BIAS


def folded_form(
    adapter: Adapter, config: Mapping[str, Any], tensors: Mapping[str, Tensor], scales: Mapping[str, float]
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, float]]:
    """(configuration, tensors, scales) of the same function in the folded form.

    Args:
        adapter: the adapter; only its sites matter.
        config: of a LoRA or DoRA.
        tensors: by their names in the file.
        scales: site -> s, for each site in the file.
    """
    s = Counter(scales.values()).most_common(1)[0][0]
    found = dict(tensors)
    sites = [a.site for a in adapter.sites if a.site.name in scales]
    paths = paths_in_file(sites)
    in_file = [dataclasses.replace(site, name=paths.get(site.name, site.name)) for site in sites]
    names = {
        site: [keys.full(name) for name in factor_names(named)] for site, named in zip(sites, in_file, strict=True)
    }
    r = max(len(tensors[A]) // max(site.experts, 1) for site, (A, _) in names.items())
    for site, (A, B) in names.items():
        E = max(site.experts, 1)
        found[A] = _padded(tensors[A].unflatten(0, (E, -1)), r).flatten(0, 1)  # expert by expert
        B_scaled = _scaled(tensors[B], scales[site.name] / s)
        found[B] = _padded(B_scaled.unflatten(1, (-1, E)), r).flatten(1, 2)  # rank by rank
        if (c := keys.full(f"{site.name}.{BIAS}")) in tensors:
            found[c] = _scaled(tensors[c], scales[site.name] / s)
    plain: dict[str, Any] = {
        "r": r,
        "lora_alpha": json_number(r * s),
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    by_parameter = {name.removesuffix(".weight") for name in config.get("target_parameters") or ()}
    targets = config["target_modules"]
    listed = sorted(scales.keys() - by_parameter) if isinstance(targets, str) else targets
    return {**config, **plain, "target_modules": listed}, found, dict.fromkeys(scales, s)


def _padded(factor: Tensor, r: int) -> Tensor:
    """A factor [., R, ...] with zeros up to rank r."""
    shape = [len(factor), r - factor.shape[1], *factor.shape[2:]]
    return torch.cat([factor, factor.new_zeros(shape)], 1) if shape[1] else factor


def _scaled(B: Tensor, ratio: float) -> Tensor:
    """B times a ratio, in 32 bits if its own precision would round it."""
    if ratio == 1:
        return B
    exact = B.float() * ratio
    return exact.to(B.dtype) if torch.equal(exact.to(B.dtype).float(), exact) else exact
