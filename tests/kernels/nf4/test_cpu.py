"""The compiled code gives the table's numbers on every sort of processor, and its absence is no obstacle."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorary.kernels import native
from lorary.kernels.nf4 import QuantizedTensor, backend, cpu, dequantize, linear, quantize, reference
from lorary.kernels.nf4.cpu import OPTIONS, TYPES, Native

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
FEWER = {"plain C": ("-O1",), "AVX2": ("-O1", "-mavx2", "-mfma", "-mf16c"), "AVX-512": ("-O1", "-march=native")}


def compiled(*options: str) -> Path:
    """The library with these options of the compiler."""
    return native.compile_library((cpu.SOURCE, cpu.HEADER, native.THREADS), options)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Native]:
    """The code for each sort of processor that this one is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        able = {"plain C"}
        able |= {"AVX2"} if {"avx2", "fma", "f16c"} <= native.cpu_features() else set()
        able |= {"AVX-512"} if {"avx512f", "avx512bw"} <= native.cpu_features() else set()
        with ThreadPoolExecutor() as pool:
            paths = pool.map(lambda name: compiled(*OPTIONS, *FEWER[name]), able)
            made = {name: Native(path) for name, path in zip(able, paths, strict=True)}
    assert {name: library.isa for name, library in made.items()} == {name: name for name in made}
    return made


