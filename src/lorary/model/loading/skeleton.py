"""Llama's decoder on the meta device, without Transformers: its import would take most of the time of `lorary plan`.

Names, shapes and operations are those of Transformers' models of the families below, so a training step takes the same
memory; the tests compare both. Every other model comes from Transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorary.layers.transformers_internals import ATTENTION_KEYS

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

Rotation = tuple[Tensor, Tensor]  # cosines and sines, [1, length, head width]


class Norm(nn.Module):
    """RMS norm, computed in 32 bits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with RoPE, and with norms per head for Qwen 3."""

    def __init__(self, a: SimpleNamespace) -> None:
        super().__init__()
        queries, keys = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
        self.width, self.groups = a.head_dim, a.num_attention_heads // a.num_key_value_heads
        self.q_proj = linear(a.hidden_size, queries, a.qkv_bias)
        self.k_proj = linear(a.hidden_size, keys, a.qkv_bias)
        self.v_proj = linear(a.hidden_size, keys, a.qkv_bias)
        self.o_proj = linear(queries, a.hidden_size, a.output_bias)
        self.normed = a.model_type == "qwen3"
        if self.normed:
            self.q_norm, self.k_norm = Norm(a.head_dim), Norm(a.head_dim)

    def forward(self, x: Tensor, rotation: Rotation, mask: Tensor | None) -> Tensor:
        heads = (*x.shape[:-1], -1, self.width)
        q, k, v = (f(x).view(heads) for f in (self.q_proj, self.k_proj, self.v_proj))
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = _rotated(q.transpose(1, 2), rotation), _rotated(k.transpose(1, 2), rotation), v.transpose(1, 2)
        if mask is not None:  # no fused kernel takes both a mask and grouped keys
            k, v = self._for_all_heads(k), self._for_all_heads(v)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=mask is None)
        projected: Tensor = self.o_proj(y.transpose(1, 2).contiguous().reshape(*x.shape[:-1], -1))
        return projected

    def _for_all_heads(self, x: Tensor) -> Tensor:
        batch, heads, length, width = x.shape
        if self.groups == 1:
            return x
        return x[:, :, None].expand(-1, -1, self.groups, -1, -1).reshape(batch, heads * self.groups, length, width)


def _rotated(x: Tensor, rotation: Rotation) -> Tensor:
    cos, sin = (part.unsqueeze(1) for part in rotation)
    half = x.shape[-1] // 2
    return (x * cos) + (torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin)


class MLP(nn.Module):
    """The gated MLP."""

    def __init__(self, a: SimpleNamespace) -> None:
        super().__init__()
        self.gate_proj = linear(a.hidden_size, a.intermediate_size, a.mlp_bias)
        self.up_proj = linear(a.hidden_size, a.intermediate_size, a.mlp_bias)
        self.down_proj = linear(a.intermediate_size, a.hidden_size, a.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, a: SimpleNamespace) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(a), MLP(a)
        self.input_layernorm, self.post_attention_layernorm = Norm(a.hidden_size), Norm(a.hidden_size)

    def forward(self, x: Tensor, rotation: Rotation, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class Rotary(nn.Module):
    """Rotary position embedding."""

    inv_freq: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in ("inv_freq", "original_inv_freq"):
            self.register_buffer(name, torch.empty(width // 2), persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Rotation:
        positions = torch.arange(x.shape[1], device=x.device)[None, :, None].float()
        angles = positions * self.inv_freq.float()
        both = torch.cat((angles, angles), dim=-1)
        return both.cos().to(x.dtype), both.sin().to(x.dtype)


class Decoder(nn.Module):
    """Embedding, blocks and the final norm."""

    def __init__(self, a: SimpleNamespace) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(a.vocab_size, a.hidden_size, _weight=torch.empty(a.vocab_size, a.hidden_size))
        self.layers = nn.ModuleList(Block(a) for _ in range(a.num_hidden_layers))
        self.norm = Norm(a.hidden_size)
        self.rotary_emb = Rotary(a.head_dim)
        self.checkpointing: Mapping[str, Any] = {}

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor]:
        x = self.embed_tokens(input_ids)
        rotation, mask = self.rotary_emb(x), None
        if attention_mask is not None:
            batch, length = input_ids.shape
            mask = torch.empty(batch, 1, length, length, dtype=torch.bool, device=x.device)
        for block in self.layers:
            inputs = (x, rotation, mask)
            x = checkpoint(block, *inputs, **self.checkpointing) if self.checkpointing else block(*inputs)
            del inputs
        return (self.norm(x),)


class Skeleton(nn.Module):
    """A Llama-like causal language model.

    Args:
        a: the content of `config.json`, completed by `_sizes`.
    """

    base_model_prefix = "model"

    def __init__(self, a: SimpleNamespace) -> None:
        super().__init__()
        self.config = a
        self.model = Decoder(a)
        self.lm_head = linear(a.hidden_size, a.vocab_size)
        if a.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def base_model(self) -> Decoder:
        """The model without its head."""
        return self.model

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """The LM head."""
        return self.lm_head

    def gradient_checkpointing_enable(self, options: Mapping[str, Any]) -> None:
        """Recompute every block in the backward pass, by `checkpoint` with these options."""
        self.model.checkpointing = options


def skeleton(settings: Mapping[str, Any], dtype: torch.dtype) -> Skeleton | None:
    """The model of a `config.json` on the meta device; None if it is not Llama-like.

    Args:
        settings: its content.
        dtype: of the weights.
    """
    a = _sizes(settings)
    if a is None:
        return None
    with torch.device("meta"):
        model = Skeleton(a)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def _sizes(settings: Mapping[str, Any]) -> SimpleNamespace | None:
    """The settings with Transformers' defaults filled in."""
    family = settings.get("model_type")
    if family not in FAMILIES or settings.get("quantization_config") or settings.get("attention_dropout"):
        return None
    windowed = settings.get("sliding_window", 4096 if family == "mistral" else None)
    if windowed and settings.get("use_sliding_window", family == "mistral"):
        return None
    if "eager" in (settings.get(key) for key in ATTENTION_KEYS) or settings.get("pretraining_tp", 1) > 1:
        return None
    a = SimpleNamespace(**settings)
    try:
        for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"):
            setattr(a, name, int(settings[name]))
        a.num_key_value_heads = int(settings.get("num_key_value_heads") or a.num_attention_heads)
        width = 128 if family == "qwen3" else a.hidden_size // a.num_attention_heads
        a.head_dim = int(settings.get("head_dim") or width)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    a.tie_word_embeddings = bool(settings.get("tie_word_embeddings", False))
    a.output_bias = family not in ("qwen2", "mistral") and bool(settings.get("attention_bias", False))
    a.qkv_bias = family == "qwen2" or a.output_bias
    a.mlp_bias = family == "llama" and bool(settings.get("mlp_bias", False))
    return a


def linear(in_features: int, out_features: int, bias: bool = False) -> nn.Linear:
    """A linear layer on the meta device, without nn.Linear's initialisation, which takes time even there."""
    layer = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(layer)
    layer.in_features, layer.out_features = in_features, out_features
    layer.weight = nn.Parameter(torch.empty(out_features, in_features, device="meta"))
    layer.register_parameter("bias", nn.Parameter(torch.empty(out_features, device="meta")) if bias else None)
    return layer
