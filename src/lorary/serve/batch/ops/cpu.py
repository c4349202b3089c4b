"""Terms on the CPU: a matrix product pair for a long segment, compiled code for many short ones.

A step of token-by-token generation has one row for each request. A call from Python for every one of them takes longer
than its arithmetic, and weights gathered or stacked beforehand are a copy; so one call for each layer runs compiled
code over all of them, which reads the weights where they lie. Without a compiler, short segments are computed as long
ones.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorary.kernels.native import THREADS, first_that_works, threads, wanted
from lorary.kernels.segments import add_product
from lorary.serve.batch.ops.reference import rows_with_terms
from lorary.serve.batch.ops.table import AdapterTable
from lorary.serve.forms.serving_form import ServingForm, SiteForm

SOURCE = Path(__file__).with_name("rows.c")
# sums may be reordered, which vectorises them; infinities and NaN stay what they are
_REORDERED = ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math")
OPTIONS = ("-O3", "-std=c11", "-fPIC", "-shared", "-pthread", *_REORDERED)
TYPES = {torch.float32: 0, torch.bfloat16: 1}
_USUAL_RANK = 16  # by which work is shared among threads
# rows * (in + out) of the model's median layer, up to which compiled code beats two matrix products
_SHORT = 2**15
SHORT_ROWS = (8, 128)  # least and most


class PieceStruct(ctypes.Structure):
    """Rows of one adapter."""

    _fields_ = [*((name, ctypes.c_int64) for name in ("slot", "start", "stop")), ("weight", ctypes.c_double)]


class Native:
    """The functions of a compiled library.

    Raises:
        OSError: if the file is not a library.
        AttributeError: if a function is missing.
    """

    types = tuple(TYPES)

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        number, address, flag = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
        self._rows = library.lorary_rows
        self._rows.argtypes = [address, number, number, address, number, address, address, number, number, flag, flag]
        self._rows.restype = None

    def short(self, width: int) -> int:
        """The rows of a short segment, at most; one of wide layers is faster by matrix products sooner."""
        least, most = SHORT_ROWS
        return max(least, min(most, _SHORT // width))

    def prepare(self, pieces: Sequence[tuple[int, int, int, float]], rows: int, device: torch.device) -> Any:
        """The pieces (slot, start, stop, weight) of a step, as `add_rows` takes them."""
        return (PieceStruct * len(pieces))(*(PieceStruct(*piece) for piece in pieces))

    def add_rows(self, table: Tensor, layer: int, pieces: Any, x: Tensor, y: Tensor) -> None:
        """Add the terms of one layer to y, in place.

        Args:
            table: [slots, layers, FIELDS] of an `AdapterTable`.
            layer: the index of the layer.
            pieces: of `prepare`, in order; those of a weighted sum have the same rows.
            x, y: [rows, in] and [rows, out], contiguous, of a dtype in `TYPES` that the adapters' tensors have, too.
        """
        place = (table.data_ptr(), table.shape[1], layer, pieces, len(pieces))
        width = x.shape[1] + y.shape[1]
        shape = (x.shape[1], y.shape[1], TYPES[x.dtype], threads(len(x) * width * _USUAL_RANK))
        self._rows(*place, x.data_ptr(), y.data_ptr(), *shape)


def add_terms(y: Tensor, x: Tensor, form: SiteForm, weight: float = 1.0) -> None:
    """Add the terms of one adapter to y [rows, out], for x [rows, in], in place and by matrix products."""
    A, B, gain, shift, d, b, _ = form
    if gain is not None:
        y.mul_(gain)
    if A is not None and B is not None:
        if d is None and b is None:
            add_product(y, x, A, B, weight)
        else:  # VeRA's vectors
            h = F.linear(x, A if A.dtype is x.dtype else A.to(x.dtype))  # [rows, R]
            h = h if d is None else h.mul_(d)
            z = F.linear(h, B.to(h.dtype))
            y.add_(z if b is None else z.mul_(b), alpha=weight)
    if shift is not None:
        y.add_(shift, alpha=weight)


def native() -> Native | None:
    """The compiled library, built if needed; None if it cannot be built or `LORARY_NATIVE=0`."""
    return _load_native() if wanted() else None


@lru_cache
def _load_native() -> Native | None:
    return first_that_works(Native, matches_reference, (SOURCE, THREADS), OPTIONS)


def matches_reference(library: Native) -> bool:
    """Whether a library computes what the reference does, in each type, and leaves other rows alone."""
    with torch.device("cpu"):
        return all(_matches(library, dtype, transposed) for dtype in TYPES for transposed in (False, True))


def _matches(library: Native, dtype: torch.dtype, transposed: bool) -> bool:
    def numbers(*shape: int) -> Tensor:
        count = torch.Size(shape).numel()
        return torch.sin(torch.arange(count, dtype=torch.float32) * 1.7 + count).view(shape).to(dtype)

    inp, out, forms = 45, 67, []
    for rank in (5, 3, 0, 17):
        B = numbers(rank, out).T if transposed else numbers(out, rank)
        gain, shift = (numbers(out).float(), numbers(out) + 1) if rank in (0, 5) else (None, None)
        d, b = (numbers(rank), numbers(out)) if rank == 3 else (None, None)
        forms.append(ServingForm(str(rank), {"layer": SiteForm(numbers(rank, inp), B, gain, shift, d, b)}))
    table = AdapterTable({"another": dtype, "layer": dtype}, torch.device("cpu"))
    for form in forms:
        table.add(form)
    pieces = [(0, 0, 5, 0.75), (1, 6, 7, 0.5), (3, 6, 7, -2.0), (2, 7, 9, 1.0), (3, 9, 10, 1.0)]
    x, y = numbers(12, inp), numbers(12, out)
    expected, y0 = y.clone(), y.clone()
    for index, start, stop, weight in pieces:
        part = slice(start, stop)
        expected[part] = rows_with_terms(expected[part], x[part], forms[index].sites["layer"], weight)
    slots = [table.slot(form) or 0 for form in forms]
    given = library.prepare([(slots[i], start, stop, w) for i, start, stop, w in pieces], 12, x.device)
    library.add_rows(table.tensor, 1, given, x, y)
    wrong = (y.float() - expected.float()).abs().max() / expected.float().abs().max()
    alone = torch.equal(y[5], y0[5]) and torch.equal(y[10:], y0[10:])
    return alone and wrong.item() < (1e-5 if dtype is torch.float32 else 1e-2)  # NaN is not below it
