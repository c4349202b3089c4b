"""Attention of each request over its own keys and values, for the flattened batches of continuous batching.

The usual functions build one dense mask for all queries over all keys, so that their work grows with the square of the
batch. On a CPU a loop over the requests is faster; on a GPU flash attention does the same in one kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_FREE_PADDING = 512  # keys: less than the cost of a call
NAME = "lorary_flash_of_each_request"  # "flash" tells Transformers that it needs no mask


def attention_of_each_request(
    module: torch.nn.Module,
    query: Tensor,  # [1, heads, tokens, dim]
    key: Tensor,  # [1, kv heads, tokens, dim]
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Update the paged cache and attend; an entry of Transformers' table of attention functions.

    Args:
        module: the attention module.
        query, key, value: of all requests, one after another.
        scaling: of the scores; None for 1 / sqrt(dim).
        sliding_window: keys that a query sees at most, its own included.
        softcap: of the scores (Gemma 2).
        s_aux: [heads] attention sinks (GPT-OSS).
        cache: Transformers' paged cache, which returns the keys and values of all requests with those of earlier
            tokens; None if the module has updated it already, as from Transformers 5.24 on.
        kwargs: the borders of the requests (`cu_seq_lens_q`, `cu_seq_lens_k`), and what the cache needs.

    Returns:
        [1, tokens, heads, dim], and no weights.
    """
    if cache is not None:
        key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    if attention_mask is not None or not isinstance(kwargs.get("cu_seq_lens_k"), Tensor):
        raise ValueError("this attention is for continuous batching, without a mask")
    queries, keys = kwargs["cu_seq_lens_q"].tolist(), kwargs["cu_seq_lens_k"].tolist()
    out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])
    rows = [(slice(*q), slice(*k)) for q, k in zip(pairwise(queries), pairwise(keys), strict=True)]
    plain = not softcap and s_aux is None
    if plain and (decoding := _worth_batching(rows, sliding_window)):
        places = [q.start for q, _ in decoding]
        out[0, places] = _of_single_tokens(query[0, :, places], key[0], value[0], [k for _, k in decoding], scaling)
        rows = [(q, k) for q, k in rows if q.stop - q.start != 1]
    for q, k in rows:
        own = (query[:, :, q], key[:, :, k], value[:, :, k])
        if plain:
            part = _fused(*own, scaling, sliding_window)
        else:
            part = _by_definition(*own, scaling, sliding_window, softcap, s_aux)
        out[:, q] = part.transpose(1, 2)
    return out, None


def _worth_batching(rows: Sequence[tuple[slice, slice]], window: int | None) -> list[tuple[slice, slice]]:
    """The requests with one token, if padding their keys to the longest costs less than a call for each."""
    single = [row for row in rows if row[0].stop - row[0].start == 1]
    lengths = [k.stop - k.start for _, k in single]
    if len(single) < 2 or (window is not None and max(lengths) > window):
        return []
    padding = len(single) * max(lengths) - sum(lengths)
    return single if padding <= max(sum(lengths), _FREE_PADDING) else []


def _of_single_tokens(
    query: Tensor, key: Tensor, value: Tensor, spans: Sequence[slice], scaling: float | None
) -> Tensor:
    """Attention of one token of each of several requests.

    Args:
        query: [heads, requests, dim].
        key, value: [kv heads, tokens, dim] of all requests.
        spans: the keys of each request.
        scaling: of the scores.

    Returns:
        [requests, heads, dim].
    """
    heads, count, kv_heads = query.shape[0], query.shape[1], key.shape[0]
    lengths = torch.tensor([k.stop - k.start for k in spans], device=key.device)
    place = torch.arange(int(lengths.max()), device=key.device)
    index = torch.tensor([k.start for k in spans], device=key.device)[:, None] + place
    index.clamp_(max=key.shape[1] - 1)  # behind the last request there is nothing to pad with
    grouped = query.reshape(kv_heads, heads // kv_heads, count, -1).permute(2, 0, 1, 3)  # a group's heads as queries
    k, v = (_rows_of(t, index) for t in (key, value))
    mask = (place < lengths[:, None])[:, None, None]
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scaling).reshape(count, heads, -1)


def _rows_of(x: Tensor, index: Tensor) -> Tensor:
    """[kv heads, tokens, dim] -> [requests, kv heads, n, dim] by [requests, n] places; a token lies in one piece."""
    found = x.transpose(0, 1).index_select(0, index.flatten())
    return found.view(*index.shape, *found.shape[1:]).transpose(1, 2)


def _fused(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """Attention of the last tokens of one sequence: [1, heads, m, dim] over [1, kv heads, n, dim]."""
    heads, m, kv_heads, n = query.shape[1], query.shape[2], key.shape[1], key.shape[2]
    mask = None if m == 1 and (window is None or n <= window) else _mask(m, n, window, query.device)
    if m == 1 and mask is None and heads != kv_heads:  # the heads of a group as queries: keys are read once
        grouped = query.reshape(1, kv_heads, heads // kv_heads, -1)
        return F.scaled_dot_product_attention(grouped, key, value, scale=scaling).reshape(1, heads, 1, -1)
    causal = m == n > 1 and (window is None or n <= window)
    return F.scaled_dot_product_attention(
        *(query, key, value),
        attn_mask=None if causal else mask,
        is_causal=causal,
        scale=scaling,
        enable_gqa=heads != kv_heads,
    )


def _by_definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """The same with a softcap on the scores, and with sinks: scores of no key, which take part of the weight."""
    heads, m, n = query.shape[1], query.shape[2], key.shape[2]
    key, value = (t.repeat_interleave(heads // t.shape[1], 1) for t in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.float().masked_fill(~_mask(m, n, window, query.device), -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(1, heads, 1, 1).expand(1, heads, m, 1)], -1)
    weights = scores.softmax(-1)[..., :n]
    return weights.to(value.dtype) @ value


def _mask(m: int, n: int, window: int | None, device: torch.device) -> Tensor:
    """[m, n] the keys that each of the last m of n tokens sees."""
    distance = torch.arange(n - m, n, device=device)[:, None] - torch.arange(n, device=device)
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)
