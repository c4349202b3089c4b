"""Compiled code computes what the reference does, and its absence is no obstacle."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorary.kernels import native
from lorary.serve.batch.ops import cpu
from lorary.serve.batch.ops.cpu import OPTIONS, TYPES, Native, matches_reference

from .cases import PIECES, SIZES, Piece, adapters, close, expected, slots, table_of

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> list[Native]:
    """For this processor, and for any."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        several = ((*OPTIONS, "-march=native"), ("-O1", *OPTIONS[1:]))
        return [Native(native.compile_library((cpu.SOURCE, native.THREADS), options)) for options in several]


def prepared(pieces: Iterable[Piece]) -> Any:
    """The pieces as the code takes them."""
    return Native.prepare(None, list(pieces), 40, torch.device("cpu"))  # type: ignore[arg-type]  # every library's


def test_it_is_what_runs_here() -> None:
    assert isinstance(cpu.native(), Native)


def test_it_is_not_used_if_it_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORARY_NATIVE", "0")
    assert cpu.native() is None


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_compiled_code_is_the_reference(size: tuple[int, int], dtype: torch.dtype, libraries: list[Native]) -> None:
    """Rows between and after the pieces stay as they are, bit for bit."""
    inp, out = size
    for transposed in (False, True):
        forms = adapters(inp, out, dtype, "cpu", transposed=transposed)
        table = table_of(forms, dtype, "cpu")
        x, y0 = torch.randn(40, inp).to(dtype), torch.randn(40, out).to(dtype)
        for pieces in PIECES.values():
            wanted = expected(forms, pieces, x, y0)
            idle = sorted(set(range(40)) - {row for _, start, stop, _ in pieces for row in range(start, stop)})
            for library in libraries:
                y = y0.clone()
                library.add_rows(table.tensor, 1, prepared(slots(table, forms, pieces)), x, y)
                close(y, wanted)
                assert torch.equal(y[idle], y0[idle])


def test_matrix_products_are_the_reference() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        forms = adapters(45, 31, dtype, "cpu", transposed=False)
        x, y0 = torch.randn(40, 45).to(dtype), torch.randn(40, 31).to(dtype)
        for pieces in PIECES.values():
            y = y0.clone()
            for index, start, stop, weight in pieces:
                cpu.add_terms(y[start:stop], x[start:stop], forms[index].sites["layer"], weight)
            close(y, expected(forms, pieces, x, y0))


def test_infinities_and_nan_are_not_lost(libraries: list[Native]) -> None:
    """They stay in their row."""
    for dtype in TYPES:
        forms = adapters(64, 64, dtype, "cpu", transposed=False)
        table = table_of(forms, dtype, "cpu")
        x, y = torch.randn(40, 64).to(dtype), torch.zeros(40, 64, dtype=dtype)
        x[1, 5], x[2, 5] = torch.nan, torch.inf
        for library in libraries:
            found = y.clone()
            library.add_rows(table.tensor, 1, prepared([(2, row, row + 1, 1.0) for row in range(4)]), x, found)
            assert found[1].isnan().all()
            assert not found[2].isfinite().any()
            assert found[[0, 3]].isfinite().all()


def test_threads_change_nothing(libraries: list[Native], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a weighted sum would be cut in two."""
    forms = adapters(64, 64, torch.float32, "cpu", transposed=False)
    table = table_of(forms, torch.float32, "cpu")
    x, y0 = torch.randn(40, 64), torch.randn(40, 64)
    for pieces in PIECES.values():
        one, several = y0.clone(), y0.clone()
        given = prepared(slots(table, forms, pieces))
        libraries[0].add_rows(table.tensor, 1, given, x, one)
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "threads", lambda _: 7)
            libraries[0].add_rows(table.tensor, 1, given, x, several)
        assert torch.equal(one, several)


FAULTS = {
    "a rank too few": ("for (; j < t->rank; j++) products", "for (; j + 1 < t->rank; j++) products"),
    "no gain": ("if (t->gain)", "if (0 && t->gain)"),
    "no shift": ("if (t->shift)", "if (0 && t->shift)"),
    "the weight on the gain": ("w * sum[i][k], type);\n        else", "sum[i][k], type);\n        else"),
    "no weight": ("load(row, k, type) + w * sum", "load(row, k, type) + sum"),
    "no d": ("if (t->d)", "if (0 && t->d)"),
    "no b": ("if (t->b)", "if (0 && t->b)"),
    "the last columns": ("for (; o < out; o++)", "for (; o + 1 < out; o++)"),
    "another slot": ("piece->slot * job->layers", "0 * job->layers"),
    "the other layout": ("if (t->B_row == 1)", "if (t->B_row != 1)"),
    "a row too many": ("for (; i < piece->stop; i++)", "for (; i <= piece->stop; i++)"),
    "half a type": ("store(row, k, load", "store(row, k, 2 * load"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_code_that_is_wrong_is_found_out_before_it_is_used(fault: str, tmp_path: Path) -> None:
    old, new = FAULTS[fault]
    text = cpu.SOURCE.read_text()
    assert old in text
    folder = tmp_path / "serve" / "batch" / "ops"
    folder.mkdir(parents=True)
    (tmp_path / "kernels").mkdir()
    (folder / "rows.c").write_text(text.replace(old, new))
    (tmp_path / "kernels" / "threads.h").write_text(native.THREADS.read_text())
    command = ["cc", *OPTIONS, "-O0", "-o", str(tmp_path / "wrong.so"), str(folder / "rows.c")]
    subprocess.run(command, check=True, capture_output=True)
    assert not matches_reference(Native(tmp_path / "wrong.so"))
