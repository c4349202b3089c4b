"""The default budget: what a full batch and its adapters need, as far as the machine can spare it."""

from __future__ import annotations

from typing import Any

import torch

from lorary.layers.kinds import KINDS, kind_of
from lorary.layers.quantized_weight import compute_dtype
from lorary.layers.rope import max_context, text_config
from lorary.serve.scheduler.policy import Policy

_RANK = 16  # of the adapters that room is kept for
_TOKENS = 4096  # of a running request on a CPU, whose memory other programs share; a GPU is the server's alone


def most_budget(device: torch.device) -> int:
    """The largest default budget in bytes: 80 % of a GPU's free memory, or a quarter of the host's, 2 GiB at most."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * 0.8)
    import psutil

    return min(int(psutil.virtual_memory().available) // 4, 2 * 2**30)


def default_budget(model: Any, policy: Policy, *, page: int, merged: int) -> int:
    """Bytes of adapters, keys and values: what a full batch needs, as far as it may be taken.

    Args:
        model: a causal language model.
        policy: of the queue.
        page: tokens whose keys and values lie together.
        merged: bytes of a second copy of its weights.
    """
    return min(needed_bytes(model, policy, page, model.device) + merged, most_budget(model.device))


def needed_bytes(model: Any, policy: Policy, page: int, device: torch.device) -> int:
    """Bytes of keys, values and adapters of a full batch.

    It has `policy.max_running` requests as long as the context, on a CPU of 4,096 tokens at most, and
    `policy.max_adapters` adapters of rank 16 on all linear layers. Adapters never take more than half of the memory,
    and the other half holds a request of the whole context.

    Args:
        model: a causal language model.
        policy: of the queue.
        page: tokens whose keys and values lie together.
        device: of the model.
    """
    context, token = max_context(text_config(model)) or _TOKENS, token_bytes(model)
    length = context if device.type == "cuda" else min(context, _TOKENS)
    adapters = policy.max_adapters * adapter_bytes(model, _RANK)
    longest = token * (context + 2 * page)  # whole pages, and one for padding
    return max(policy.max_running * token * length + adapters, 2 * adapters, 2 * longest)


def token_bytes(model: Any) -> int:
    """Bytes of the keys and values of a token in all layers; 0 if the configuration has no attention heads."""
    config = text_config(model)
    heads = getattr(config, "num_attention_heads", None) or 0
    width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return int(2 * config.num_hidden_layers * kv_heads * width * model.dtype.itemsize)


def adapter_bytes(model: Any, rank: int) -> int:
    """Bytes of an adapter of this rank on all linear layers, without the output head."""
    head = model.get_output_embeddings()
    layers = {m: KINDS[kind] for m in model.modules() if m is not head and (kind := kind_of(m)) is not None}
    linear = {layer: kind for layer, kind in layers.items() if kind.rowwise}
    return sum(rank * sum(kind.size(m)) * compute_dtype(m, model).itemsize for m, kind in linear.items())
