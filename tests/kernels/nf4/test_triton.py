"""The Triton kernels give the table's numbers and products: interpreted on the CPU, in earnest where there is a GPU."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorary.kernels.nf4.reference import QuantizedTensor, dequantize_at, quantize, quantize_piece

pytest.importorskip("triton")

from lorary.kernels.nf4 import triton

from ..for_gpu import compiled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU tests/conftest.py asks for the interpreter
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DOUBLE = pytest.mark.parametrize("double", [True, False], ids=["double", "single"])


def quantized(*shape: int, block: int = 64, double: bool = True, size: float = 0.02) -> QuantizedTensor:
    return quantize(torch.randn(shape, device=DEVICE) * size, block, double, quantize_piece)


def table(p: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """The dense weight by definition, number by number."""
    return dequantize_at(p, torch.arange(math.prod(p.shape), device=DEVICE)).view(p.shape).to(dtype)


# --- dequantize -------------------------------------------------------------------------------------------------------


@DOUBLE
@pytest.mark.parametrize("block", [2, 32, 64, 256, 4096, 8192])
def test_dequantized_numbers_are_the_table_s_bit_for_bit(block: int, double: bool) -> None:
    """Odd counts, a last block that is short, fewer numbers than a block, more than 256 blocks; subnormal numbers."""
    for shape in ((5, 7), (3, 64), (1, 1), (40, 130), (2, 3, 5), (9,)):
        p = quantized(*shape, block=block, double=double)
        for dtype in (*DTYPES, torch.float64):
            assert torch.equal(triton.dequantize(p, dtype), table(p, dtype)), (shape, dtype)
    if block == 64:
        p = quantized(300, 129, block=2 * block, double=double, size=1e-39)
        assert torch.equal(triton.dequantize(p), table(p, torch.float32))


def test_numbers_are_rounded_to_the_nearest_and_ties_to_even() -> None:
    """Magnitudes at which bfloat16 and float16 round up, down and to even, down to subnormals; and up to infinity."""
    bits = [0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x3F801000, 0x3F803000, 0x33800001, 0x00018000]
    for dtype in DTYPES:
        largest = 0x7F7F8000 if dtype == torch.bfloat16 else 0x477FE000  # a tie with infinity; float16's largest
        absmax = torch.tensor([*bits, largest], dtype=torch.int32).view(torch.float32).to(DEVICE)
        p = QuantizedTensor(
            torch.full((72, 1), 0xF0, dtype=torch.uint8, device=DEVICE), absmax, None, None, (9, 16), 16
        )
        expected = torch.stack([absmax, -absmax], 1).repeat(1, 8).to(dtype)
        assert torch.equal(triton.dequantize(p, dtype), expected)


def test_numbers_go_where_they_are_asked_to() -> None:
    p = quantized(6, 10)
    out = torch.full((80,), 7.0, device=DEVICE)
    assert triton.dequantize(p, torch.float32, out[10:70]).data_ptr() == out[10:].data_ptr()
    assert torch.equal(out[10:70].view(6, 10), table(p, torch.float32))
    assert out[:10].eq(7).all()
    assert out[70:].eq(7).all()
    assert triton.dequantize(quantized(0, 10)).shape == (0, 10)


def test_a_place_that_is_none_is_refused() -> None:
    p = quantized(6, 10)
    message = "`out` has 59 numbers of torch.float32; it has to be contiguous and have 60 of torch.float32"
    with pytest.raises(ValueError, match=re.escape(message)):
        triton.dequantize(p, torch.float32, torch.empty(59, device=DEVICE))
    for out in (torch.empty(60, dtype=torch.float16, device=DEVICE), torch.empty(10, 6, device=DEVICE).t()):
        with pytest.raises(ValueError, match="it has to be contiguous"):
            triton.dequantize(p, torch.float32, out)


# --- gemv -------------------------------------------------------------------------------------------------------------

EXACT = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}  # of Σ |x w|: the rounding of W and of y


@DOUBLE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 16])
def test_products_are_those_with_the_dequantized_weight(tokens: int, dtype: torch.dtype, double: bool) -> None:
    """Rows that are no multiple of what a program takes, blocks of several pieces, rows of one piece and of many."""
    for shape, block in (((37, 192), 64), ((5, 64), 128), ((3, 1088), 64)):
        p = quantized(*shape, block=block, double=double)
        bias = torch.randn(shape[0], device=DEVICE).to(dtype) if shape[0] != 5 else None
        x = torch.randn(tokens, shape[1], device=DEVICE).to(dtype)
        y = triton.gemv(x, p, bias)
        W, b = table(p, torch.float64), bias.double() if bias is not None else torch.zeros(shape[0]).to(x.device)
        size = x.double().abs() @ W.abs().T + b.abs()
        assert y.dtype == dtype
        assert ((y.double() - (x.double() @ W.T + b)).abs() <= EXACT[dtype] * size).all(), shape


def test_a_product_with_one_row_is_summed_in_32_bits_and_rounded_once() -> None:
    """It is nearer to the true product than one with a weight in bfloat16 can be."""
    p = quantized(64, 1024)
    x = torch.randn(1, 1024, device=DEVICE).bfloat16()
    true = x.double() @ table(p, torch.float64).T
    ours = triton.gemv(x, p)
    assert torch.equal(ours.float(), true.to(torch.float32).to(torch.bfloat16).float())


def test_x_may_be_a_view_and_may_want_a_gradient() -> None:
    p = quantized(8, 64)
    x = torch.randn(64, 3, device=DEVICE, requires_grad=True)
    torch.testing.assert_close(triton.gemv(x.t(), p), (x.t() @ table(p, torch.float32).T).detach())


def test_which_weights_suit() -> None:
    assert triton.suits(quantized(3, 128))
    assert triton.suits(quantized(3, 64, block=256))
    assert not triton.suits(quantized(3, 96))
    assert not triton.suits(quantized(3, 64, block=32))
    assert not triton.suits(quantized(3, 2, 64))
    assert not triton.suits(quantized(0, 64))
    p = quantized(4, 64)
    assert not triton.suits(p._replace(codes=p.codes.repeat(1, 2)[:, :1]))


def test_what_does_not_suit_is_refused() -> None:
    p = quantized(4, 64)
    for x in (torch.ones(17, 64), torch.ones(0, 64), torch.ones(1, 32), torch.ones(1, 64, dtype=torch.float64)):
        with pytest.raises(ValueError, match="this takes 1 to 16 rows of pieces of 64 numbers in at most 32 bits"):
            triton.gemv(x.to(DEVICE), p)
    with pytest.raises(ValueError, match=r"x is \[1, 96\] of torch.float32, the weight \[4, 96\] in blocks of 64"):
        triton.gemv(torch.ones(1, 96, device=DEVICE), quantized(4, 96))


# --- for a GPU that is not here ---------------------------------------------------------------------------------------

TYPES = {"codes": "*u8", "absmax": "*u8", "out": "*bf16", "x": "*bf16", "y": "*bf16", "bias": "*bf16"}
TYPES |= dict.fromkeys(("nested", "offset", "code", "dynamic"), "*fp32")
TYPES |= dict.fromkeys(("n", "pieces", "height", "across", "share", "tokens"), "i32")
CONSTANTS = {"NESTED": 256, "HALF": 32, "DOUBLE": True, "BIAS": True, "INTERPRETED": False, "TOKENS": 16}
KERNELS = {
    "_dequantize": CONSTANTS | {"PIECES": 32, "enable_fp_fusion": False},
    "_gemv_one": CONSTANTS | {"ROWS": 4, "PIECES": 16, "enable_fp_fusion": True},
    "_gemv_few": CONSTANTS | {"ROWS": 32, "PIECES": 2, "enable_fp_fusion": True},
}


def test_the_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """To machine code, without a GPU: nothing is contracted in `dequantize`, subnormals stay, tensor cores are used."""
    found = compiled(tmp_path, "lorary.kernels.nf4.triton", TYPES, KERNELS)
    assert found["_dequantize"] == ["True", "0", "0", "0", "0"]
    assert found["_gemv_one"][0] == "True"
    assert found["_gemv_one"][2] == "0"
    assert found["_gemv_few"][0] == "True"
    assert int(found["_gemv_few"][3]) > 0