def test_it_is_what_runs_here() -> None:
    assert backend() in ("compiled, AVX-512", "compiled, AVX2", "compiled, plain C")


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(33, 63), (1, 1), (17, 100), (40, 128)], ids=str)
def test_every_sort_gives_the_tables_numbers(
    shape: tuple[int, int], double: bool, libraries: dict[str, Native]
) -> None:
    """Of whole weights and of rectangles that begin and end anywhere; what lies beside them is not written to."""
    height, width = shape
    rows, columns = (height // 3, height), (width // 3, width - width // 4)
    for block in (2, 16, 32, 64, 1024):
        quantized = quantize(torch.randn(shape) * 10 ** torch.randn(shape), block, double)
        for dtype in TYPES:
            table = reference.dequantize_region(quantized, (0, height), (0, width), torch.empty(shape, dtype=dtype))
            for name, library in libraries.items():
                out, wide = torch.full((height, width + 3), 7.0, dtype=dtype), torch.empty(shape)
                library.dequantize(quantized, (0, height), (0, width), out[:, :width])
                assert torch.equal(out[:, :width], table), (name, block, dtype)
                assert (out[:, width:] == 7).all(), (name, block, dtype)
                library.dequantize(quantized, (0, height), (0, width), wide, dtype)
                assert torch.equal(wide, table.float()), (name, block, dtype)
                out.fill_(7.0)
                piece = out[rows[0] : rows[1], columns[0] : columns[1]]
                library.dequantize(quantized, rows, columns, piece)
                assert torch.equal(piece, table[rows[0] : rows[1], columns[0] : columns[1]]), (name, block, dtype)
                assert (out == 7).sum() >= out.numel() - piece.numel()


@pytest.mark.parametrize("shape", [(33, 63), (1, 1), (17, 100), (40, 128)], ids=str)
def test_every_build_quantizes_alike(shape: tuple[int, int], libraries: dict[str, Native]) -> None:
    W = torch.randn(shape) * 10 ** torch.randn(shape)
    W[0, : shape[1] // 2] = 0.0
    for block in (2, 16, 64, 1024):
        expected = reference.quantize(W, block, False, reference.quantize_piece)
        for name, library in libraries.items():
            ours = reference.quantize(W, block, False, library.quantize_piece)
            assert torch.equal(ours.codes, expected.codes), (name, block)
            assert torch.equal(ours.absmax, expected.absmax), (name, block)


@pytest.mark.parametrize("scale", [1e-7, 1e-4, 1e38, 1e-39, float("inf"), float("nan")])
def test_rounding_at_the_ends_of_each_type(scale: float, libraries: dict[str, Native]) -> None:
    """Subnormal numbers, overflow, infinity and NaN, as magnitudes of a foreign checkpoint may have them."""
    quantized = quantize(torch.randn(8, 128), double=False)
    quantized = quantized._replace(absmax=quantized.absmax * scale)
    for dtype in TYPES:
        table = reference.dequantize_region(quantized, (0, 8), (0, 128), torch.empty(8, 128, dtype=dtype))
        for name, library in libraries.items():
            out = torch.empty(8, 128, dtype=dtype)
            library.dequantize(quantized, (0, 8), (0, 128), out)
            torch.testing.assert_close(out, table, rtol=0, atol=0, equal_nan=True, msg=f"{name}, {dtype}")


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_sort_gives_the_product(dtype: torch.dtype, libraries: dict[str, Native]) -> None:
    for block, double in ((64, True), (128, False)):
        quantized = quantize(torch.randn(50, 256) * 0.1, block, double)
        for tokens in (1, 2, 3, 4, 7):
            x = torch.randn(tokens, 256)
            exact = x.double() @ dequantize(quantized, dtype).double().T
            for name, library in libraries.items():
                error = (library.linear(x, quantized, dtype).double() - exact).abs().max()
                assert error < 1e-5, (name, tokens, error)


def test_threads_change_nothing(libraries: dict[str, Native], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "SHARE", 100)
    quantized, x = quantize(torch.randn(37, 192)), torch.randn(3, 192)
    library, found = libraries["plain C"], []
    try:
        for threads in (1, 2, 5, 100):
            torch.set_num_threads(threads)
            out = torch.empty(37, 192)
            library.dequantize(quantized, (0, 37), (0, 192), out)
            again = reference.quantize(out, 64, False, library.quantize_piece)
            found.append((out, library.linear(x, quantized, torch.float32), again.codes, again.absmax))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_it_is_not_given_what_it_cannot_read() -> None:
    good = quantize(torch.randn(40, 128))
    assert cpu.is_readable(good)
    short: dict[str, Tensor | None] = {
        "codes": good.codes[:-1],
        "absmax": good.absmax[:-1],
        "nested_absmax": torch.empty(0),
        "nested_offset": torch.zeros((), dtype=torch.float64),
    }
    for name, part in short.items():
        assert not cpu.is_readable(good._replace(**{name: part}))
    assert not cpu.is_readable(good._replace(absmax=good.absmax.repeat_interleave(2)[::2]))
    assert not cpu.is_readable(good._replace(shape=(41, 128)))
    with pytest.raises((IndexError, RuntimeError)):
        dequantize(good._replace(shape=(41, 128)))


# --- making it --------------------------------------------------------------------------------------------------------


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def works_by_the_table() -> bool:
    """Whether nothing compiled can be had, and a product is right all the same."""
    cpu._load_native.cache_clear()
    try:
        quantized, x = quantize(torch.randn(70, 128)), torch.randn(5, 128)
        torch.testing.assert_close(linear(x, quantized), x @ dequantize(quantized).T)
        return backend() == "table"
    finally:
        cpu._load_native.cache_clear()


def script(folder: Path, text: str) -> str:
    """A folder with a compiler of our own."""
    (folder / "cc").write_text(f"#!/bin/sh\n{text}\n")
    (folder / "cc").chmod(0o755)
    return str(folder)


def test_without_a_compiler(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(empty))
    assert works_by_the_table()
    assert not (empty / "cache").exists()


def test_with_a_compiler_that_fails_or_lies(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = os.environ["PATH"]
    for text in ("exit 1", 'while [ "$1" != "-o" ]; do shift; done; echo nonsense > "$2"'):
        monkeypatch.setenv("PATH", script(empty, text) + os.pathsep + path)
        assert works_by_the_table(), text


def test_without_a_place_to_write(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (empty / "cache").write_text("a file")
    assert works_by_the_table()


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="there are no owners of files")
def test_in_a_place_where_others_may_write(empty: Path) -> None:
    """Whoever can write there could have us run what they like."""
    (empty / "cache" / "lorary").mkdir(parents=True)
    (empty / "cache" / "lorary").chmod(0o777)
    assert works_by_the_table()
    assert not list((empty / "cache" / "lorary").iterdir())


def test_when_it_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORARY_NATIVE", "0")
    assert backend() == "table"


def test_two_that_compile_at_once(empty: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: compiled(*OPTIONS, "-O0"), range(2))
    assert first == second
    assert list((empty / "cache" / "lorary").iterdir()) == [first]
    assert Native(first).isa == "plain C"
    seen = first.stat().st_mtime_ns
    assert compiled(*OPTIONS, "-O0").stat().st_mtime_ns == seen  # and not again


@pytest.mark.parametrize("damage", ["cut short", "another", "a folder", "others may write"])
def test_a_damaged_library_is_compiled_again(damage: str, empty: Path) -> None:
    """Loading it could end the process, in the middle of whatever it does."""
    made = compiled(*OPTIONS, "-O0")
    content = made.read_bytes()
    if damage == "a folder":
        made.rename(made.with_name("aside"))
        made.with_name(made.name.replace(made.stem[-8:], "0" * 8)).mkdir()
    elif damage == "others may write":
        made.chmod(0o777)
    else:
        made.write_bytes(content[:5000] if damage == "cut short" else content[::-1])
    again = compiled(*OPTIONS, "-O0")
    assert again.read_bytes() == content
    assert again.stat().st_mode & 0o777 == 0o700
    assert Native(again).isa == "plain C"


FAULTS = {
    "the upper of two codes": ("v[j] > middles[i]", "v[j] >= middles[i] - 1e-3f"),
    "no offset": ("product + *w->offset", "product"),
    "the block of the first number": ("(block + 1) * w->block - start", "w->block"),
    "another type": ("narrow(t, type)", "narrow(t, FLOAT16)"),
    "a row of x too few": ("token + 4 <= j->tokens", "token + 4 < j->tokens"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_code_that_is_wrong_is_found_out_before_it_is_used(fault: str, tmp_path: Path) -> None:
    old, new = FAULTS[fault]
    text = cpu.SOURCE.read_text()
    assert old in text
    (tmp_path / "nf4").mkdir()
    (tmp_path / "nf4" / "nf4.c").write_text(text.replace(old, new))
    (tmp_path / "nf4" / "simd.h").write_text(cpu.HEADER.read_text())
    (tmp_path / "threads.h").write_text(native.THREADS.read_text())
    command = ["cc", *OPTIONS, "-O0", "-o", str(tmp_path / "wrong.so"), str(tmp_path / "nf4" / "nf4.c")]
    subprocess.run(command, check=True, capture_output=True)
    assert not cpu.matches_reference(Native(tmp_path / "wrong.so"))


def test_it_is_called_without_the_interpreters_lock() -> None:
    """Two threads dequantise two weights at once."""
    weights: list[QuantizedTensor] = [quantize(torch.randn(256, 256)) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(dequantize, weights * 8))
    assert all(torch.equal(a, dequantize(w)) for a, w in zip(found, weights * 8, strict=True))
