"""SGLang: one rank and one scale, alpha / r, for all layers; most other fields are not looked at.

Read from `sglang/srt/lora/lora.py`, `lora_config.py`, `lora_manager.py`, `mem_pool.py` and `utils.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from lorary.adapters.peft.config import NAME
from lorary.adapters.readers.features import FEATURES
from lorary.adapters.readers.folder import AdapterFolder
from lorary.adapters.readers.reader import Finding, Outcome, Reader, first_of, is_of_experts

# A projection that is loaded into a fused one, and those that must be adapted beside it.
_BESIDE: Mapping[str, tuple[str, ...]] = {
    "q_proj": ("v_proj",),
    "k_proj": ("q_proj", "v_proj"),
    "v_proj": ("q_proj",),
    "up_proj": ("gate_proj",),
}
_LAYER = re.compile(r"\.\d+\.")
_SAVED = FEATURES["saved"].noun
_ADDED_TOKENS = "added_tokens.json"


def _rules(folder: AdapterFolder) -> Iterator[Finding]:
    missing = [key for key in ("r", "lora_alpha", "target_modules") if key not in folder.config]
    if missing:
        yield SGLANG.finding(Outcome.REJECTED, f"{NAME}: {missing[0]}", "is missing, and SGLang needs it", merged=False)
    if _ADDED_TOKENS in folder.files:
        yield SGLANG.finding(Outcome.REJECTED, _ADDED_TOKENS, "SGLang refuses adapters with added tokens", merged=True)
    r = folder.fields["r"]
    if others := [name for name, shape in folder.sites.items() if shape[0] != r and not is_of_experts(name)]:
        what = f"has the rank {folder.sites[others[0]][0]}, and SGLang's buffers have the rank {r} at every layer"
        yield SGLANG.finding(Outcome.REJECTED, first_of(others), what, merged=False)
    for name in FEATURES["saved"].places(folder):
        if _LAYER.search(name):
            what = "SGLang takes every tensor of a layer for an adapter's, and stops at this one"
            yield SGLANG.finding(Outcome.REJECTED, name, what, merged=True)
        else:
            yield SGLANG.finding(Outcome.MISCOMPUTED, name, f"SGLang computes without {_SAVED}", merged=True)
    for name, beside in _BESIDE.items():
        alone = [
            site
            for site in folder.sites
            if site.endswith(f".{name}")
            and ".experts" not in site
            and any(site.removesuffix(name) + other not in folder.sites for other in beside)
        ]
        if alone:
            what = f"SGLang fuses {name} and needs {' and '.join(beside)} adapted beside it"
            yield SGLANG.finding(Outcome.REJECTED, first_of(alone), what, merged=False)


def _scale(folder: AdapterFolder, site: str, rank: int) -> float:
    return float(folder.fields["lora_alpha"] / folder.fields["r"])


SGLANG = Reader(
    "sglang",
    "SGLang",
    "SGLang 0.5.23",
    export="sglang",
    refuses=frozenset({"dora", "pattern", "convolutions"}),
    ignores=frozenset(
        {"residual", "biases", "lora_bias", "tokens", "alora", "replication", "qalora", "bdlora", "arrow"}
        | {"kasa", "fused_parts", "rope", "unknown"}
    ),
    scale=_scale,
    rules=_rules,
)
