"""NF4 is bitsandbytes' to the bit: values, codes, their order, magnitudes, and the numbers that they stand for."""

from __future__ import annotations

import math
from typing import Any

import bitsandbytes.functional as BF
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lorary.analysis.memory.live_bytes import LiveBytes
from lorary.kernels import nf4
from lorary.kernels.nf4 import CODE, DYNAMIC, QuantizedTensor, dequantize, dequantize_rows, quantize, reference, tiles

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCKS = [32, 64, 128, 256, 512, 1024, 2048, 4096]
VIA = pytest.mark.parametrize("via", ["compiled", "table"])


@pytest.fixture(autouse=True)
def _by(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that are marked with `VIA` run by the compiled code and by the table."""
    via = request.node.callspec.params.get("via") if hasattr(request.node, "callspec") else None
    if via == "table":
        monkeypatch.setenv("LORARY_NATIVE", "0")
    if via is not None:
        assert nf4.backend().startswith(via)


def sorts(shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Weights of one shape, with edge cases of quantisation."""
    random = torch.randn(shape)
    return {
        "random": random,
        "of all sizes": random * 10 ** (4 * torch.randn(shape)).clamp(-30, 30),
        "constant": torch.full(shape, 0.3),
        "zero": torch.zeros(shape),
        "negative": -random.abs(),
        "two values": random.sign(),
        "subnormal": random * 1e-39,
        "in the middle of codes": (CODE[:-1] + CODE[1:]).repeat(math.prod(shape))[: math.prod(shape)].view(shape) / 2,
    }


def theirs(W: Tensor, block: int, double: bool = False) -> tuple[QuantizedTensor, Any]:
    """bitsandbytes' quantisation on the CPU, in our layout; and its own state."""
    codes, state = BF.quantize_4bit(W, blocksize=block, compress_statistics=double, quant_type="nf4")
    nested = (state.state2.absmax, state.offset) if double else (None, None)
    return QuantizedTensor(codes, state.absmax, *nested, tuple(W.shape), block), state


# --- the values -------------------------------------------------------------------------------------------------------


def test_the_values_are_the_published_ones_to_the_bit() -> None:
    published = """
        bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000
        3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000
    """
    assert [f"{bits & 0xFFFFFFFF:08x}" for bits in CODE.view(torch.int32).tolist()] == published.split()


def test_the_values_are_quantiles_of_the_normal_distribution() -> None:
    def quantiles(count: int) -> Tensor:
        return math.sqrt(2) * torch.erfinv(2 * torch.linspace(0.9677083, 0.5, count, dtype=torch.float64)[:-1] - 1)

    made = torch.cat([quantiles(9), -quantiles(8), torch.zeros(1).double()]).sort().values
    torch.testing.assert_close(made / made.max(), CODE.double(), atol=2e-7, rtol=0)


def test_the_values_of_magnitudes_are_bitsandbytes() -> None:
    assert torch.equal(DYNAMIC, BF.create_dynamic_map())
    assert DYNAMIC[0].item() == pytest.approx(-0.99296874, abs=1e-8)
    assert DYNAMIC[-1] == 1.0


# --- quantising -------------------------------------------------------------------------------------------------------


@VIA
@pytest.mark.parametrize("shape", [(64, 64), (33, 63), (1,), (5,), (127,), (17, 100), (3, 5, 7), (8, 512)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_and_magnitudes_are_bitsandbytes_to_the_bit(via: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for name, W in sorts(shape).items():
        if dtype == torch.float16:
            W = W.clamp(-6e4, 6e4)
        for block in BLOCKS:
            ours, (them, _) = quantize(W.to(dtype), block, double=False), theirs(W.to(dtype), block)
            assert torch.equal(ours.codes, them.codes), (name, block)
            assert torch.equal(ours.absmax, them.absmax), (name, block)
            assert (ours.shape, ours.block) == (shape, block)


@VIA
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(64, 64), (33, 66), (130,), (17, 100), (8, 512), (3, 128)], ids=str)
def test_dequantized_numbers_are_bitsandbytes_to_the_bit(via: str, shape: tuple[int, ...], double: bool) -> None:
    """From its own state. Blocks are not longer than a row: where they are, its CPU kernel takes wrong magnitudes."""
    for name, W in sorts(shape).items():
        for block in (block for block in BLOCKS if block <= shape[-1] or block == 32):
            quantized, state = theirs(W, block, double)
            for state.dtype in DTYPES:
                ours, expected = (
                    dequantize(quantized, state.dtype),
                    BF.dequantize_4bit(quantized.codes, state).view(shape),
                )
                if state.dtype == torch.bfloat16 and BF.has_avx512bf16():
                    # that instruction makes zeros of what is subnormal in 32 bits
                    subnormal = dequantize(quantized).abs() < torch.finfo(torch.float32).tiny
                    ours = ours.masked_fill(subnormal & (expected == 0), 0)
                assert torch.equal(ours, expected), (name, block, state.dtype)


@VIA
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(63,), (5, 33), (2, 3, 25), (3, 64), (70, 96), (9, 1)], ids=str)
def test_dequantizing_is_code_times_magnitude(via: str, shape: tuple[int, ...], double: bool) -> None:
    """Of any block and shape: code times magnitude in 32 bits, rounded once; number by number."""
    for block in (2, 4, 16, 64, 256, 4096):
        quantized = quantize(torch.randn(shape), block, double)
        magnitude = quantized.absmax
        if double:
            places = torch.arange(len(magnitude)) // 256
            magnitude = DYNAMIC[quantized.absmax.int()] * quantized.nested_absmax[places] + quantized.nested_offset
        nibbles = torch.stack([quantized.codes[:, 0] >> 4, quantized.codes[:, 0] & 15], 1).view(-1)[: math.prod(shape)]
        numbers = CODE[nibbles.int()] * magnitude.repeat_interleave(block)[: math.prod(shape)]
        for dtype in [*DTYPES, torch.float64]:
            assert torch.equal(dequantize(quantized, dtype), numbers.view(shape).to(dtype)), (block, dtype)


