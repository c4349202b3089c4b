"""PiSSA: the start holds W's principal directions, the base the rest, and the update is what has changed since."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.adapters.adapter import Adapter
from lorary.layers.adapted import adapted_layers
from lorary.methods.pissa import SVDInit
from lorary.spec.site import Part, Site

from .layers import EACH_EVEN, attached, dense_gradients, exactly, gradients, matrix, same_function, shake, signature


def original_weight(layer: Any) -> Tensor:
    """W before anything was attached: the base with the start put back."""
    B, A = layer.start_factors()
    return matrix(layer) + layer.scale * B @ A


@EACH_EVEN
@pytest.mark.parametrize("alpha", [1.0, 6.0, 64.0])
@pytest.mark.parametrize("names", [("pissa",), ("pissa", "rslora")])
def test_at_the_start_nothing_moves_whatever_alpha_is(make: Any, x: Any, alpha: float, names: tuple[str, ...]) -> None:
    base = make().double()
    inputs = x()
    expected = base(inputs)
    exactly(attached(base, *names, r=2, alpha=alpha)(inputs), expected)


def test_nothing_moves_in_32_bits_but_for_rounding() -> None:
    model = nn.Sequential(nn.Linear(64, 48))
    x = torch.randn(9, 64)
    before = model(x)
    lorary.attach(model, lorary.plan(model, lorary.method("pissa", r=8), "0"))
    assert (model(x) - before).abs().max() < 1e-6


def test_of_a_base_in_16_bits_the_rest_alone_is_rounded() -> None:
    model = nn.Sequential(nn.Linear(64, 48).bfloat16())
    W = model[0].weight.detach().float().clone()
    lorary.attach(model, lorary.plan(model, lorary.method("pissa", r=8), "0"))
    layer = adapted_layers(model)["0"]
    start = layer.scale * layer.params["B"].detach() @ layer.params["A"].detach()
    assert layer.weight.dtype == torch.bfloat16
    torch.testing.assert_close(layer.weight.float(), (W - start).bfloat16().float(), rtol=0, atol=0)


@EACH_EVEN
@pytest.mark.parametrize("alpha", [2.0, 6.0])
def test_the_start_is_the_best_approximation_and_the_base_has_the_rest(make: Any, x: Any, alpha: float) -> None:
    base = make().double()
    W = base.weight.detach().clone()
    layer = attached(base, "pissa", r=2, alpha=alpha)
    W = W.T if layer.site.kind in ("transposed", "embedding") else W.flatten(1)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    B, A = (t.detach() for t in layer.factors())
    low = U[:, :2] * S[:2] @ Vh[:2]
    torch.testing.assert_close(layer.scale * B @ A, low, rtol=1e-5, atol=1e-6)  # decomposed in 32 bits
    exactly(matrix(layer), W - layer.scale * B @ A)
    rest = torch.linalg.svdvals(matrix(layer))
    torch.testing.assert_close(rest[: len(S) - 2], S[2:], rtol=1e-4, atol=1e-5)


def test_both_factors_have_the_roots_of_the_singular_values() -> None:
    layer = attached(nn.Linear(6, 5), "pissa", r=3, alpha=12.0)
    B, A = (t.detach() for t in layer.factors())
    S = torch.linalg.svdvals(original_weight(layer))[:3]
    for square in (B.T @ B, A @ A.T):
        torch.testing.assert_close(square, torch.diag(S / layer.scale), rtol=1e-5, atol=1e-6)


def test_a_fused_weights_parts_are_decomposed_one_by_one() -> None:
    site = Site("x", "linear", 12, 6, False, (Part("q", 0, 2, 6, 2), Part("v", 4, 2, 6, 2)))
    W = torch.randn(12, 6)
    p = {"A": torch.zeros(4, 6), "B": torch.zeros(8, 2)}
    SVDInit()(p, W, site, 1.0, torch.Generator())
    rows = [[0, 1, 6, 7], [4, 5, 10, 11]]
    for i, part in enumerate(rows):
        U, S, Vh = torch.linalg.svd(W[part], full_matrices=False)
        torch.testing.assert_close(p["B"][4 * i : 4 * i + 4] @ p["A"][2 * i : 2 * i + 2], U[:, :2] * S[:2] @ Vh[:2])


# --- gradients --------------------------------------------------------------------------------------------------------


@EACH_EVEN
def test_both_factors_learn_from_the_first_step_on(make: Any, x: Any) -> None:
    assert signature(attached(make(), "pissa", r=2), x()) == {"A": "some", "B": "some"}


@EACH_EVEN
def test_gradients(make: Any, x: Any) -> None:
    layer, inputs = shake(attached(make(), "pissa", r=2)), x()
    found = dense_gradients(layer, inputs, lambda p: matrix(layer) + layer.scale * p["B"] @ p["A"])
    exactly(gradients(layer, inputs), found)


# --- on the unmodified base -------------------------------------------------------------------------------------------


@EACH_EVEN
@pytest.mark.parametrize("names", [("pissa",), ("pissa", "rslora"), ("pissa", "lora-fa")])
def test_on_the_unmodified_base_it_is_lora_of_twice_the_rank(make: Any, x: Any, names: tuple[str, ...]) -> None:
    """s (B A - B0 A0) = s [B, -B0] [A; A0]; in terms of alpha: 2 alpha, or sqrt(2) alpha with the root."""
    base = make().double()
    plain = make().double()
    plain.load_state_dict(base.state_dict())
    model = nn.Sequential(base)
    lorary.attach(model, lorary.plan(model, lorary.method(*names, r=2, alpha=6.0), "0"), dtype=torch.float64)
    layer = shake(adapted_layers(model)["0"])
    form = Adapter.of(model).low_rank()["0"]
    assert form.A.shape[0] == 4
    assert form.gain is None
    assert form.shift is None
    start = layer.start_factors()
    assert start is not None
    B = torch.cat([layer.params["B"].detach(), -start[0]], 1)
    alpha = 12.0 if "rslora" not in names else 6.0 * 2**0.5
    s = alpha / (4**0.5 if "rslora" in names else 4)
    torch.testing.assert_close(form.B.double(), s * B, rtol=1e-6, atol=1e-6)
    expected = layer.kind.matrix(plain).detach() + form.B.double() @ form.A.double()
    inputs = x()
    y = layer.kind.run(plain, inputs, expected, layer.bias)
    torch.testing.assert_close(layer(inputs), y, rtol=1e-5, atol=1e-5)


@EACH_EVEN
def test_merged(make: Any, x: Any) -> None:
    layer = shake(attached(make(), "pissa", r=2))
    same_function(layer, x(), layer.merged()[0])


# --- the fast decomposition -------------------------------------------------------------------------------------------


def spectrum(out: int, inp: int, decay: float = 0.98) -> Tensor:
    """A weight whose singular values fall slowly, as those of trained layers do."""
    U, _ = torch.linalg.qr(torch.randn(out, min(out, inp)))
    V, _ = torch.linalg.qr(torch.randn(inp, min(out, inp)))
    return U * decay ** torch.arange(min(out, inp)) @ V.T


@pytest.mark.parametrize("shape", [(96, 160), (160, 96), (128, 128)])
def test_power_iterations_bring_it_closer(shape: tuple[int, int]) -> None:
    W, site, errors = spectrum(*shape), Site("x", "linear", *shape, False), []
    S = torch.linalg.svdvals(W)
    for niter in (1, 2, 4, 8):
        p = {"A": torch.zeros(16, shape[1]), "B": torch.zeros(shape[0], 16)}
        SVDInit(niter)(p, W, site, 2.0, torch.Generator().manual_seed(0))
        rest = torch.linalg.matrix_norm(W - 2.0 * p["B"] @ p["A"], 2)
        errors.append((rest / S[16] - 1).item())
    assert errors == sorted(errors, reverse=True) or max(errors[1:]) < 1e-4
    assert errors[2] < 0.01  # four: within a hundredth of the best
    assert errors[0] > 1e-6  # the check can tell them apart


@pytest.mark.parametrize("niter", [1, 16])
def test_whatever_its_error_nothing_moves(niter: int) -> None:
    base = nn.Linear(40, 30).double()
    x = torch.randn(5, 40).double()
    expected = base(x)
    exactly(attached(base, "pissa", r=4, niter=niter)(x), expected)


def test_the_fast_one_depends_on_the_seed_alone() -> None:
    def start(seed: int) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 30))
        torch.manual_seed(seed + 5)
        lorary.attach(model, lorary.plan(model, lorary.method("pissa", r=4, niter=1), "0"), seed=seed)
        return adapted_layers(model)["0"].params["A"].detach()

    assert torch.equal(start(0), start(0))
    assert not torch.equal(start(0), start(1))


def test_the_fast_one_is_faster() -> None:
    W, site = torch.randn(1024, 1024), Site("x", "linear", 1024, 1024, False)
    seconds = []
    for init in (SVDInit(None), SVDInit(4)):
        p = {"A": torch.zeros(16, 1024), "B": torch.zeros(1024, 16)}
        before = time.process_time()
        init(p, W, site, 1.0, torch.Generator().manual_seed(0))
        seconds.append(time.process_time() - before)
    assert seconds[1] * 2 < seconds[0]
