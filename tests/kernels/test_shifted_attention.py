"""Shifted sparse attention against masks that are made token by token."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorary.kernels import shifted_attention
from lorary.kernels.shifted_attention import GroupLayout, group_ends, group_size, shifted, shifted_ragged

SHAPES = [  # batch, heads, key heads, length, group
    *itertools.product([1, 3], [4], [2, 4], [1, 2, 7, 16, 33], [1, 3, 4, 5, 8, 40]),
    *itertools.product([2], [6], [1, 3], [13, 16], [3, 4]),  # key heads that serve both halves
    *itertools.product([2], [1, 3, 5], [1], [9], [2, 4]),  # heads that cannot be halved
    *itertools.product([2], [3], [3], [9], [2, 4]),  # nor keys
]


def group_of(position: int, size: int, first: int) -> int:
    """The number of a token's group, counted in the plainest way."""
    number, end = 0, first
    while position >= end:
        number, end = number + 1, end + size
    return number


def allowed(sequences: list[int], size: int, heads: int) -> Tensor:
    """[heads, L, L]: which token sees which, in a row of sequences (0 is padding), token by token."""
    length = len(sequences)
    offsets = [sequences[:i].count(s) for i, s in enumerate(sequences)]  # within the own sequence
    mask = torch.zeros(heads, length, length, dtype=torch.bool)
    for head, i, j in itertools.product(range(heads), range(length), range(length)):
        first = size if head < heads - heads // 2 else (size // 2 or size)
        same = sequences[i] == sequences[j] != 0 and j <= i
        mask[head, i, j] = same and group_of(offsets[i], size, first) == group_of(offsets[j], size, first)
    return mask


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Full attention under a mask [batch, heads, L, L], keys repeated for their heads before anything is divided."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3).transpose(1, 2)


def qkv(batch: int, heads: int, keys: int, length: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """As models make them: [batch, heads, L, width], of memory in which a token's heads lie side by side."""
    torch.manual_seed(batch * 1000 + heads * 100 + length)
    made = [torch.randn(batch, length, n, 8, dtype=dtype).transpose(1, 2) for n in (heads, keys, keys)]
    return [x.requires_grad_() for x in made]


@pytest.mark.parametrize(("batch", "heads", "keys", "length", "size"), SHAPES)
def test_full_rows_are_those_of_the_mask(batch: int, heads: int, keys: int, length: int, size: int) -> None:
    q, k, v = qkv(batch, heads, keys, length)
    mask = allowed([1] * length, size, heads).expand(batch, -1, -1, -1)
    expected = reference(q, k, v, mask)
    layout = GroupLayout.of(torch.arange(1, batch + 1)[:, None].expand(batch, length), 4, size)
    seed = torch.randn_like(expected)
    grads = torch.autograd.grad(expected, (q, k, v), seed)
    for made in (shifted(q, k, v, size, scale=0.3), shifted_ragged(q, k, v, layout, scale=0.3)):
        assert torch.allclose(made, expected, atol=1e-12)
        for mine, theirs in zip(torch.autograd.grad(made, (q, k, v), seed), grads, strict=True):
            assert torch.allclose(mine, theirs, atol=1e-12)


ROWS = {
    "padded behind": [[1] * 11, [2] * 5 + [0] * 6],
    "padded in front": [[0] * 4 + [1] * 7, [2] * 11],
    "padded on both sides, with a hole": [[0, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0], [2] * 11],
    "packed": [[1] * 3 + [2] * 7 + [3], [4] * 6 + [5] * 5],
    "packed and padded": [[1] * 4 + [2] * 4 + [0] * 3, [3] * 10 + [0]],
    "a row of padding": [[0] * 11, [1] * 11],
}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 20])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_sequences_have_groups_of_their_own(rows: list[list[int]], size: int) -> None:
    q, k, v = qkv(2, 4, 2, 11)
    mask = torch.stack([allowed(row, size, 4) for row in rows])
    real = torch.tensor(rows) != 0
    expected = reference(q, k, v, mask)
    made = shifted_ragged(q, k, v, GroupLayout.of(torch.tensor(rows), 4, size), scale=0.3)
    assert torch.allclose(made[real], expected[real], atol=1e-12)
    assert not made[~real].any()


def test_nothing_sees_the_future_in_any_head() -> None:
    """Perturb one token after the other: no output before it moves, in no head, and some behind it does."""
    length, heads = 13, 6
    for size, layout in itertools.product((3, 4, 5), (None, [1] * 5 + [2] * 8)):
        q, k, v = (x.detach() for x in qkv(2, heads, 3, length))

        def run(*qkv: Tensor, size: int = size, layout: Any = layout) -> Tensor:
            if layout is None:
                return shifted(*qkv, size)
            return shifted_ragged(*qkv, GroupLayout.of(torch.tensor([layout, [3] * length]), 4, size))

        before = run(q, k, v)
        for token in range(length):
            changed = [x.clone() for x in (q, k, v)]
            for x in changed:
                x[:, :, token] += 1.0
            moved = (run(*changed) != before).any(-1)  # [batch, L, heads]
            assert not moved[:, :token].any(), token
            assert moved[:, token].all(), token


