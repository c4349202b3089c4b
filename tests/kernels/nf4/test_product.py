"""The product with a quantised weight equals the product with the dequantised one, which is never materialised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lorary.analysis.memory.live_bytes import LiveBytes, kept_for_backward
from lorary.kernels.nf4 import (
    QuantizedTensor,
    backend,
    custom_ops,
    dequantize,
    dequantize_rows,
    linear,
    quantize,
    tiles,
)

MiB = 2**20
# Mean and largest error that a product in each dtype may have, of one of numbers of size 1: one rounding of the result.
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SHAPES = {"blocks in rows": (70, 128), "blocks across rows": (70, 96), "odd": (33, 67), "one row": (1, 64)}


@pytest.fixture(params=["compiled", "table"])
def via(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "table":
        monkeypatch.setenv("LORARY_NATIVE", "0")
    assert backend().startswith(request.param)
    return request.param


def dense(x: Tensor, quantized: QuantizedTensor, bias: Tensor | None) -> Tensor:
    """What `times` has to give, in 64 bits from the weight in x's dtype."""
    return F.linear(x.double(), dequantize(quantized, x.dtype).double(), None if bias is None else bias.double())


def close(ours: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(ours.double(), exact, rtol=CLOSE[ours.dtype], atol=4 * CLOSE[ours.dtype])


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_product_and_its_gradients(via: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    for tokens, bias, block, double in [
        (1, True, 64, True),
        (3, False, 32, True),
        (6, True, 128, False),
        (30, True, 64, True),
    ]:
        quantized = quantize(torch.randn(shape) * 0.1, block, double)
        x = torch.randn(2, tokens, shape[1]).to(dtype).requires_grad_()
        b = torch.randn(shape[0]).to(dtype).requires_grad_() if bias else None
        y, exact = linear(x, quantized, b), dense(x, quantized, b)
        assert (y.shape, y.dtype) == ((2, tokens, shape[0]), dtype)
        close(y, exact)
        wanted = [x, b] if b is not None else [x]
        g = torch.randn_like(y)
        ours = torch.autograd.grad(y, wanted, g)
        for mine, true in zip(ours, torch.autograd.grad(exact, wanted, g.double()), strict=True):
            assert mine.dtype == dtype
            torch.testing.assert_close(mine, true, rtol=4 * CLOSE[dtype], atol=10 * CLOSE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_tiles_are_one(via: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized, bias = quantize(torch.randn(300, 192)), torch.randn(300).to(dtype)
    x = torch.randn(40, 192).to(dtype).requires_grad_()
    results = []
    for tile in (2**21, 64 * 192, 1):
        monkeypatch.setattr(tiles, "TILE", tile)
        y = linear(x, quantized, bias)
        results.append((y, *torch.autograd.grad(y, x, torch.ones_like(y))))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=CLOSE[dtype], atol=1e-4)


def test_a_gradient_over_rows_is_the_one_over_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is taken on a GPU, whose tiles are rows of which second-level blocks begin."""
    monkeypatch.setattr(tiles, "TILE_GPU", 1)
    gpu = torch.device("cuda")
    for shape, pieces in (((256, 1024), 16), ((256, 128), 2), ((70, 96), 1)):
        for double in (True, False):
            quantized, gy = quantize(torch.randn(shape), double=double), torch.randn(40, shape[0])
            monkeypatch.setattr(tiles, "_row_spans", lambda p, d, of=tiles._row_spans: of(p, gpu))
            assert len(tiles._row_spans(quantized, gpu)) == pieces
            torch.testing.assert_close(tiles._by_rows(gy, quantized), gy @ dequantize(quantized), rtol=1e-5, atol=1e-4)
            monkeypatch.undo()
            monkeypatch.setattr(tiles, "TILE_GPU", 1)


@pytest.mark.parametrize("double", [True, False])
def test_rows_of_a_packed_matrix_are_a_packed_matrix(double: bool) -> None:
    quantized = quantize(torch.randn(600, 128), double=double)
    for top, bottom in ((0, 600), (128, 256), (3, 5), (599, 600)):
        rows = tiles.row_slice(quantized, top, bottom)
        assert torch.equal(dequantize(rows), dequantize(quantized)[top:bottom])
        assert rows.codes.untyped_storage()._cdata == quantized.codes.untyped_storage()._cdata
    with pytest.raises(ValueError, match="row 1 of 100 numbers does not begin a block of 64"):
        tiles.row_slice(quantize(torch.randn(4, 100)), 1, 2)


# --- what is kept and made --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_weight_is_never_there(via: str, dtype: torch.dtype, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE", 2**16)  # 0.25 MiB in 32 bits
    quantized = quantize(torch.randn(1024, 1024))  # 4 MiB
    x = torch.randn(tokens, 1024).to(dtype).requires_grad_()
    beyond = [x, *(part for part in quantized[:4] if part is not None)]
    assert kept_for_backward(lambda: linear(x, quantized), beyond=beyond) == 0
    with LiveBytes() as live:
        linear(x, quantized).sum().backward()
    assert live.peak < (0.75 if via == "compiled" else 1.75) * MiB, live.peak / MiB  # looking up makes more of a tile
    with LiveBytes() as live:
        F.linear(x, dequantize(quantized, dtype)).sum().backward()
    assert live.peak > 2 * MiB


def test_the_input_is_not_kept_either() -> None:
    quantized, x = quantize(torch.randn(64, 64)), torch.randn(5, 64).requires_grad_()
    assert kept_for_backward(lambda: linear(x * 2, quantized), beyond=[p for p in quantized[:4] if p is not None]) == 0


def test_a_gradient_of_a_gradient_is_refused() -> None:
    quantized, x = quantize(torch.randn(64, 64)), torch.randn(5, 64).requires_grad_()
    (gx,) = torch.autograd.grad(linear(x, quantized).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gx.sum().backward()


# --- in all surroundings ----------------------------------------------------------------------------------------------


def test_without_gradients(via: str) -> None:
    quantized, x = quantize(torch.randn(70, 128)), torch.randn(5, 128)
    expected = linear(x.requires_grad_(), quantized)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(linear(x, quantized), expected)
    assert torch.equal(linear(x.detach(), quantized), expected)
    again = linear(torch.randn(40, 128), quantized)  # outside, after a tile was made in inference mode
    assert not again.is_inference()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_chooses_the_dtype_as_for_a_linear_layer(dtype: torch.dtype) -> None:
    quantized, bias = quantize(torch.randn(70, 128)), torch.randn(70)
    W = dequantize(quantized)
    for given in (torch.float32, dtype, torch.float64):
        x = torch.randn(40, 128, dtype=given, requires_grad=True)
        with torch.autocast("cpu", dtype):
            y, expected = linear(x, quantized, bias), F.linear(x, W.to(given), bias.to(given))
        assert y.dtype == expected.dtype
        torch.testing.assert_close(y, expected, rtol=1e-2, atol=0.1)
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.dtype == given


def test_under_checkpointing(via: str) -> None:
    quantized, x = quantize(torch.randn(128, 128) * 0.1), torch.randn(40, 128).requires_grad_()
    run = lambda x: linear(linear(x, quantized).relu(), quantized)  # noqa: E731
    (plain,) = torch.autograd.grad(run(x).sum(), x)
    (again,) = torch.autograd.grad(checkpoint(run, x, use_reentrant=False).sum(), x)
    assert torch.equal(again, plain)
    checkpoint(run, x, use_reentrant=True).sum().backward()
    assert torch.equal(x.grad, plain)  # type: ignore[arg-type]


def test_inputs_of_all_strides_and_none(via: str) -> None:
    quantized = quantize(torch.randn(70, 128))
    for x in (torch.randn(128, 40).T, torch.randn(128, 3).T, torch.randn(40, 256)[:, ::2], torch.randn(128)):
        torch.testing.assert_close(linear(x, quantized), F.linear(x, dequantize(quantized)), rtol=1e-5, atol=1e-4)
    empty = torch.randn(2, 0, 128, requires_grad=True)
    y = linear(empty, quantized)
    y.sum().backward()
    assert y.shape == (2, 0, 70)
    assert empty.grad is not None
    assert empty.grad.shape == empty.shape


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0, 0)], ids=str)
def test_weights_without_numbers(via: str, shape: tuple[int, int]) -> None:
    x, b = torch.randn(2, 5, shape[1], requires_grad=True), torch.randn(shape[0], requires_grad=True)
    y = linear(x, quantize(torch.randn(shape)), b)
    y.sum().backward()
    assert torch.equal(y, F.linear(x, torch.zeros(shape), b))
    assert x.grad is not None
    assert b.grad is not None
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert torch.equal(b.grad, torch.full_like(b, 10.0))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x is \[5, 3\] and the weight \[64, 64\]; the last dimensions have to agree"):
        linear(torch.randn(5, 3), quantize(torch.randn(64, 64)))
    with pytest.raises(ValueError, match=r"the weight \[64\]"):
        linear(torch.randn(5, 64), quantize(torch.randn(64)))
    quantized = quantize(torch.randn(40, 64))
    with pytest.raises(ValueError, match=r"x is \[\] and the weight \[40, 64\]"):
        linear(torch.tensor(1.0), quantized)
    for b in (torch.randn(41), torch.randn(1), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"the bias is \[.*\] and the weight \[40, 64\]; a bias is \[out\]"):
            linear(torch.randn(30, 64), quantized, b)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_inputs_that_are_no_numbers_of_16_bits_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"x is of {dtype}; it has to be of floating numbers of 16 bits or more"):
        linear(torch.ones(2, 64, dtype=dtype), quantize(torch.randn(40, 64)))


# --- compiled by torch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [True, False])
def test_compiled_in_one_graph_and_once(double: bool) -> None:
    quantized, bias = quantize(torch.randn(70, 128) * 0.1, double=double), torch.randn(70).requires_grad_()

    def run(x: Tensor, quantized: QuantizedTensor, bias: Tensor) -> Tensor:
        rows = dequantize_rows(quantized, torch.arange(70).view(2, 35), x.dtype)
        return linear(x * 2, quantized, bias).relu() @ (dequantize(quantized, x.dtype) + rows.flatten(0, 1))

    x = torch.randn(20, 128).requires_grad_()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for stance in ("default", "fail_on_recompile"):
        with torch.compiler.set_stance(stance):
            ours = torch.autograd.grad(compiled(x, quantized, bias).sum(), (x, bias))
        for a, b in zip(ours, torch.autograd.grad(run(x, quantized, bias).sum(), (x, bias)), strict=True):
            torch.testing.assert_close(a, b)


def test_the_operators_are_what_torch_asks_of_operators() -> None:
    quantized, x = quantize(torch.randn(70, 128)), torch.randn(20, 128)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(custom_ops.linear, (x.requires_grad_(), *quantized, None), test_utils=checks)
    torch.library.opcheck(custom_ops.linear_backward, (torch.randn(20, 70), *quantized), test_utils=checks)
    torch.library.opcheck(custom_ops.dequantize, (*quantized, torch.bfloat16), test_utils=checks)
    torch.library.opcheck(
        custom_ops.dequantize_rows, (*quantized, torch.tensor([[1, 69]]), torch.bfloat16), test_utils=checks
    )
