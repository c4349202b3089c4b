"""Bytes are counted once each, when they come and when they go."""

from __future__ import annotations

import torch

from lorary.analysis.memory.live_bytes import LiveBytes, kept_for_backward


def test_a_product_keeps_both_factors_and_a_sum_keeps_none() -> None:
    x, y = torch.ones(8, requires_grad=True), torch.ones(8, requires_grad=True)
    assert kept_for_backward(lambda: x * y) == 64
    assert kept_for_backward(lambda: x * y, beyond=[x]) == 32
    assert kept_for_backward(lambda: x + y) == 0


def test_a_view_keeps_its_whole_memory_and_counts_once() -> None:
    x, wide = torch.ones(2, requires_grad=True), torch.ones(2, 100)
    assert kept_for_backward(lambda: (x * wide[:, 0]) + (x * wide[:, 1]), beyond=[x]) == 800


def test_memory_that_came_and_went_stays_in_the_peak() -> None:
    with LiveBytes() as live:
        a = torch.zeros(100)
        b = a + 1
        assert (live.now, live.peak) == (800, 800)
        del b
        assert (live.now, live.peak) == (400, 800)
        live.restart_peak()
        assert live.peak == 400
        a.add_(1).view(10, 10).t().neg_()
        assert live.peak == 400


def test_what_was_there_before_is_not_counted() -> None:
    x = torch.zeros(100)
    with LiveBytes() as live:
        y = x.view(10, 10)
        x.add_(1)
        assert live.peak == 0
        z = y * 2
    assert live.peak == 400
    del x, y, z


def test_sizes_without_memory_count_too() -> None:
    with LiveBytes() as live:
        kept = torch.empty(2**40, dtype=torch.uint8, device="meta")
    assert live.now == 2**40
    del kept
    assert live.now == 0