def test_the_rolled_form_would_be_caught() -> None:
    """The authors' plain path rolls the sequence by half a group: the law above must see what that leaks."""
    q, k, v = (x.detach() for x in qkv(1, 2, 2, 12))

    def rolled(*qkv: Tensor) -> Tensor:
        turned = [torch.cat([x[:, :1], x[:, 1:].roll(-2, 2)], 1) for x in qkv]
        parts = [x.unflatten(2, (3, 4)).transpose(1, 2).flatten(0, 1) for x in turned]
        y = F.scaled_dot_product_attention(*parts, is_causal=True).unflatten(0, (1, 3)).transpose(1, 2).flatten(2, 3)
        return torch.cat([y[:, :1], y[:, 1:].roll(2, 2)], 1)

    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[:, :, -1] += 1.0
    moved = (rolled(*changed) != rolled(q, k, v)).any(-1)
    assert moved[0, 1, :2].any(), "the first tokens see the last one"
    straight = (shifted(*changed, 4) != shifted(q, k, v, 4)).any(-1)
    assert not straight[0, :-1].any()


def test_the_shifted_half_has_a_group_more_whose_ends_are_halves() -> None:
    assert group_ends(16, 4, 4) == [4, 8, 12, 16]
    assert group_ends(16, 4, 2) == [2, 6, 10, 14, 16]
    assert group_ends(16, 5, 2) == [2, 7, 12, 16]
    assert group_ends(1, 4, 2) == [1]
    layout = GroupLayout.of(torch.ones(1, 16, dtype=torch.long), 4)
    assert [b.diff().tolist() for b in layout.bounds] == [[4, 4, 4, 4], [2, 4, 4, 4, 2]]


def test_one_group_is_full_attention_in_the_first_half() -> None:
    q, k, v = qkv(2, 4, 4, 10)
    full = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    made = shifted(q, k, v, 10)
    assert torch.allclose(made[:, :, :2], full[:, :, :2], atol=1e-12)
    assert not torch.allclose(made[:, :, 2:], full[:, :, 2:])


def test_groups_are_counted_by_the_longest_sequence_of_a_batch() -> None:
    assert [group_size(n, 4) for n in (8192, 10, 3, 1)] == [2048, 3, 1, 1]
    rows = torch.tensor([[1] * 8 + [2] * 12])  # 20 tokens in a row, but the longest sequence has 12
    assert GroupLayout.of(rows, 4).bounds[0].tolist() == [0, 3, 6, 8, 11, 14, 17, 20]
    assert GroupLayout.of(torch.zeros(2, 5, dtype=torch.long), 4).tokens.tolist() == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_the_precisions_of_models(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in qkv(1, 4, 2, 32))
    exact = shifted(*(x.double() for x in (q, k, v)), 8)
    made = shifted(q, k, v, 8)
    assert made.dtype == dtype
    assert torch.allclose(made.double(), exact, atol=1e-5 if dtype == torch.float32 else 3e-2)


def test_the_kernel_for_different_lengths_is_given_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch has it on CUDA alone; what it is called with is held to a loop over the sequences that it names."""

    def loop(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float | None) -> Tensor:
        assert bounds.dtype == torch.int32
        assert int(bounds.diff().max()) == longest
        made = []
        for start, stop in itertools.pairwise(bounds.tolist()):
            part = (x[start:stop].transpose(0, 1) for x in (q, k, v))
            made.append(F.scaled_dot_product_attention(*part, is_causal=True, scale=scale, enable_gqa=True))
        return torch.cat(made, 1).transpose(0, 1)

    rows = ROWS["packed and padded"]
    q, k, v = qkv(2, 4, 2, 11)
    layout = GroupLayout.of(torch.tensor(rows), 4, 4)
    plain = shifted_ragged(q, k, v, layout)
    monkeypatch.setattr(shifted_attention, "_varlen", lambda: loop)
    monkeypatch.setattr(shifted_attention, "_on_flash", lambda query, value, dropout: True)
    assert torch.allclose(shifted_ragged(q, k, v, layout), plain, atol=1e-12)


def test_a_sequence_does_not_go_over_the_end_of_its_row() -> None:
    """Whatever the numbers are: those of a plain mask are equal in all rows."""
    q, k, v = qkv(2, 4, 2, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    numbered = mask * torch.tensor([[1], [2]])
    made, expected = (shifted_ragged(q, k, v, GroupLayout.of(m, 4), scale=0.3) for m in (mask, numbered))
    assert torch.equal(made, expected)
    alone = shifted(q[:1], k[:1], v[:1], 2, scale=0.3)
    assert torch.allclose(made[:1], alone, atol=1e-12)


@pytest.mark.parametrize(("width", "other", "dropout"), [(12, 12, 0.0), (64, 32, 0.0), (512, 512, 0.0), (64, 64, 0.1)])
def test_what_the_varlen_kernel_does_not_take_goes_another_way(width: int, other: int, dropout: float) -> None:
    class Placed:  # on a GPU, as far as the question goes
        is_cuda, dtype = True, torch.bfloat16

        def __init__(self, width: int) -> None:
            self.shape = (1, 2, 4, width)

    assert not shifted_attention._on_flash(Placed(width), Placed(other), dropout)  # type: ignore[arg-type]
