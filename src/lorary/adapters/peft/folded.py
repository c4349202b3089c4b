"""The folded form of a LoRA in PEFT's files, for readers that know only `r`, `lora_alpha` and a list of targets.

Some programs ignore `use_rslora`, `rank_pattern` and `alpha_pattern`, or take `target_modules` for a list, and compute
something else without a word. In the folded form every site has the largest rank, by rows and columns of zeros, and
alpha is rank times scale; where sites differ in their scale, the difference is in B.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lorary.adapters.adapter import Adapter
from lorary.adapters.peft import keys
from lorary.adapters.peft.config import json_number
from lorary.adapters.peft.joins import BIAS
from lorary.adapters.peft.lora import factor_names


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
    names = {a.site.name: [keys.full(n) for n in factor_names(a.site)] for a in adapter.sites if a.site.name in scales}
    r = max(tensors[A].shape[0] for A, _ in names.values())
    for site, (A, B) in names.items():
        found[A], found[B] = _padded(tensors[A], 0, r), _padded(_scaled(tensors[B], scales[site] / s), 1, r)
        if (c := keys.full(f"{site}.{BIAS}")) in tensors:
            found[c] = _scaled(tensors[c], scales[site] / s)
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


def _padded(factor: Tensor, dim: int, r: int) -> Tensor:
    """A factor with zeros up to rank r."""
    shape = list(factor.shape)
    shape[dim] = r - shape[dim]
    return torch.cat([factor, factor.new_zeros(shape)], dim) if shape[dim] else factor


def _scaled(B: Tensor, ratio: float) -> Tensor:
    """B times a ratio, in 32 bits if its own precision would round it."""
    if ratio == 1:
        return B
    exact = B.float() * ratio
    return exact.to(B.dtype) if torch.equal(exact.to(B.dtype).float(), exact) else exact
