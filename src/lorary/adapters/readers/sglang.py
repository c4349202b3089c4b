"""SGLang: one rank and one scale, alpha / r, for all layers; most other fields are not looked at.

Read from `sglang/srt/lora/lora.py`, `lora_config.py`, `lora_manager.py`, `mem_pool.py` and `utils.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from lorary.adapters.readers.features import FEATURES
from lorary.adapters.readers.folder import AdapterFolder
from lorary.adapters.readers.reader import Finding, Outcome, Reader, first_of, is_of_experts, missing_fields

# A projection that is loaded into a fused one, and those that must be adapted beside it.
_BESIDE: Mapping[str, tuple[str, ...]] = {
    "q_proj": ("v_proj",),
    "k_proj": ("q_proj", "v_proj"),
    "v_proj": ("q_proj",),
    "up_proj": ("gate_proj",),
}
_FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
    **dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa"), "fused_qkv_a_proj_with_mqa"),
}
_NUMBER = re.compile(r"layers\.(\d+)\.")
_TABLES = ("embed_tokens", "lm_head")
_LAYER = re.compile(r"\.\d+\.")
_SAVED = FEATURES["saved"].noun
_ADDED_TOKENS = "added_tokens.json"


def _rules(folder: AdapterFolder) -> Iterator[Finding]:
    yield from missing_fields(SGLANG, folder)
    if _ADDED_TOKENS in folder.files:
        yield SGLANG.finding(Outcome.REJECTED, _ADDED_TOKENS, "SGLang refuses adapters with added tokens", merged=True)
    r = folder.fields["r"]
    if others := [name for name, shape in folder.sites.items() if shape[0] != r and not is_of_experts(name)]:
        what = f"has the rank {folder.sites[others[0]][0]}, and SGLang's buffers have the rank {r} at every layer"
        yield SGLANG.finding(Outcome.REJECTED, first_of(others), what, merged=False)
    yield from _unnamed(folder)
    yield from _misplaced(folder)
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
            yield SGLANG.finding(Outcome.REJECTED, first_of(alone), what, merged=True)


def _unnamed(folder: AdapterFolder) -> Iterator[Finding]:
    """The sites that `target_modules` does not name, as those of `target_parameters` alone."""
    entries = folder.config.get("target_modules")
    if not isinstance(entries, list):
        return
    targets = {_FUSED.get(leaf := str(entry).rpartition(".")[2], leaf) for entry in entries}
    for site in folder.sites:
        leaf = site.rpartition(".")[2]
        if _FUSED.get(leaf, leaf) in targets or any(target in site for target in targets):
            continue
        if _LAYER.search(site):
            what = "`target_modules` does not name it, and SGLang stops at tensors of a layer that it does not know"
            yield SGLANG.finding(Outcome.REJECTED, site, what, merged=False)
        else:
            what = "`target_modules` does not name it, and SGLang leaves it out"
            yield SGLANG.finding(Outcome.MISCOMPUTED, site, what, merged=False)


def _misplaced(folder: AdapterFolder) -> Iterator[Finding]:
    """The sites for whose tensors SGLang has no place, or one place for several: it has one for each layer's number."""
    places: dict[tuple[str, str], set[str]] = {}
    for site in folder.sites:
        parent, _, leaf = site.rpartition(".")
        if found := _NUMBER.search(f"{site}."):
            if ".experts" not in site:
                places.setdefault((found[1], _FUSED.get(leaf, leaf)), set()).add(parent)
        elif not any(table in site for table in _TABLES):
            what = "SGLang leaves out what is neither in `layers.<number>` nor an embedding"
            yield SGLANG.finding(Outcome.MISCOMPUTED, site, what, merged=True)
    for (number, leaf), parents in places.items():
        if len(parents) > 1:
            what = f"SGLang has one place for {leaf} of a layer's number, and {len(parents)} modules have it"
            yield SGLANG.finding(Outcome.MISCOMPUTED, f"layers.{number}", what, merged=True)


def _scale(folder: AdapterFolder, site: str, rank: int) -> float:
    return float(folder.fields["lora_alpha"] / folder.fields["r"])


SGLANG = Reader(
    "sglang",
    "SGLang",
    "SGLang 0.5.23",
    export="sglang",
    refuses=frozenset({"dora", "pattern", "experts", "convolutions"}),
    ignores=frozenset(
        {"residual", "biases", "lora_bias", "tokens", "alora", "replication", "qalora", "bdlora", "arrow"}
        | {"kasa", "fused_parts", "rope", "unknown"}
    ),
    scale=_scale,
    rules=_rules,
)
