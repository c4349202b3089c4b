"""A weight scaled by a low-rank matrix: the product against its plain reference, and what is kept and taken for it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorary.analysis.memory.live_bytes import LiveBytes, kept_for_backward
from lorary.kernels.elementwise import (
    add_scaled_linear,
    add_scaled_linear_reference,
    recomputed,
    scaled_linear,
    scaled_linear_reference,
)


def given(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """x [*shape, 6], W [5, 6], Ad [5, 2], Au [2, 6], b [5]; all but W want a gradient."""
    x, W, Ad, Au, b = (torch.randn(*s).to(dtype) for s in ((*shape, 6), (5, 6), (5, 2), (2, 6), (5,)))
    return x.requires_grad_(), W, Ad.requires_grad_(), Au.requires_grad_(), b.requires_grad_()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(7,), (2, 3), (1,), (2,), (1, 1), (0,), ()], ids=str)
def test_it_is_its_reference(shape: tuple[int, ...], transposed: bool) -> None:
    x, W, Ad, Au, b = given(shape)
    W = W.T.contiguous().T if transposed else W
    results = []
    for function in (scaled_linear, scaled_linear_reference):
        y = function(x, W, Ad, Au, b)
        grads = torch.autograd.grad((y * torch.arange(5.0)).sum() + y.square().sum(), (x, Ad, Au, b))
        results.append((y, *grads))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (2, 3), (1,), ()], ids=str)
def test_the_term_alone_is_its_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, W, Ad, Au, _ = given(shape, dtype)
    Ad, Au = Ad.detach().double().requires_grad_(), Au.detach().double().requires_grad_()  # masters
    results = []
    for function in (add_scaled_linear, add_scaled_linear_reference):
        y = F.linear(x, W)
        z = function(y, x, W, Ad, Au)
        assert z.dtype == dtype
        results.append((z, *torch.autograd.grad(z.double().square().sum(), (x, Ad, Au))))
    close = {"rtol": 3e-2, "atol": 0.3} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(*results, **close)


def test_gradients_are_right() -> None:
    x, W, Ad, Au, b = given((3,))
    assert torch.autograd.gradcheck(lambda *t: scaled_linear(t[0], W, *t[1:]), (x, Ad, Au, b))
    assert torch.autograd.gradcheck(lambda x, d, u: add_scaled_linear(F.linear(x, W), x, W, d, u), (x, Ad, Au))


@pytest.mark.parametrize("shape", [(7,), (1,)], ids=str)
def test_nothing_moves_where_ad_is_zero(shape: tuple[int, ...]) -> None:
    x, W, Ad, Au, b = (t.detach().float() for t in given(shape))
    assert torch.equal(scaled_linear(x, W, torch.zeros_like(Ad), Au, b), F.linear(x, W, b))
    assert torch.equal(scaled_linear(x, W, torch.zeros_like(Ad), Au), F.linear(x, W))


def test_only_what_is_wanted_has_a_gradient_and_is_kept() -> None:
    x, W, Ad, Au, b = given((7,))
    scaled_linear(x, W, Ad.detach(), Au.detach(), b.detach()).sum().backward()
    assert x.grad is not None
    other = x.detach().clone()
    kept = kept_for_backward(lambda: scaled_linear(other, W, Ad, Au, b), beyond=[W, Ad, Au, b])
    assert kept == other.nbytes
    kept = kept_for_backward(lambda: scaled_linear(x, W, Ad.detach(), Au.detach()), beyond=[W, Ad, Au])
    assert kept == 0


def test_a_step_takes_one_matrix_at_a_time() -> None:
    x, W = torch.randn(16, 512, requires_grad=True), torch.randn(512, 512)
    Ad, Au = torch.randn(512, 4, requires_grad=True), torch.randn(4, 512, requires_grad=True)
    with LiveBytes() as live:
        y = scaled_linear(x, W, Ad, Au)
        forward = live.peak
        live.restart_peak()
        y.sum().backward()
    assert W.nbytes <= forward < 1.1 * W.nbytes
    assert live.peak < 1.3 * W.nbytes
    with LiveBytes() as live, torch.no_grad():
        scaled_linear(x[:1], W, Ad, Au)  # one token at a time: W is read, and no matrix is made
    assert live.peak < 0.05 * W.nbytes


def test_under_autocast_the_dtypes_are_those_of_the_output() -> None:
    x, W, Ad, Au, _ = (t.detach().float() for t in given((7,)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = F.linear(x, W)
        z = add_scaled_linear(y, x, W, Ad, Au)
    assert y.dtype == z.dtype == torch.bfloat16
    torch.testing.assert_close(z.float(), scaled_linear_reference(x, W, Ad, Au), rtol=3e-2, atol=0.3)


def test_what_is_recomputed_keeps_its_arguments_alone() -> None:
    a, b = torch.randn(4, 2, requires_grad=True), torch.randn(2, 300, requires_grad=True)

    def make(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b).exp().sum(1)

    grads = [torch.autograd.grad(run(a, b).sum(), (a, b)) for run in (make, lambda a, b: recomputed(make, a, b))]
    torch.testing.assert_close(*grads)
    assert kept_for_backward(lambda: make(a, b), beyond=[a, b]) > 0
    assert kept_for_backward(lambda: recomputed(make, a, b), beyond=[a, b]) == 0
