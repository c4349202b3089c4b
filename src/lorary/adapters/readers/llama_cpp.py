"""llama.cpp, by way of its `convert_lora_to_gguf.py`: one alpha for all layers, each divided by its tensors' rank.

Read from `convert_lora_to_gguf.py` and `src/llama-adapter.cpp`.
"""

from __future__ import annotations

from collections.abc import Iterator

from lorary.adapters.peft.config import NAME
from lorary.adapters.readers.folder import AdapterFolder
from lorary.adapters.readers.reader import Finding, Outcome, Reader, first_of

_TURNED = ("c_attn", "c_proj", "c_fc")


def _rules(folder: AdapterFolder) -> Iterator[Finding]:
    if "lora_alpha" not in folder.config:
        yield LLAMA_CPP.finding(Outcome.REJECTED, f"{NAME}: lora_alpha", "llama.cpp's converter needs it", merged=False)
    yield from _transposed(folder)
    others = [name for name in LLAMA_CPP.unexplained(folder) if ".base_layer.weight" not in name]
    norms = [name for name in others if "layernorm" in name or ".norm" in name]
    if norms:
        what = "the converter keeps trained norms, and llama.cpp computes without them"
        yield LLAMA_CPP.finding(Outcome.MISCOMPUTED, first_of(norms), what, merged=True)
    if rest := [name for name in others if name not in norms]:
        yield LLAMA_CPP.finding(Outcome.REJECTED, first_of(rest), "its converter knows no such tensor", merged=True)


def _transposed(folder: AdapterFolder) -> Iterator[Finding]:
    """GPT-2's layers, whose weights are stored transposed: the converter turns their factors, which are not."""
    for site, shape in folder.sites.items() if folder.config.get("fan_in_fan_out") else ():
        if site.rpartition(".")[2] in _TURNED:
            square = folder.tensors.get(f"{site}.lora_B.weight", ())[:1] == shape[-1:]
            outcome = Outcome.MISCOMPUTED if square else Outcome.REJECTED
            what = "its converter transposes the update of GPT-2's layers, which does not fit then"
            if square:
                what = "its converter transposes the update of GPT-2's layers, and this one fits all the same"
            yield LLAMA_CPP.finding(outcome, site, what, merged=False)


def _scale(folder: AdapterFolder, site: str, rank: int) -> float:
    return float(folder.fields["lora_alpha"] / rank)


LLAMA_CPP = Reader(
    "llama.cpp",
    "llama.cpp",
    "llama.cpp 0b03ada (convert_lora_to_gguf.py)",
    export="gguf",
    refuses=frozenset({"dora", "lora_bias", "tokens", "replication", "experts", "absorbed", "convolutions"}),
    ignores=frozenset({"residual", "qalora", "bdlora", "arrow", "kasa", "fused_parts", "rope", "unknown"}),
    types=frozenset({"LORA", ""}),
    scale=_scale,
    rules=_rules,
)
