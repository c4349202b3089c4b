"""The products of several segments of rows: each is that of `add_low_rank` by itself, in forward and in backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorary.kernels.low_rank import add_low_rank_reference
from lorary.kernels.segments import Segment, add_product, add_segments, add_segments_reference

BOTH = pytest.mark.parametrize("add", [add_segments, add_segments_reference])
RANKS = {"equal": (3, 3, 3), "several": (1, 4, 2), "one is empty": (2, 0, 3)}


def _case(ranks: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, list[Segment]]:
    """(x [6, 5, 7], W [4, 7], segments of 2, 1 and 3 rows)."""
    generator = torch.Generator().manual_seed(3)

    def normal(*size: int, leaf: bool = True) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(leaf)

    segments = [Segment(n, normal(r, 7), normal(4, r), 0.5 + n) for n, r in zip((2, 1, 3), ranks, strict=True)]
    return normal(6, 5, 7), normal(4, 7, leaf=False), segments


def _apart(x: Tensor, W: Tensor, segments: list[Segment]) -> Tensor:
    parts = zip(x.split([one.rows for one in segments]), segments, strict=True)
    return torch.cat([add_low_rank_reference(F.linear(rows, W), rows, one.A, one.B, one.s) for rows, one in parts])


def _gradients(y: Tensor, x: Tensor, segments: list[Segment]) -> list[Tensor]:
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    leaves = [x, *(t for one in segments for t in (one.A, one.B))]
    return list(torch.autograd.grad((y.square() * weights).sum(), leaves))


@BOTH
@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
def test_each_segment_is_the_product_by_itself(add: Any, ranks: tuple[int, ...]) -> None:
    x, W, segments = _case(ranks)
    y, expected = add(F.linear(x, W), x, segments), _apart(x, W, segments)
    torch.testing.assert_close(y, expected)
    for found, wanted in zip(_gradients(y, x, segments), _gradients(expected, x, segments), strict=True):
        torch.testing.assert_close(found, wanted)


@BOTH
def test_rows_of_a_flattened_input_are_counted_in_it(add: Any) -> None:
    x, W, segments = _case(RANKS["equal"])
    flat = [Segment(one.rows * 5, one.A, one.B, one.s) for one in segments]
    y = add(F.linear(x.view(30, 7), W), x.view(30, 7), flat)
    torch.testing.assert_close(y.view(6, 5, 4), _apart(x, W, segments))


def test_rows_of_another_segment_would_be_seen() -> None:
    x, W, segments = _case(RANKS["equal"])
    y = add_segments(F.linear(x, W), x, [segments[1], segments[0], segments[2]])
    assert not torch.allclose(y, _apart(x, W, segments))


def test_a_frozen_factor_gets_no_gradient_and_the_input_is_not_kept_for_it() -> None:
    x, W, segments = _case(RANKS["equal"])
    for one in segments:
        one.A.requires_grad_(False)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = add_segments(F.linear(x.detach(), W), x.detach(), segments)
    y.sum().backward()
    assert all(one.A.grad is None and one.B.grad is not None for one in segments)
    assert all(t.shape[-1] != 7 or (t.dim() == 2 and t.shape[0] <= 3) for t in saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_are_cast_to_the_precision_of_the_output(dtype: torch.dtype) -> None:
    x, W, segments = _case(RANKS["several"], torch.float32)
    y = add_segments(F.linear(x.to(dtype), W.to(dtype)), x.to(dtype), segments)
    assert y.dtype is dtype
    y.float().sum().backward()
    assert all(one.A.grad is not None and one.A.grad.dtype is torch.float32 for one in segments)
    torch.testing.assert_close(
        y.float(), _apart(x, W, segments), rtol=0.05, atol=0.3 if dtype is torch.bfloat16 else 1e-5
    )


def test_without_gradients_nothing_is_recorded() -> None:
    x, W, segments = _case(RANKS["several"])
    with torch.no_grad():
        y = add_segments(F.linear(x, W), x, segments)
    assert not y.requires_grad
    torch.testing.assert_close(y, _apart(x, W, segments).detach())


def test_a_transform_takes_plain_operations() -> None:
    x, W, segments = _case(RANKS["several"])

    def total(x: Tensor) -> Tensor:
        return add_segments(F.linear(x, W), x, segments).square().sum()

    found = torch.func.grad(total)(x.detach())
    (expected,) = torch.autograd.grad(_apart(x, W, segments).square().sum(), x)
    torch.testing.assert_close(found, expected)


def test_one_product_is_added_in_place() -> None:
    x, W, (one, *_) = _case(RANKS["several"])
    rows = x[:2].detach().view(-1, 7)
    y = F.linear(rows, W)
    expected = add_low_rank_reference(y, rows, one.A.detach(), one.B.detach(), 2.0)
    z = add_product(y, rows, one.A.detach(), one.B.detach(), 2.0)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(z, rows @ one.A.detach().T)
