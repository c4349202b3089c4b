"""PEFT's trainable tokens: rows of the vocabulary beside a LoRA (`trainable_token_indices`), or alone.

    beside a LoRA   <site>.token_adapter.trainable_tokens_delta (n, width), once for tied layers
    alone           <site>.trainable_tokens_delta (n, width), at each of the tied layers (TRAINABLE_TOKENS)

They hold the rows themselves, although they are called a delta. Where the base ties its head to the input embedding and
the embedding's rows train, PEFT trains the head's with them, unless the configuration names other tokens for the head.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from lorary.adapters.adapter import Adapter
from lorary.adapters.peft.config import PeftConfig
from lorary.adapters.peft.types import ROWS_FIELD
from lorary.adapters.tensor_checks import Layout
from lorary.errors import Diagnostic
from lorary.files.findings import Findings
from lorary.files.tensor_file import Entry
from lorary.layers.adapted import Adapted
from lorary.methods.lora import ConstantScale
from lorary.methods.token_rows import TokenRows
from lorary.model.base import Base
from lorary.spec.method import Method
from lorary.spec.no_update import NoInit, NoUpdate
from lorary.spec.placement import AdaptedSite, replaces_rows, unique_tensor_sets
from lorary.spec.site import Site

LEAF = "trainable_tokens_delta"
BESIDE = f"token_adapter.{LEAF}"
ALONE = "TRAINABLE_TOKENS"
KINDS = ("linear", "embedding")
_HEADS = ("lm_head", "embed_out", "output")  # names of heads, where there is no model to ask

Rows = dict[str, tuple[tuple[int, ...], str]]  # site -> its tokens, and the site whose tensor it has


def rows_method(tokens: Collection[int]) -> Method:
    """The method that trains the rows of these tokens."""
    return Method(NoUpdate(), NoInit(), ConstantScale(1.0), TokenRows(tuple(tokens)))


def tokens_of(adapted: AdaptedSite) -> tuple[int, ...]:
    """The tokens whose rows a site trains."""
    return adapted.join.tokens if isinstance(adapted.join, TokenRows) else ()


def rows_beside(adapted: AdaptedSite) -> Layout:
    """The layout of the rows that train beside a LoRA: tied layers have one tensor."""
    return {"R": (f"{adapted.share or adapted.site.name}.{BESIDE}", adapted.shapes["R"])}


def indices_field(adapter: Adapter) -> dict[str, list[int]]:
    """`trainable_token_indices` of an adapter: the path of an embedding or a head -> its tokens."""
    rows = [a for a in unique_tensor_sets(adapter.sites) if replaces_rows(a)]
    return {a.site.name: list(tokens_of(a)) for a in rows}


# --- what PEFT makes of a configuration on a base ---------------------------------------------------------------------


def row_sites(
    config: PeftConfig, base: Base | None, found: Mapping[str, Entry], findings: Findings
) -> list[AdaptedSite]:
    """The sites whose rows PEFT would train, by its own rules.

    Args:
        config: of the type LORA or TRAINABLE_TOKENS.
        base: the base, if at hand; without it, sites are those with tensors, and only their least size is known.
        found: the file's tensors by short name.
        findings: tokens that the base does not have, or names that it has no layer for.
    """
    alone = config.peft_type == ALONE
    asked = config["token_indices"] if alone else config.values.get(ROWS_FIELD)
    if not asked:
        if alone:
            findings.fatal.append(Diagnostic("adapter_config.json: token_indices", "names no token"))
        return []
    if base is None:
        return _sites_of_names(asked, found, LEAF if alone else BESIDE, findings)
    if alone:
        paths = [path for path, kind in base.kinds.items() if kind in KINDS and _named(config, path)]
        named = dict.fromkeys(paths or _input_embedding(base), asked)
    else:
        named = _paths(asked, base, findings)
    sites, rows = [], rows_on(base, named)
    if config.values.get("ensure_weight_tying") and not _are_tied_alike(base, named):
        what = "is true, and `trainable_token_indices` names other tokens for a head than for the embedding"
        findings.fatal.append(Diagnostic("adapter_config.json: ensure_weight_tying", what, "PEFT refuses this too"))
    owners = [owner for _, owner in rows.values()]
    for path, (tokens, owner) in rows.items():
        adapted = AdaptedSite(base.site(path), rows_method(tokens), owner if owners.count(owner) > 1 else "")
        findings.fatal += [Diagnostic(path, what) for what in adapted.join.problems(adapted.site)]
        sites.append(adapted)
    return sites


def rows_on(base: Base, asked: Mapping[str, tuple[int, ...]]) -> Rows:
    """The rows that PEFT trains on a base for these paths, with the layers that it ties to the input embedding."""
    rows: Rows = {path: (tokens, path) for path, tokens in asked.items()}
    (table,) = _input_embedding(base) or [""]
    if table in asked and _are_tied_alike(base, asked):
        rows |= dict.fromkeys(_tied_layers(base, table), (asked[table], table))
    order = list(base.kinds)
    return dict(sorted(rows.items(), key=lambda item: order.index(item[0])))


def row_problems(adapter: Adapter, model: nn.Module | None) -> list[Diagnostic]:
    """Why PEFT would not train an adapter's rows on this model as it does: it decides by itself what is tied."""
    rows = [a for a in adapter.sites if replaces_rows(a)]
    if model is None and len(rows) > 1:  # both ends of a vocabulary, tied as they were trained
        return []
    if model is None:
        what = "only the model knows which layers are tied to it, and PEFT trains them together"
        return [Diagnostic(rows[0].site.name, what, "give the model too: model=, or --base on the command line")]
    base = Base(model)
    asked = {a.site.name: tokens_of(a) for a in unique_tensor_sets(rows)}
    if unknown := [path for path in asked if path not in base.kinds]:
        return [Diagnostic(path, "the model has no such layer") for path in unknown]
    theirs = rows_on(base, asked)
    ours = {a.site.name: (tokens_of(a), a.share or a.site.name) for a in rows}
    what = "PEFT trains the rows of tied layers together, and others apart"
    return [Diagnostic(path, what) for path in theirs if ours.get(path) != theirs[path]]


