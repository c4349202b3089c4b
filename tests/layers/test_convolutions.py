"""Convolutions of every geometry: the adapter merged into the kernel is the adapter as it acts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorary
from tests.tiny import shaken


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["lora", "dora"])
@torch.no_grad()
def test_merged_equals_live(name: str, groups: int, padding_mode: str, dilation: int, stride: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, stride, padding=2, dilation=dilation, groups=groups, padding_mode=padding_mode)
    model = nn.Sequential(conv).double()
    x = torch.randn(2, 8, 11, 9, dtype=torch.float64)
    before = model(x)
    plan = lorary.plan(model, lorary.method(name, r=3), targets=["0"])
    shaken(lorary.attach(model, plan, dtype=torch.float64), 0.1)
    live = model(x)
    assert (live - before).abs().max() > 0.1
    merged = lorary.merge(model)(x)
    torch.testing.assert_close(merged, live, rtol=0, atol=1e-14 * float(live.abs().max()))


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["lora", "dora"])
@torch.no_grad()
def test_merged_equals_live_in_fp32(name: str, groups: int, padding_mode: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=groups, padding_mode=padding_mode)
    model, x = nn.Sequential(conv), torch.randn(2, 8, 11, 9)
    shaken(lorary.attach(model, lorary.plan(model, lorary.method(name, r=3), targets=["0"])), 0.1)
    live = model(x)
    error = (lorary.merge(model)(x) - live).norm() / live.norm()
    assert error <= 5e-7  # roundings of a sum of 18 to 72 products
