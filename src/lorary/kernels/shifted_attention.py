"""Shifted sparse attention (S²): in training a token attends to the earlier tokens of its group of G, not to all L.

    first half of the heads    groups [0, G), [G, 2G), ...
    second half                groups [0, G/2), [G/2, 3G/2), ..., [L - G/2, L)

The groups of the two halves overlap, so that information passes between groups from layer to layer. Each group is one
causal call of PyTorch's fused attention: no L x L mask is made or kept.

Chen et al. 2023, arXiv:2309.12307, section 3.2.

Differs from the authors' code: it rolls the sequence by -G/2, which puts the first G/2 tokens into one group with the
last ones, after them, so that they attend to the future; here no group wraps around. Padded and packed sequences have
groups of their own, counted from each sequence's first token, in batches of any size. A length that G does not divide
ends in a shorter group.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor


def group_ends(length: int, size: int, first: int) -> list[int]:
    """The ends of the groups of a sequence: the first group has `first` tokens, the others `size`.

    >>> group_ends(10, 4, 2)
    [2, 6, 10]
    """
    return [*range(first, length, size), length]


def shifted(
    query: Tensor, key: Tensor, value: Tensor, size: int, *, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """S² for rows of one sequence each.

    Args:
        query: [batch, heads, L, width].
        key, value: [batch, key heads, L, width]; a key head serves heads / key heads consecutive heads.
        size: G, tokens of a group.
        scale: of the scores; None for 1 / sqrt(width).
        dropout: probability of dropping a score.

    Returns:
        [batch, L, heads, width].
    """
    length = query.shape[2]
    halves = []
    for (q, k, v), first in zip(_halves(query, key, value), (size, size // 2), strict=True):
        front = min(first % size, length)  # length of the short first group; the full groups are batched
        full, rest = divmod(length - front, size)
        spans = [(n, count) for n, count in ((front, 1), (size, full), (rest, 1)) if n and count]
        parts = zip(*(x.split([n * count for n, count in spans], 2) for x in (q, k, v)), strict=True)
        outs = []
        for (n, count), part in zip(spans, parts, strict=True):
            # [batch, heads, count * n, width] -> [batch * count, heads, n, width]
            batched = [x.unflatten(2, (count, n)).transpose(1, 2).flatten(0, 1) for x in part]
            y = _causal(batched, scale, dropout)
            outs.append(y.transpose(1, 2).reshape(len(query), count * n, *y.shape[1::2]))
        halves.append(outs[0] if len(outs) == 1 else torch.cat(outs, 1))
    return torch.cat(halves, 2)


def _halves(query: Tensor, key: Tensor, value: Tensor) -> list[tuple[Tensor, ...]]:
    """(q, k, v) of each half of the heads; an odd number of key heads is repeated first."""
    heads, keys = query.shape[1], key.shape[1]
    if keys % 2 and keys < heads:
        # contiguous by token, as a model makes them, so that groups are views
        key, value = (x.transpose(1, 2).repeat_interleave(heads // keys, 2).transpose(1, 2) for x in (key, value))
    split = [x.split([x.shape[1] - x.shape[1] // 2, x.shape[1] // 2], 1) for x in (query, key, value)]
    return list(zip(*split, strict=True))


def _causal(qkv: Sequence[Tensor], scale: float | None, dropout: float) -> Tensor:
    """Causal attention [groups, heads, tokens, width]."""
    q, k, v = qkv
    return F.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


# --- padded and packed sequences ------------------------------------------------------------------------------


@dataclass(frozen=True)
class GroupLayout:
    """The positions of a batch's tokens, and the groups of each half of the heads.

    Args:
        tokens: [T] the positions of all tokens but padding in the flattened batch.
        padding: [batch * L] true for padding.
        back: [batch * L] the index in `tokens` of each position; 0 for padding.
        bounds: for each half, the bounds of its groups among `tokens`: [groups + 1].
        places: for each half, [groups, longest] the positions of a group's tokens; a short group repeats its last.
        slots: for each half, [batch * L] the index in `places` of each position; the first token's for padding.
    """

    tokens: Tensor
    padding: Tensor
    back: Tensor
    bounds: tuple[Tensor, ...]
    places: tuple[Tensor, ...]
    slots: tuple[Tensor, ...]

    @staticmethod
    def of(segments: Tensor, groups: int, size: int | None = None) -> GroupLayout:
        """The layout for [batch, L] sequence numbers, which grow along a row; 0 is padding. Sequences do not span rows.

        Args:
            segments: from `lorary.layers.shifted_attention.sequence_numbers`.
            groups: the longest sequence is divided into this many groups.
            size: tokens per group, instead.
        """
        device = segments.device
        rows = torch.arange(len(segments), device=device)[:, None] * (segments.shape[1] + 1) * len(segments)
        flat = torch.where(segments > 0, segments + rows, 0).flatten()
        if flat.is_meta:  # no values: assume no padding
            tokens, lengths = torch.empty_like(flat, dtype=torch.long), [segments.shape[1]] * segments.shape[0]
        else:
            tokens = flat.nonzero().flatten()
            lengths = flat[tokens].unique_consecutive(return_counts=True)[1].tolist()
        back = torch.zeros_like(flat, dtype=torch.long)
        back[tokens] = torch.arange(len(tokens), device=device)
        size = size or group_size(max(lengths, default=1), groups)
        layouts = [_group_layout(lengths, size, first, device) for first in (size, size // 2 or size)]
        bounds, places, slots = zip(*layouts, strict=True)
        empty = not lengths
        return GroupLayout(
            tokens,
            flat == 0,
            back,
            bounds,
            tuple(tokens[p] for p in places),
            tuple(back if empty else s[back] for s in slots),
        )


def _group_layout(lengths: Sequence[int], size: int, first: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(bounds, places among the tokens, slots) of the groups of consecutive sequences of these lengths."""
    starts = [0, *accumulate(lengths)]
    stops = [start + end for start, n in zip(starts, lengths, strict=False) for end in group_ends(n, size, first)]
    bounds = torch.tensor([0, *stops])
    sizes = bounds.diff()
    longest = int(sizes.max()) if len(sizes) else 0
    offsets = torch.arange(longest)
    places = bounds[:-1, None] + torch.minimum(offsets, sizes[:, None] - 1)
    slots = (offsets < sizes[:, None]).flatten().nonzero().flatten()
    return bounds.to(device, torch.int32), places.to(device), slots.to(device)


