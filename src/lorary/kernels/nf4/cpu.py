"""Compiled NF4 code for the CPU.

Without a compiler, or if the library disagrees with the table (`reference`), the table is used.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from lorary.kernels.native import THREADS, first_that_works, threads, wanted
from lorary.kernels.nf4.reference import (
    CODE,
    DYNAMIC,
    MIDDLES,
    QuantizedTensor,
    dequantize_region,
    matrix_shape,
    quantize,
    quantize_piece,
)

SOURCE, HEADER = Path(__file__).with_name("nf4.c"), Path(__file__).with_name("simd.h")
OPTIONS = ("-O3", "-std=c11", "-ffp-contract=off", "-fPIC", "-shared", "-pthread")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
WIDE = 4  # added to a 16-bit type: rounded to it, but stored in 32 bits


class _QuantizedStruct(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "absmax", "coded", "nested", "offset", "code", "dynamic")),
        ("block", ctypes.c_int64),
    ]


class Native:
    """The functions of a compiled library.

    Raises:
        OSError: if the file is not a library.
        AttributeError: if a function is missing.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        number, address, flag = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
        self._quantize, self._dequantize = library.lorary_nf4_quantize, library.lorary_nf4_dequantize
        self._linear = library.lorary_nf4_linear
        self._quantize.argtypes = [address, number, number, address, address, address, flag]
        self._quantize.restype = None
        self._dequantize.argtypes = [address, address, *[number] * 4, address, number, flag, flag]
        self._dequantize.restype = None
        self._linear.argtypes = [address, address, address, flag, number, number, flag, flag]
        self._linear.restype = ctypes.c_int
        library.lorary_nf4_isa.restype = ctypes.c_char_p
        self.isa: str = library.lorary_nf4_isa().decode()

    def quantize_piece(self, w: Tensor, block: int, codes: Tensor, absmax: Tensor) -> None:
        """As `reference.quantize_piece`; `codes` is contiguous or a single column."""
        w, codes = w.contiguous(), codes.view(-1)
        addresses = (MIDDLES.data_ptr(), codes.data_ptr(), absmax.data_ptr())
        self._quantize(w.data_ptr(), w.numel(), block, *addresses, threads(w.numel()))

    def dequantize(
        self,
        quantized: QuantizedTensor,
        rows: tuple[int, int],
        columns: tuple[int, int],
        out: Tensor,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Writes a rectangle of the weight.

        Args:
            quantized: a weight that `is_readable`, seen as a matrix [height, width].
            rows, columns: (start, stop).
            out: [rows, columns] of a dtype in `TYPES`, contiguous along its rows.
            dtype: a 16-bit type to round to when `out` is float32.
        """
        kind = TYPES[out.dtype] if dtype in (None, out.dtype) else TYPES[dtype] + WIDE
        start = rows[0] * matrix_shape(quantized.shape)[1] + columns[0]
        self._write(quantized, None, start, out, kind)

    def dequantize_rows(self, quantized: QuantizedTensor, rows: Tensor, out: Tensor) -> None:
        """Writes the rows with these indices (int64 [m], all valid) to `out` [m, width]."""
        self._write(quantized, rows.contiguous(), 0, out, TYPES[out.dtype])

    def _write(self, quantized: QuantizedTensor, rows: Tensor | None, start: int, out: Tensor, kind: int) -> None:
        weight, width = ctypes.byref(_addresses(quantized)), matrix_shape(quantized.shape)[1]
        listed, place = None if rows is None else rows.data_ptr(), (out.data_ptr(), out.stride(0))
        self._dequantize(weight, listed, start, *out.shape, width, *place, kind, threads(out.numel()))

    def linear(self, x: Tensor, quantized: QuantizedTensor, dtype: torch.dtype) -> Tensor:
        """float32 [tokens, height]: x·Wᵀ with W rounded to `dtype`; x float32 [tokens, width], contiguous."""
        height, width = quantized.shape
        y = x.new_empty((x.shape[0], height))
        weight, shares = ctypes.byref(_addresses(quantized)), threads(height * width)
        failed = self._linear(weight, x.data_ptr(), y.data_ptr(), x.shape[0], height, width, TYPES[dtype], shares)
        if failed:
            raise MemoryError(f"no memory for {x.numel()} numbers")
        return y


def _addresses(quantized: QuantizedTensor) -> _QuantizedStruct:
    codes, absmax, nested, offset = (None if part is None else part.data_ptr() for part in quantized[:4])
    scales = (absmax, None, None, None) if nested is None or offset is None else (None, absmax, nested, offset)
    return _QuantizedStruct(codes, *scales, CODE.data_ptr(), DYNAMIC.data_ptr(), quantized.block)


def is_readable(quantized: QuantizedTensor) -> bool:
    """Whether the compiled code can read these tensors: contiguous, on the CPU, of the sizes that the shape implies."""
    height, width = matrix_shape(quantized.shape)
    n = height * width
    blocks = -(-n // quantized.block)
    wanted = [(quantized.codes, torch.uint8, -(-n // 2))]
    if quantized.nested_absmax is None or quantized.nested_offset is None:
        wanted += [(quantized.absmax, torch.float32, blocks)]
    else:
        wanted += [(quantized.absmax, torch.uint8, blocks), (quantized.nested_absmax, torch.float32, -(-blocks // 256))]
        wanted += [(quantized.nested_offset, torch.float32, 1)]
    return quantized.block % 2 == 0 and all(
        t.device.type == "cpu" and t.dtype is dtype and t.numel() == numbers and t.is_contiguous()
        for t, dtype, numbers in wanted
    )


# --- compiling --------------------------------------------------------------------------------------------------------


def native() -> Native | None:
    """The compiled library, built if needed; None if it cannot be built or `LORARY_NATIVE=0`."""
    return _load_native() if wanted() else None


@lru_cache
def _load_native() -> Native | None:
    return first_that_works(Native, matches_reference, (SOURCE, HEADER, THREADS), OPTIONS)


def matches_reference(library: Native) -> bool:
    """Whether a library agrees with the table: bit for bit in each type, also within a block; and its products."""
    for height, width in ((6, 128), (5, 67)):
        W = torch.sin(torch.arange(height * width, dtype=torch.float32, device="cpu")).view(height, width)
        table, ours = (quantize(W, 64, True, piece) for piece in (quantize_piece, library.quantize_piece))
        if not all(torch.equal(a, b) for a, b in zip(table[:4], ours[:4], strict=True) if a is not None is not b):
            return False
        rows, columns, shape = (1, height), (3, width), (height - 1, width - 3)
        for dtype in TYPES:
            expected, same, wide = (torch.empty(shape, dtype=t, device="cpu") for t in (dtype, dtype, torch.float32))
            dequantize_region(table, rows, columns, expected)
            library.dequantize(table, rows, columns, same)
            library.dequantize(table, rows, columns, wide, dtype)
            if not (torch.equal(same, expected) and torch.equal(wide, expected.to(torch.float32))):
                return False
        if width == 128:
            W = dequantize_region(table, (0, height), (0, width), W)
            x = torch.cos(torch.arange(8 * width, dtype=torch.float32, device="cpu")).view(8, width)
            if not torch.allclose(library.linear(x, table, torch.float32), x @ W.T, rtol=1e-4, atol=1e-4):
                return False
    return True
