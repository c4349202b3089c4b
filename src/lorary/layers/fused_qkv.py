"""Fused projections: the output rows of q, k and v, or of gate and up, in one weight, per architecture."""

from __future__ import annotations

from typing import Any

from torch import nn

from lorary.layers.kinds import KINDS, kind_of
from lorary.layers.multihead_attention import FUSED as IN_PROJECTION
from lorary.spec.site import Part

FUSED = {"c_attn", "qkv", "qkv_proj", "query_key_value", "Wqkv", IN_PROJECTION}

# Models that store q, k and v head by head; the others store q of all heads first.
_HEAD_BY_HEAD = {"bloom", "gpt_neox", "gpt_neox_japanese", "persimmon"}


def fused_parts(name: str, layer: nn.Module, config: Any) -> dict[str, Part]:
    """name -> projection inside a fused weight; {} for an unknown layout."""
    last = name.rpartition(".")[2]
    rows, columns = KINDS[kind_of(layer) or ""].size(layer)
    if last == "gate_up_proj" and getattr(layer, "interleaved", False):
        return {half: Part(half, start, 1, 2, rows // 2) for start, half in enumerate(("gate", "up"))}
    if last == "gate_up_proj" and rows % 2 == 0:
        return {"gate": Part("gate", 0, rows // 2), "up": Part("up", rows // 2, rows // 2)}
    if last not in FUSED:
        return {}
    if last == IN_PROJECTION:
        return _turns(rows, 1, 1)
    model = getattr(config, "model_type", "")
    if model == "codegen" and rows % 12 == 0:  # four blocks of q, v, k
        return {p: Part(p, i * (rows // 12), rows // 12, rows // 4, 4) for i, p in enumerate("qvk")}
    heads = getattr(config, "num_attention_heads", None) or 0
    kv = getattr(config, "num_key_value_heads", None) or heads
    if model == "falcon":
        kv = config.num_kv_heads if config.new_decoder_architecture else 1 if config.multi_query else heads
        return _turns(rows, heads, kv, turns=kv)
    if model in _HEAD_BY_HEAD or (model == "gpt_bigcode" and not config.multi_query):
        return _turns(rows, heads, heads, turns=heads)
    if last == "query_key_value" or model == "minimax":  # another layout
        return {}
    size = getattr(config, "head_dim", None) or (getattr(config, "hidden_size", 0) // heads if heads else 0)
    if kv != heads and rows == (heads + 2 * kv) * size:
        return _turns(rows, heads, kv)
    return _turns(rows, 1, 1) if rows in (3 * columns, 3 * heads * size) else {}


def _turns(rows: int, heads: int, kv: int, turns: int = 1) -> dict[str, Part]:
    """q, k, v repeated `turns` times, each time with an equal share of the heads."""
    if not heads or rows % (heads + 2 * kv):
        return {}
    size, step = rows // (heads + 2 * kv), rows // turns if turns > 1 else 0
    q, k = heads // turns * size, kv // turns * size
    return {"q": Part("q", 0, q, step, turns), "k": Part("k", q, k, step, turns), "v": Part("v", q + k, k, step, turns)}