def group_size(length: int, groups: int) -> int:
    """G, the tokens per group when `length` tokens are divided into `groups`.

    >>> group_size(8192, 4), group_size(10, 4)
    (2048, 3)
    """
    return -(-length // groups)


def shifted_ragged(
    query: Tensor, key: Tensor, value: Tensor, layout: GroupLayout, *, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """S² for padded and packed rows; arguments and result as for `shifted`. The output for padding is zero."""
    batch, heads, length, _ = query.shape
    if not len(layout.tokens):
        return query.new_zeros(batch, length, heads, value.shape[-1])
    kernel = _varlen() if _on_flash(query, value, dropout) else None
    halves = []
    for half, (q, k, v) in enumerate(_halves(query, key, value)):
        rows = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]  # [batch * L, heads, width]
        places = layout.places[half]
        if kernel is not None:
            there = (x.index_select(0, layout.tokens) for x in rows)
            y, back = kernel(*there, layout.bounds[half], places.shape[1], scale), layout.back
        else:
            folded = [x.index_select(0, places.flatten()).unflatten(0, places.shape).transpose(1, 2) for x in rows]
            # a short group is padded with copies of its last token, to which no earlier token attends
            y, back = _causal(folded, scale, dropout).transpose(1, 2).flatten(0, 1), layout.slots[half]
        halves.append(y.index_select(0, back))
    output = torch.cat(halves, 1).masked_fill_(layout.padding[:, None, None], 0)  # [batch * L, heads, width]
    return output.view(batch, length, *output.shape[1:])


def _on_flash(query: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether the variable-length flash kernel supports these: CUDA from Ampere on, 16 bits, widths of 8 n."""
    width = query.shape[-1]
    fits = width == value.shape[-1] and width % 8 == 0 and width <= 256 and not dropout
    half = query.dtype in (torch.float16, torch.bfloat16)
    return fits and half and query.is_cuda and torch.cuda.get_device_capability(query.device) >= (8, 0)


@cache
def _varlen() -> Callable[..., Tensor] | None:
    """PyTorch's variable-length flash attention; None if this version lacks it or one of its options."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    if not {"scale", "window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys():
        return None

    def kernel(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float | None) -> Tensor:
        grouped = q.shape[1] != k.shape[1]
        options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0), "enable_gqa": grouped}
        output: Any = varlen_attn(q, k, v, bounds, bounds, longest, longest, **options)
        return cast(Tensor, output)

    return kernel
