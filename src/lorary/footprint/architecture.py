"""The sizes that memory depends on, read from a model's configuration: no model is built, nothing is imported.

The letters are those of the formulas: H hidden width, M width of the MLP, Q and K widths of the queries and of the keys
(and values), n heads, L blocks, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "phi3", "smollm3")
"""Models whose block is Llama's: two RMS norms (or four), rotated queries and keys, a gated MLP."""
PLAIN = ("gpt2",)
"""Models whose block is GPT-2's: layer norms, one weight for queries, keys and values, two linear layers."""


@dataclass(frozen=True)
class Architecture:
    """The sizes of a decoder.

    Args:
        model_type: what Transformers calls the family.
        H: width of the hidden states.
        M: width inside the MLP.
        Q: width of all queries together.
        K: width of all keys together, and of all values.
        n: heads of the queries.
        L: blocks.
        V: vocabulary.
        tied: whether the output head is the embedding.
        head_norm: whether every query and key is normalised.
        four_norms: whether what attention and MLP give is normalised once more.
        attention: `sdpa` (a fused kernel) or `eager` (all scores are kept).
        dropout: what the model itself drops of attention scores and of what its sublayers give.
        groups: into how many groups the longest sequence is divided where attention is in groups (S²); 0: in full.
        positions: rows of a learnt table of positions; 0 for rotated ones.
    """

    model_type: str
    H: int
    M: int
    Q: int
    K: int
    n: int
    L: int
    V: int
    tied: bool = False
    head_norm: bool = False
    four_norms: bool = False
    attention: str = "sdpa"
    dropout: tuple[float, float] = (0.0, 0.0)
    positions: int = 0
    groups: int = 0

    @property
    def gated(self) -> bool:
        """Whether the block is Llama's; otherwise GPT-2's."""
        return self.model_type in GATED

    @property
    def fused(self) -> bool:
        """Whether queries, keys and values come from one weight."""
        return self.model_type in ("phi3", "gpt2")

    @property
    def head_width(self) -> int:
        """The width of one head."""
        return self.Q // self.n


def architecture(config: Any, guess: bool = False) -> Architecture | None:
    """The sizes in a configuration, or None for a model that is put together in another way.

    Args:
        config: what Transformers reads, or the content of `config.json`.
        guess: take a block for Llama's where the family is not known, but the sizes are.
    """
    settings: Mapping[str, Any] = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    kind = settings.get("model_type") or getattr(config, "model_type", None)

    def get(key: str, default: Any = None) -> Any:
        value = settings.get(key)
        if value is None and not isinstance(config, Mapping):
            value = getattr(config, key, None)
        return default if value is None else value

    try:
        if kind in GATED or (guess and kind not in PLAIN):
            return _gated(kind if kind in GATED else "llama", get)
        if kind in PLAIN:
            return _plain(kind, get)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    return None


_TIED = ("gemma", "gemma3_text", "smollm3")  # unless their configuration says otherwise
_HEAD_WIDTH = {"gemma": 256, "gemma3_text": 256, "qwen3": 128}


def _gated(kind: str, get: Any) -> Architecture:
    H, n = int(get("hidden_size")), int(get("num_attention_heads"))
    width = int(get("head_dim") or _HEAD_WIDTH.get(kind) or H // n)
    experts = get("num_experts") or get("num_local_experts")
    if experts or get("pretraining_tp", 1) > 1:
        raise ValueError("not Llama's block")
    capped = (get("final_logit_softcapping"), get("attn_logit_softcapping"), get("logit_scale", 1.0) != 1.0)
    if any(capped):
        raise ValueError("logits or scores are changed after they are made")
    eager = "eager" in (get("_attn_implementation"), get("attn_implementation"))
    return Architecture(
        kind,
        H,
        int(get("intermediate_size")),
        n * width,
        int(get("num_key_value_heads") or n) * width,
        n,
        int(get("num_hidden_layers")),
        int(get("vocab_size")),
        bool(get("tie_word_embeddings", kind in _TIED)),
        kind in ("qwen3", "gemma3_text"),
        kind == "gemma3_text",
        "eager" if eager else "sdpa",
        (float(get("attention_dropout", 0.0)), float(get("resid_pdrop", 0.0))),
    )


def _plain(kind: str, get: Any) -> Architecture:
    H, n = int(get("n_embd") or get("hidden_size")), int(get("n_head") or get("num_attention_heads"))
    return Architecture(
        kind,
        H,
        int(get("n_inner") or 4 * H),
        H,
        H,
        n,
        int(get("n_layer") or get("num_hidden_layers")),
        int(get("vocab_size")),
        bool(get("tie_word_embeddings", True)),
        attention="eager" if get("_attn_implementation") == "eager" else "sdpa",
        dropout=(float(get("attn_pdrop", 0.1)), float(get("resid_pdrop", 0.1))),
        positions=int(get("n_positions", 1024)),
    )
