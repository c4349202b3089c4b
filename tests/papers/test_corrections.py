"""What is often said of a method and is not so, where no other test shows it. `docs/corrections.md` has the list."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorary.kernels.nf4 import dequantize, quantize


@pytest.fixture(scope="module")
def weight() -> Tensor:
    """A Gaussian weight. [512, 1024]"""
    return torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))


def relative_error(found: Tensor, W: Tensor) -> float:
    return ((found - W).square().mean() / W.square().mean()).sqrt().item()


def test_a_linear_code_loses_more_than_nf4(weight: Tensor) -> None:
    """round(W / s) with s = absmax / 7, in blocks of 64: 0.1075 beside 0.0919."""
    blocks = weight.view(-1, 64)
    s = blocks.abs().amax(1, keepdim=True) / 7
    linear = relative_error((blocks / s).round() * s, blocks)
    nf4 = relative_error(dequantize(quantize(weight, double=False)), weight)
    assert nf4 == pytest.approx(0.0919, abs=5e-4)
    assert linear == pytest.approx(0.1075, abs=5e-4)


def test_the_values_of_nf4_are_not_used_equally_often(weight: Tensor) -> None:
    """Sixteen equal shares would be 6.25 % each."""
    pairs = quantize(weight).codes.flatten()
    codes = torch.cat([pairs >> 4, pairs & 15]).long()
    shares = torch.bincount(codes, minlength=16) / codes.numel()
    assert shares.min().item() == pytest.approx(0.017, abs=2e-3)
    assert shares.max().item() == pytest.approx(0.092, abs=2e-3)
