"""The features of adapter folders that some reader refuses or leaves out, and where a folder has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lorary.adapters.peft.config import NAME
from lorary.adapters.peft.fields import BOOK_KEEPING, SHARED
from lorary.adapters.peft.lora import LORA
from lorary.adapters.peft.writer import BASE_README
from lorary.adapters.readers.folder import AdapterFolder
from lorary.files.strict_json import show

_RESIDUAL = ("pissa", "olora", "corda", "loftq")  # inits that change the base while PEFT loads
_OFF: tuple[Any, ...] = (None, False, 0, "", "none", [], {})


@dataclass(frozen=True)
class Feature:
    """A feature that an adapter folder may have.

    Args:
        noun: in sentences, after "refuses" or "computes without".
        places: the fields, tensors or sites of a folder that have it.
        merged: whether only a merged model brings it to a reader that lacks it.
        no_export: why no merged model has it either; empty if one has.
    """

    noun: str
    places: Callable[[AdapterFolder], list[str]]
    merged: bool = True
    no_export: str = ""


def _set(name: str) -> Callable[[AdapterFolder], list[str]]:
    """Whether a field of the configuration is on."""
    return lambda folder: [f"{NAME}: {name}"] if folder.config.get(name) not in _OFF else []


def _tensors(*parts: str) -> Callable[[AdapterFolder], list[str]]:
    """The tensors with one of these components in their names."""
    return lambda folder: [n for n in folder.others if any(f".{part}" in f".{n}" for part in parts)]


def _either(name: str, part: str) -> Callable[[AdapterFolder], list[str]]:
    """The tensors with a component in their names, or else the field that asks for them."""
    return lambda folder: _tensors(part)(folder) or _set(name)(folder)


def _sites(holds: Callable[[str, tuple[int, ...]], bool]) -> Callable[[AdapterFolder], list[str]]:
    return lambda folder: [name for name, shape in folder.sites.items() if holds(name, shape)]


def _residual(folder: AdapterFolder) -> list[str]:
    init = folder.config.get("init_lora_weights")
    return [f"{NAME}: init_lora_weights"] if isinstance(init, str) and init.lower().startswith(_RESIDUAL) else []


def _saved(folder: AdapterFolder) -> list[str]:
    return [name for name in folder.others if folder.fields.saves_module_of(name)]


def _biases(folder: AdapterFolder) -> list[str]:
    saved = set(_saved(folder))
    return [n for n in folder.others if n.endswith(".bias") and ".lora_" not in n and n not in saved]


def _embeddings(folder: AdapterFolder) -> list[str]:
    return [name.removesuffix(".lora_embedding_A") for name in folder.tensors if name.endswith(".lora_embedding_A")]


def _unknown(folder: AdapterFolder) -> list[str]:
    """The fields that are on and that no release known here has."""
    known = {*LORA.fields, *SHARED, *BOOK_KEEPING, "lora_bias", "velora_config", "monteclora_config"}
    return [f"{NAME}: {show(key)}" for key, value in folder.config.items() if key not in known and value not in _OFF]


def _pattern(folder: AdapterFolder) -> list[str]:
    targets = folder.config.get("target_modules")
    return [f"{NAME}: target_modules"] if isinstance(targets, str) and targets != "all-linear" else []


FEATURES: Mapping[str, Feature] = {
    "dora": Feature("DoRA's magnitudes", _either("use_dora", "lora_magnitude_vector")),
    "residual": Feature("an initialisation that changes the base", _residual, merged=False),
    "biases": Feature("trained biases", _biases),
    "lora_bias": Feature("biases beside B", _either("lora_bias", "lora_B.bias")),
    "saved": Feature("modules trained in full", _saved),
    "tokens": Feature("trained rows of an embedding", _either("trainable_token_indices", "token_adapter")),
    "alora": Feature(
        "a start at an invocation sequence (aLoRA)",
        _set("alora_invocation_tokens"),
        no_export="an adapter that acts from the invocation on alone cannot be merged",
    ),
    "replication": Feature("repeated layers", _set("layer_replication")),
    "qalora": Feature("QA-LoRA's pooled input", _set("use_qalora")),
    "bdlora": Feature("block-diagonal factors", _set("use_bdlora")),
    "arrow": Feature("routing between adapters (Arrow)", _set("arrow_config")),
    "kasa": Feature("KaSA's change of the base", _set("kasa_config")),
    "fused_parts": Feature("adapters on parts of a fused weight (files of 2023)", _set("enable_lora")),
    "experts": Feature(
        "adapters of fused experts", _sites(lambda n, s: n.endswith((".experts", ".experts.base_layer")))
    ),
    "convolutions": Feature("adapters of convolutions", _sites(lambda n, s: len(s) > 2)),
    "embeddings": Feature("adapters of embeddings", _embeddings),
    "absorbed": Feature("adapters of kv_b_proj", _sites(lambda n, s: n.endswith(".kv_b_proj"))),
    "pattern": Feature("a pattern in `target_modules`", _pattern, merged=False),
    "rope": Feature("the RoPE scaling that the base needs", lambda f: [BASE_README] if BASE_README in f.files else []),
    "unknown": Feature("a field that it does not know", _unknown),
}
"""Name -> feature, of adapters of PEFT's type LORA."""