def _are_tied_alike(base: Base, asked: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the layers that are tied to the input embedding have its tokens, as far as they are named."""
    (table,) = _input_embedding(base) or [""]
    tied = _tied_layers(base, table) if table in asked else []
    return all(asked.get(path, asked[table]) == asked[table] for path in tied)


def _named(config: PeftConfig, path: str) -> bool:
    return config["target_modules"] is not None and config.targets_module(path)


def _input_embedding(base: Base) -> list[str]:
    """The path of the base's input embedding, in a list; none if the base does not say which it is."""
    try:
        table = base.model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return []
    inner = table.base if isinstance(table, Adapted) else table
    return [path for path, module in base.modules.items() if module is inner and path in base.kinds][:1]


def _tied_layers(base: Base, table: str) -> list[str]:
    """The layers with the input embedding's weight, if the configuration says that it is tied."""
    config: Any = getattr(base.model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not table or not any(getattr(part, "tie_word_embeddings", False) for part in (config, text)):
        return []
    own = base.first_names.get(f"{table}.weight")
    return [path for path in base.kinds if base.first_names.get(f"{path}.weight", "") == own]


def _paths(asked: Any, base: Base, findings: Findings) -> dict[str, tuple[int, ...]]:
    """path -> tokens, of the value of `trainable_token_indices`."""
    if not isinstance(asked, Mapping):
        found = _input_embedding(base) or [path for path in base.kinds if f".{path}".endswith(".embed_tokens")][:1]
        asked = dict.fromkeys(found, asked)
        if not found:
            what = "names no layer, and the model has no input embedding"
            findings.fatal.append(Diagnostic("adapter_config.json: trainable_token_indices", what))
    paths: dict[str, tuple[int, ...]] = {}
    for name, tokens in asked.items():
        here = [path for path in base.kinds if path.endswith(name)]  # PEFT compares letters
        if not here:
            what = f"names {name!r}, and the model has no such layer"
            findings.fatal.append(Diagnostic("adapter_config.json: trainable_token_indices", what))
        paths |= dict.fromkeys(here, tokens)
    return paths


def _sites_of_names(asked: Any, found: Mapping[str, Entry], leaf: str, findings: Findings) -> list[AdaptedSite]:
    """The sites with tensors in the file; their vocabulary is as large as the tokens need at least."""
    sites = []
    for path, entry in ((n.removesuffix(f".{leaf}"), entry) for n, entry in found.items() if n.endswith(f".{leaf}")):
        tokens = asked
        if isinstance(asked, Mapping):
            tokens = next((value for key, value in reversed([*asked.items()]) if path.endswith(key)), None)
        if tokens is None:
            what = f"is there, and `trainable_token_indices` names {', '.join(map(repr, asked))}"
            findings.fatal.append(Diagnostic(f"{path}.{leaf}", what))
            continue
        size, width = max(tokens, default=0) + 1, entry.shape[-1] if entry.shape else 1
        if path.rpartition(".")[2] in _HEADS:
            site = Site(path, "linear", size, width, bias=False)
        else:
            site = Site(path, "embedding", width, size, bias=False)
        sites.append(AdaptedSite(site, rows_method(tokens)))
    there = {tokens_of(a) for a in sites}
    for key, tokens in asked.items() if isinstance(asked, Mapping) else ():
        if there and tokens not in there:  # with the same tokens it may be tied to another layer
            what = "is missing, and `trainable_token_indices` names tokens of its own for it"
            findings.fatal.append(Diagnostic(f"{key}.{leaf}", what))
    return sites
