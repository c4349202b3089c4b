"""A model's layers without weights and without Transformers: names and shapes, as a plan needs them.

To import Transformers and build a model on the meta device takes seconds, its configuration says the same in
milliseconds. Only for the families whose block is Llama's; the tests hold names and shapes to Transformers' own.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from lorary.footprint.adapters import linear
from lorary.footprint.architecture import Architecture, architecture

KNOWN = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "smollm3")


class Norm(nn.Module):
    """A norm's weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))


class Skeleton(nn.Module):
    """A decoder's shapes. It cannot run.

    Args:
        settings: the content of `config.json`.
        a: its sizes.
    """

    base_model_prefix = "model"

    def __init__(self, settings: Mapping[str, Any], a: Architecture) -> None:
        super().__init__()
        self.config = SimpleNamespace(**settings)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(a.V, a.H, _weight=torch.empty(a.V, a.H))
        self.model.layers = nn.ModuleList(_block(settings, a) for _ in range(a.L))
        self.model.norm = Norm(a.H)
        self.model.rotary_emb = nn.Module()
        for name in _rotations(settings, a):
            self.model.rotary_emb.register_buffer(f"{name}inv_freq", torch.empty(a.head_width // 2), persistent=False)
            original = torch.empty(a.head_width // 2)
            self.model.rotary_emb.register_buffer(f"{name}original_inv_freq", original, persistent=False)
        self.lm_head = linear(a.H, a.V)
        if a.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def get_input_embeddings(self) -> nn.Module:
        """The table of tokens."""
        return self.model.embed_tokens  # type: ignore[return-value]

    def get_output_embeddings(self) -> nn.Module:
        """The LM head."""
        return self.lm_head


def _rotations(settings: Mapping[str, Any], a: Architecture) -> list[str]:
    """Gemma 3 turns by two angles: one for its windows, one for every sixth block, which sees everything."""
    if a.model_type != "gemma3_text":
        return [""]
    kinds = settings.get("layer_types") or ["sliding_attention"] + ["full_attention"] * (a.L >= 6)
    return [f"{kind}_" for kind in sorted(set(kinds))]


def skeleton(settings: Mapping[str, Any], dtype: torch.dtype) -> Skeleton | None:
    """The shapes of the model that a `config.json` describes, on the meta device; None for another family.

    Args:
        settings: its content.
        dtype: of the weights.
    """
    a = architecture(settings)
    if a is None or settings.get("model_type") not in KNOWN or settings.get("quantization_config"):
        return None
    with torch.device("meta"):
        made = Skeleton(settings, a)
    for parameter in made.parameters():
        parameter.data = parameter.data.to(dtype)
    return made.eval()


def _block(settings: Mapping[str, Any], a: Architecture) -> nn.Module:
    qkv, out, mlp = _biases(settings, a.model_type)
    block, attention, wide = nn.Module(), nn.Module(), nn.Module()
    attention.q_proj = linear(a.H, a.Q, qkv)
    attention.k_proj = linear(a.H, a.K, qkv)
    attention.v_proj = linear(a.H, a.K, qkv)
    attention.o_proj = linear(a.Q, a.H, out)
    if a.head_norm:
        attention.q_norm, attention.k_norm = Norm(a.head_width), Norm(a.head_width)
    wide.gate_proj, wide.up_proj = linear(a.H, a.M, mlp), linear(a.H, a.M, mlp)
    wide.down_proj = linear(a.M, a.H, mlp)
    block.self_attn, block.mlp = attention, wide
    block.input_layernorm, block.post_attention_layernorm = Norm(a.H), Norm(a.H)
    if a.four_norms:
        block.pre_feedforward_layernorm, block.post_feedforward_layernorm = Norm(a.H), Norm(a.H)
    return block


def _biases(settings: Mapping[str, Any], kind: str) -> tuple[bool, bool, bool]:
    """Whether q, k and v, the layer after attention, and the MLP have biases."""
    if kind == "qwen2":
        return True, False, False
    if kind == "mistral":
        return False, False, False
    both = bool(settings.get("attention_bias", False))
    return both, both, bool(settings.get("mlp_bias", False)) and kind in ("llama", "smollm3")