def test_a_block_loses_at_most_half_of_the_gap_between_two_values() -> None:
    W = torch.randn(64, 256)
    quantized = quantize(W, double=False)
    gaps = torch.cat([CODE.diff(), CODE.diff()[-1:]])
    index = torch.stack([quantized.codes[:, 0] >> 4, quantized.codes[:, 0] & 15], 1).view(-1).int()
    most = torch.maximum(gaps[index], gaps[(index - 1).clamp(min=0)]) / 2
    error = (dequantize(quantized) - W).abs().view(-1) / quantized.absmax.repeat_interleave(64)
    assert (error <= most + 1e-6).all()


def test_quantizing_dequantized_numbers_changes_nothing() -> None:
    quantized = quantize(torch.randn(33, 100), double=False)
    again = quantize(dequantize(quantized), double=False)
    assert torch.equal(again.codes, quantized.codes)
    assert torch.equal(again.absmax, quantized.absmax)


@pytest.mark.parametrize("W", [torch.randn(96, 130).T, torch.randn(64, 3, 40).permute(1, 2, 0), torch.randn(())])
@pytest.mark.parametrize("tile", [64, 1000, 2**20])
@VIA
def test_strides_and_tiles_make_no_difference(via: str, W: Tensor, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = theirs(W.contiguous(), 64)
    monkeypatch.setattr(reference, "AT_ONCE", tile)
    ours = quantize(W, 64, double=False)
    assert torch.equal(ours.codes, whole.codes)
    assert torch.equal(ours.absmax, whole.absmax)


@VIA
def test_quantizing_takes_a_few_tiles_of_memory(via: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "AT_ONCE", 2**14)
    for W in (torch.randn(1024, 512).bfloat16(), torch.randn(512, 1024).bfloat16().T):
        with LiveBytes() as live:
            quantize(W)
        assert live.peak < 0.75 * W.numel() + 10 * 4 * 2**14, live.peak  # codes, magnitudes of 32 bits, tiles


@VIA
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0), (1, 30), (4, 32)])
def test_numbers_that_are_not_finite_are_refused(via: str, bad: float, place: tuple[int, int]) -> None:
    W = torch.randn(5, 33)
    W[place] = bad
    with pytest.raises(ValueError, match="a number of the weight is NaN, infinite or outside the range of float32"):
        quantize(W)


def test_invalid_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="block is 48; it has to be a power of two from 2"):
        quantize(torch.randn(4), block=48)
    with pytest.raises(ValueError, match=r"the weight is of torch.int64; only floating numbers can be quantised"):
        quantize(torch.arange(4))
    with pytest.raises(ValueError, match="outside the range of float32"):
        quantize(torch.tensor([1e300], dtype=torch.float64))
    large = torch.full((4, 64), 3e38)  # so that the sum of their magnitudes is infinite
    assert dequantize(quantize(large, double=False)).isfinite().all()
    with pytest.raises(
        ValueError, match="the mean magnitude is outside the range of float32: quantise it without double"
    ):
        quantize(large)


