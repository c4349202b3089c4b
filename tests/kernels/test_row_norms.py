"""Row norms from the factors, and the gain of an output: each against the plain formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lorary.analysis.memory.live_bytes import LiveBytes, kept_for_backward
from lorary.kernels import low_rank
from lorary.kernels import row_norms as module
from lorary.kernels.row_norms import row_norms, scale_rows, scale_rows_reference, square_norms

MiB = 2**20
ENTRIES = 2**22  # what `square_norms` and `row_norms` take of a 16-bit weight at a time


@pytest.fixture(autouse=True, params=["factored", "dense"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both formulas of the norm, and the fused node for outputs of any size."""
    monkeypatch.setattr(module, "_DENSE_UP_TO", 0 if request.param == "factored" else 2**16)
    monkeypatch.setattr(low_rank, "FUSED_FROM", 0)


def factors(
    out: int = 7, inp: int = 5, r: int = 2, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """W [out, inp], B [out, r], A [r, inp]."""
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(*s, generator=generator, dtype=dtype) for s in ((out, inp), (out, r), (r, inp)))  # type: ignore[return-value]


# --- norms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("s", [0.5, 1.0, 16.0])
def test_the_norms_are_those_of_the_dense_sum(s: float) -> None:
    W, B, A = factors()
    expected = (W + s * B @ A).norm(dim=1)
    torch.testing.assert_close(row_norms(W, B, A, s), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_they_are_taken_in_32_bits_of_the_weight_as_it_is_stored(dtype: torch.dtype) -> None:
    W, B, A = factors(64, 300, 4, torch.float32)
    W = W.to(dtype)
    exact = (W.double() + 2.0 * B.double() @ A.double()).norm(dim=1)
    found = row_norms(W, B, A, 2.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


def test_a_16_bit_weight_is_taken_in_pieces() -> None:
    W = torch.randn(3000, 2048).bfloat16()  # more than one piece, and not a whole number of them
    assert W.numel() > ENTRIES
    assert W.shape[0] % (ENTRIES // W.shape[1])
    torch.testing.assert_close(square_norms(W), W.float().square().sum(1))
    B, A = torch.randn(3000, 2), torch.randn(2, 2048)
    with LiveBytes() as live:
        found = row_norms(W, B, A, 1.0)
    torch.testing.assert_close(found, (W.float() + B @ A).norm(dim=1), rtol=1e-5, atol=0)
    assert live.peak < 2.2 * 4 * ENTRIES  # a piece in 32 bits, its square; never all of W


def test_no_tensor_of_the_weights_size_is_made_of_a_weight_in_32_bits() -> None:
    W, B, A = factors(1024, 1024, 16, torch.float32)
    with LiveBytes() as live:
        row_norms(W, B, A, 2.0)
    assert live.peak < 0.3 * MiB  # a few [out, r]; W is 4 MiB


def test_cancelling_rows_are_not_below_zero() -> None:
    """Where s B A takes a row of W away, what is left of the sum of squares is rounding, of either sign."""
    W = torch.randn(512, 64)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    norms = row_norms(W, -U * S, Vh, 1.0)
    assert norms.isfinite().all()
    assert (norms > 0).all()
    assert norms.max() < 0.05


def test_a_row_of_zeros_has_a_norm_that_can_be_divided_by() -> None:
    W, B, A = factors(dtype=torch.float32)
    W[2], B[2] = 0, 0
    norms = row_norms(W, B, A, 1.0)
    assert 0 < norms[2] < 1e-18
    assert torch.equal(norms / norms, torch.ones(7))


def test_gradients_of_the_norms() -> None:
    W, B, A = factors()
    B.requires_grad_()
    A.requires_grad_()
    assert torch.autograd.gradcheck(lambda B, A: row_norms(W, B, A, 0.7), (B, A))


def test_the_gradient_through_a_row_of_zeros_is_finite() -> None:
    W, B, A = factors(dtype=torch.float32)
    W[2] = 0
    with torch.no_grad():
        B[2] = 0
    B.requires_grad_()
    A.requires_grad_()
    row_norms(W, B, A, 0.7).sum().backward()
    assert B.grad is not None
    assert B.grad.isfinite().all()
    assert A.grad is not None
    assert A.grad.isfinite().all()


def test_autocast_does_not_reach_the_norms() -> None:
    W, B, A = factors(64, 300, 4, torch.float32)
    expected = row_norms(W, B, A, 2.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(row_norms(W, B, A, 2.0), expected)


# --- gains ------------------------------------------------------------------------------------------------------------

SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {  # of the output, and of the gain
    "a row": ((4,), (4,)),
    "rows": ((6, 4), (4,)),
    "a batch": ((2, 3, 4), (4,)),
    "nobody": ((0, 4), (4,)),
    "conv1d": ((2, 4, 5), (4, 1)),
    "conv2d": ((2, 4, 3, 5), (4, 1, 1)),
    "conv2d, one pixel": ((2, 4, 1, 1), (4, 1, 1)),
    "conv3d without a batch": ((4, 2, 3, 2), (4, 1, 1, 1)),
}
EACH = pytest.mark.parametrize(("shape", "vector"), SHAPES.values(), ids=SHAPES)
BIASES = pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])


def tensors(shape: tuple[int, ...], vector: tuple[int, ...], bias: bool) -> dict[str, Tensor]:
    torch.manual_seed(5)
    names = {"v": shape, "gain": vector} | ({"bias": vector} if bias else {})
    return {name: torch.randn(*size, dtype=torch.float64) for name, size in names.items()}


@EACH
@BIASES
def test_the_bias_is_no_part_of_what_is_scaled(shape: Any, vector: Any, bias: bool) -> None:
    t = tensors(shape, vector, bias)
    b = t.get("bias", torch.zeros(()))
    expected = t["gain"] * (t["v"] - b) + b
    torch.testing.assert_close(scale_rows_reference(**t), expected)
    torch.testing.assert_close(scale_rows(**{name: tensor.clone() for name, tensor in t.items()}), expected)


@EACH
@BIASES
def test_gradients_are_those_of_the_function(shape: Any, vector: Any, bias: bool) -> None:
    t = {name: tensor.requires_grad_() for name, tensor in tensors(shape, vector, bias).items()}
    # v times one: a tensor of our own, whose memory may be written
    assert torch.autograd.gradcheck(lambda v, *rest: scale_rows(v * 1.0, *rest), tuple(t.values()))


@BIASES
@pytest.mark.parametrize("wanted", [("v",), ("gain",), ("v", "gain")], ids="".join)
def test_gradients_that_nobody_wants_are_not_made(wanted: tuple[str, ...], bias: bool) -> None:
    def gradients(run: Any) -> list[Tensor | None]:
        t = tensors((6, 4), (4,), bias)
        for name in wanted:
            t[name].requires_grad_()
        run(t.pop("v") * 1.0, **t).square().sum().backward() if "v" not in wanted else None
        if "v" in wanted:
            v = t.pop("v")
            run(v * 1.0, **t).square().sum().backward()
            t["v"] = v
        return [t[name].grad for name in wanted]

    torch.testing.assert_close(gradients(scale_rows), gradients(scale_rows_reference))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@BIASES
def test_a_gain_in_32_bits_for_an_output_in_16(dtype: torch.dtype, bias: bool) -> None:
    """Near 1 a gain in 16 bits could not be told from 1."""
    v = torch.linspace(100, 200, 64).repeat(16, 1).to(dtype)
    gain = torch.full((64,), 1.003, requires_grad=True)
    b = (torch.randn(64) * 3).to(dtype) if bias else None
    out = scale_rows(v.clone(), gain, b)
    assert out.dtype == dtype
    offset = torch.zeros(()) if b is None else b.double()
    exact = 1.003 * (v.double() - offset) + offset
    step = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert ((out.double() - exact).abs() <= 2.5 * step * exact.abs()).all()
    out.sum().backward()
    assert gain.grad is not None
    assert gain.grad.dtype == torch.float32
    torch.testing.assert_close(gain.grad.double(), (v.double() - offset).sum(0), rtol=2 * step, atol=1.0)


@BIASES
def test_a_gain_of_zero_has_finite_gradients(bias: bool) -> None:
    t = tensors((6, 4), (4,), bias)
    t["gain"][1] = 0.0
    t = {name: tensor.requires_grad_() for name, tensor in t.items()}
    v = t["v"]
    y = scale_rows(v * 1.0, t["gain"], t.get("bias"))
    y.square().sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in t.values())  # type: ignore[union-attr]
    assert not v.grad[:, 1].any()  # type: ignore[index]


def test_a_second_derivative_is_refused() -> None:
    t = {name: tensor.requires_grad_() for name, tensor in tensors((6, 4), (4,), False).items()}
    (gradient,) = torch.autograd.grad(scale_rows(t["v"] * 1.0, t["gain"]).pow(2).sum(), t["gain"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# --- whose memory is used, and what is kept ---------------------------------------------------------------------------


def test_the_result_lies_in_the_memory_of_the_output_where_it_has_no_bias() -> None:
    t = tensors((6, 4), (4,), True)
    v = t["v"] * 1.0
    assert scale_rows(v, t["gain"]).data_ptr() == v.data_ptr()
    w = t["v"] * 1.0
    assert scale_rows(w, t["gain"], t["bias"]).data_ptr() != w.data_ptr()


@BIASES
@pytest.mark.parametrize("kind", ["leaf", "with gaps"])
def test_an_output_that_is_not_ours_stays_untouched(kind: str, bias: bool) -> None:
    t = tensors((6, 6), (6,), bias)
    v = t["v"].requires_grad_() if kind == "leaf" else t["v"].t()
    before = v.detach().clone()
    torch.testing.assert_close(
        scale_rows(v, t["gain"], t.get("bias")), scale_rows_reference(before, t["gain"], t.get("bias"))
    )
    assert torch.equal(v, before)


def test_a_layer_that_kept_its_output_fails_loudly() -> None:
    t = {name: tensor.requires_grad_() for name, tensor in tensors((6, 4), (4,), False).items()}
    out = scale_rows(torch.tanh(t["v"]), t["gain"])  # tanh keeps its output for backward
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@BIASES
def test_one_tensor_of_the_outputs_size_is_kept(bias: bool) -> None:
    v = torch.randn(1024, 1024).bfloat16().requires_grad_()
    vectors = [torch.rand(1024, requires_grad=True)] + ([torch.randn(1024).bfloat16()] if bias else [])
    kept = kept_for_backward(lambda: scale_rows(F.relu(v * 1) * 1, *vectors), beyond=vectors)
    relu = 2 * MiB  # relu keeps its own result, by which the negative control below differs
    assert kept == 2 * MiB + relu
    plain = kept_for_backward(lambda: scale_rows_reference(F.relu(v * 1) * 1, *vectors), beyond=vectors)
    assert plain >= 4 * MiB + relu  # as autograd records it: v in 32 bits


def test_inference_mode_and_its_tensors_work() -> None:
    t = tensors((6, 4), (4,), False)
    expected = scale_rows_reference(**t)
    with torch.inference_mode():
        v = t["v"] * 1.0
        assert torch.equal(scale_rows(v.clone(), t["gain"]), expected)
    with torch.no_grad():
        assert torch.equal(scale_rows(v, t["gain"]), expected)
    torch.testing.assert_close(v, t["v"])  # it could not be written there


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    t = {name: tensor.requires_grad_() for name, tensor in tensors((6, 4), (4,), True).items()}

    def gradient(run: Any) -> Tensor:
        run(t["v"], t["gain"], t["bias"]).square().sum().backward()
        found, t["gain"].grad = t["gain"].grad, None
        return found  # type: ignore[return-value]

    def forward(v: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        return scale_rows(v * 1.0, gain, bias)

    assert torch.equal(gradient(lambda *a: checkpoint(forward, *a, use_reentrant=reentrant)), gradient(forward))


def test_autocast_leaves_the_output_in_its_own_precision() -> None:
    v, gain = torch.randn(6, 4), torch.rand(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scale_rows(v.clone(), gain), v * gain)
        assert scale_rows(v.bfloat16(), gain).dtype == torch.bfloat16


def test_the_compiler_is_given_the_plain_operations() -> None:
    t = {name: tensor.requires_grad_() for name, tensor in tensors((6, 4), (4,), True).items()}
    torch.compiler.reset()
    compiled = torch.compile(lambda v, g, b: scale_rows(v * 1.0, g, b), fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(*t.values()).sum().backward()
        torch.testing.assert_close(compiled(*t.values()), scale_rows_reference(**t))


def test_the_number_of_entries_above_is_that_of_the_kernel() -> None:
    assert module._CHUNK == ENTRIES