# --- double quantisation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sort", ["random", "of all sizes", "constant", "zero"])
def test_magnitudes_go_to_the_nearest_value(sort: str) -> None:
    W = sorts((300, 128))[sort].clamp(-10, 10)
    once, twice = quantize(W, double=False), quantize(W)
    assert twice.nested_absmax is not None
    assert twice.nested_offset is not None
    assert torch.equal(twice.codes, once.codes)
    assert torch.equal(twice.nested_offset, once.absmax.mean())
    v = torch.nn.functional.pad(once.absmax - twice.nested_offset, (0, -600 % 256)).view(-1, 256)
    assert torch.equal(twice.nested_absmax, v.abs().amax(1))
    v = (v / v.abs().amax(1, keepdim=True).clamp(min=1e-38)).view(-1)[:600]
    distance = (v.unsqueeze(1) - DYNAMIC).abs()
    chosen = distance.gather(1, twice.absmax.long().unsqueeze(1)).squeeze(1)
    assert (chosen <= distance.amin(1) + 1e-7).all()


def test_magnitudes_are_decoded_to_within_what_bitsandbytes_loses() -> None:
    W = torch.randn(512, 256) * 0.02
    ours, (them, _) = quantize(W), theirs(W, 64, double=True)
    every = torch.arange(2048)
    true = quantize(W, double=False).absmax
    a, b = reference.magnitudes(ours, every), reference.magnitudes(them, every)
    assert ((a - b).abs() / b).max() < 0.015
    assert ((a - true).abs() / true).max() < 0.015
    assert torch.equal(ours.nested_offset, them.nested_offset)  # type: ignore[arg-type]


@pytest.mark.parametrize(("double", "bits"), [(True, 4 + 8 / 64 + 32 / (64 * 256)), (False, 4.5)])
def test_bits_of_a_number_in_memory(double: bool, bits: float) -> None:
    quantized = quantize(torch.randn(1024, 1024), double=double)
    parts = [part for part in quantized[:4] if part is not None]
    taken = 8 * sum(part.untyped_storage().nbytes() for part in parts)
    assert taken == bits * 2**20 + (32 if double else 0)  # and one mean for the whole weight
    large = quantize(torch.empty(8192, 28672, device="meta"), double=double)
    taken = 8 * sum(part.untyped_storage().nbytes() for part in large[:4] if part is not None)
    assert round(taken / (8192 * 28672), 5) == (4.12695 if double else 4.5)


# --- into buffers, some rows, shapes alone ----------------------------------------------------------------------------


@VIA
def test_into_a_buffer(via: str) -> None:
    quantized, out = quantize(torch.randn(33, 100)), torch.full((33, 100), 7.0)
    assert dequantize(quantized, out=out) is out
    assert torch.equal(out, dequantize(quantized))
    for wrong in (out.T, out.bfloat16(), out[:, :50], torch.empty(100, 33)):
        with pytest.raises(ValueError, match="it has to be contiguous and"):
            dequantize(quantized, out=wrong)


@VIA
@pytest.mark.parametrize("shape", [(40, 64), (40, 33), (40, 1)], ids=str)
def test_some_rows(via: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "AT_ONCE", 100)
    quantized = quantize(torch.randn(shape))
    rows = torch.tensor([[0, 39, 7], [7, 8, 0]], dtype=torch.int32)
    for dtype in [*DTYPES, torch.float64]:
        assert torch.equal(dequantize_rows(quantized, rows, dtype), dequantize(quantized, dtype)[rows])
    assert dequantize_rows(quantized, rows[:, :0]).shape == (2, 0, shape[1])
    for bad in (-1, 40):
        with pytest.raises(IndexError, match=f"row {bad} or {bad} of a matrix of 40 rows"):
            dequantize_rows(quantized, torch.tensor([bad]))
    for dtype in (torch.float32, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=f"rows are of {dtype}; they have to be integers"):
            dequantize_rows(quantized, torch.zeros(1, dtype=dtype))


@VIA
@pytest.mark.parametrize("shape", [(0,), (0, 64), (64, 0), (5, 0, 3)], ids=str)
def test_nothing_at_all(via: str, shape: tuple[int, ...]) -> None:
    quantized = quantize(torch.randn(shape))
    assert quantized.codes.shape == (0, 1)
    assert dequantize(quantized).shape == shape


def test_shapes_without_numbers() -> None:
    real = quantize(torch.randn(33, 100))
    with FakeTensorMode():
        fake = quantize(torch.randn(33, 100))
        assert dequantize(fake, torch.float16).shape == (33, 100)
        assert dequantize_rows(fake, torch.zeros(4, dtype=torch.int64)).shape == (4, 100)
    meta = quantize(torch.randn(33, 100, device="meta"))
    for other in (fake, meta):
        assert [(p.shape, p.dtype) for p in other[:4]] == [(p.shape, p.dtype) for p in real[:4]]  # type: ignore[union-attr]
