"""The compiled code for packed weights on the CPU: made once, for this very processor, by the C compiler that is there.

The first call compiles `nf4.c`, in about a second, into the user's cache folder (`$XDG_CACHE_HOME/lorary` or
`~/.cache/lorary`); later processes load what is there. The file's name is a digest of the source, the compiler, its
options and the processor: a folder may be shared by machines that differ; and one of the file itself: a damaged one
would end the process that runs it. Where there is no compiler or no place to write, or what was compiled does not give
the numbers of the table, the table is used. `LORARY_NATIVE=0` asks for the table.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from lorary.kernels.nf4.reference import (
    CODE,
    DYNAMIC,
    MIDDLES,
    QuantizedTensor,
    matrix_shape,
    quantize,
    quantize_piece,
    region,
)

SOURCE, HEADER = Path(__file__).with_name("nf4.c"), Path(__file__).with_name("nf4_lanes.h")
OPTIONS = ("-O3", "-std=c11", "-ffp-contract=off", "-fPIC", "-shared", "-pthread")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
WIDE = 4  # on top of a 16-bit type: numbers rounded to it, kept in 32 bits
SHARE = 2**19  # numbers that are worth a thread of their own


class _Packed(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "absmax", "coded", "nested", "offset", "code", "dynamic")),
        ("block", ctypes.c_int64),
    ]


class Native:
    """The functions of one compiled library.

    Raises:
        OSError: if the file is not a library.
        AttributeError: if it is another library.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        number, address, flag = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
        self._pack, self._unpack = library.lorary_nf4_pack, library.lorary_nf4_unpack
        self._times = library.lorary_nf4_times
        self._pack.argtypes = [address, number, number, address, address, address, flag]
        self._pack.restype = None
        self._unpack.argtypes = [address, address, *[number] * 4, address, number, flag, flag]
        self._unpack.restype = None
        self._times.argtypes = [address, address, address, flag, number, number, flag, flag]
        self._times.restype = ctypes.c_int
        library.lorary_nf4_isa.restype = ctypes.c_char_p
        self.isa: str = library.lorary_nf4_isa().decode()

    def pack_piece(self, w: Tensor, block: int, codes: Tensor, absmax: Tensor) -> None:
        """As `nf4_values.pack_piece`; `codes` dense or of a single column."""
        w, codes = w.contiguous(), codes.view(-1)
        addresses = (MIDDLES.data_ptr(), codes.data_ptr(), absmax.data_ptr())
        self._pack(w.data_ptr(), w.numel(), block, *addresses, _threads(w.numel()))

    def unpack(
        self,
        packed: QuantizedTensor,
        rows: tuple[int, int],
        columns: tuple[int, int],
        out: Tensor,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Writes a rectangle of the weight.

        Args:
            packed: `readable`.
            rows: (first, behind the last) in the matrix of the weight's last dimension.
            columns: likewise.
            out: [rows, columns] of a dtype in `TYPES`, dense along its rows.
            dtype: of 16 bits, that numbers are rounded to where `out` is float32.
        """
        kind = TYPES[out.dtype] if dtype in (None, out.dtype) else TYPES[dtype] + WIDE
        width = matrix_shape(packed.shape)[1]
        height, across = rows[1] - rows[0], columns[1] - columns[0]
        self._unpack(
            ctypes.byref(_addresses(packed)),
            None,
            rows[0] * width + columns[0],
            height,
            across,
            width,
            out.data_ptr(),
            out.stride(0),
            kind,
            _threads(height * across),
        )

    def unpack_rows(self, packed: QuantizedTensor, rows: Tensor, out: Tensor) -> None:
        """Writes the rows of the weight with these numbers (int64 [m], all of them there) to `out` [m, width]."""
        rows, width = rows.contiguous(), out.shape[1]
        self._unpack(
            ctypes.byref(_addresses(packed)),
            rows.data_ptr(),
            0,
            rows.numel(),
            width,
            width,
            out.data_ptr(),
            width,
            TYPES[out.dtype],
            _threads(out.numel()),
        )

    def times(self, x: Tensor, packed: QuantizedTensor, dtype: torch.dtype) -> Tensor:
        """float32 [tokens, height]: x·Wᵀ with W rounded to `dtype`; x float32 [tokens, width], contiguous."""
        height, width = packed.shape
        y = x.new_empty((x.shape[0], height))
        failed = self._times(
            ctypes.byref(_addresses(packed)),
            x.data_ptr(),
            y.data_ptr(),
            x.shape[0],
            height,
            width,
            TYPES[dtype],
            _threads(height * width),
        )
        if failed:
            raise MemoryError(f"no memory for {x.numel()} numbers")
        return y


def _addresses(packed: QuantizedTensor) -> _Packed:
    codes, absmax, nested, offset = packed[:4]
    double = nested is not None and offset is not None
    return _Packed(
        codes.data_ptr(),
        None if double else absmax.data_ptr(),
        absmax.data_ptr() if double else None,
        nested.data_ptr() if double and nested is not None else None,
        offset.data_ptr() if double and offset is not None else None,
        CODE.data_ptr(),
        DYNAMIC.data_ptr(),
        packed.block,
    )


def _threads(numbers: int) -> int:
    return max(1, min(torch.get_num_threads(), numbers // SHARE))


def readable(packed: QuantizedTensor) -> bool:
    """Whether the compiled code may read these tensors: on the CPU, whole, and of the sizes that the shape asks for."""
    height, width = matrix_shape(packed.shape)
    n = height * width
    blocks = -(-n // packed.block)
    wanted = [(packed.codes, torch.uint8, -(-n // 2))]
    if packed.nested_absmax is None or packed.nested_offset is None:
        wanted += [(packed.absmax, torch.float32, blocks)]
    else:
        wanted += [(packed.absmax, torch.uint8, blocks), (packed.nested_absmax, torch.float32, -(-blocks // 256))]
        wanted += [(packed.nested_offset, torch.float32, 1)]
    return packed.block % 2 == 0 and all(
        t.device.type == "cpu" and t.dtype is dtype and t.numel() == numbers and t.is_contiguous()
        for t, dtype, numbers in wanted
    )


# --- making it --------------------------------------------------------------------------------------------------------


def native() -> Native | None:
    """The compiled library, made if it is not there; None where it cannot be had or is not wanted."""
    return None if os.environ.get("LORARY_NATIVE") == "0" else _made()


@lru_cache
def _made() -> Native | None:
    for options in (("-march=native",), ("-mcpu=native",), ()):
        try:
            made = Native(library(OPTIONS + options))
        except (OSError, AttributeError, subprocess.SubprocessError):
            continue
        if _agrees(made):
            return made
    return None


def library(options: tuple[str, ...]) -> Path:
    """The compiled file in the user's cache folder, compiled if it is not there.

    Raises:
        OSError: where there is no compiler, or no folder of this user's own to write to.
        subprocess.SubprocessError: where the compiler fails.
    """
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        raise FileNotFoundError("there is no C compiler")
    source, seen = SOURCE.read_bytes() + HEADER.read_bytes(), os.stat(compiler)
    key = (
        source,
        os.path.realpath(compiler),
        seen.st_size,
        seen.st_mtime_ns,
        options,
        platform.machine(),
        sorted(features()),
    )
    folder = _cache()
    start = f"nf4-{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}-"
    if whole := [path for path in sorted(folder.glob(f"{start}*.so")) if _is_whole(path)]:
        return whole[0]
    # Under another name first: a process beside this one sees the whole file or none.
    handle, name = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    try:
        command = [compiler, *options, "-o", name, str(SOURCE)]
        subprocess.run(command, check=True, capture_output=True, timeout=120, stdin=subprocess.DEVNULL)
        os.chmod(name, 0o700)
        path = folder / f"{start}{_digest(Path(name))}.so"
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
    return path


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def _is_whole(path: Path) -> bool:
    """Whether it is a file of this user alone, as it was written."""
    try:
        return path.is_file() and _is_own(path) and path.stem.endswith(f"-{_digest(path)}")
    except OSError:
        return False


def _is_own(path: Path) -> bool:
    seen = path.stat()
    return not hasattr(os, "getuid") or (seen.st_uid == os.getuid() and not seen.st_mode & 0o022)


def _cache() -> Path:
    """The folder for compiled files: of this user alone, since what lies there is run."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = (Path(base) if os.path.isabs(base) else Path("~").expanduser() / ".cache") / "lorary"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not _is_own(folder):
        raise PermissionError(f"{folder} can be written by others")
    return folder


@lru_cache
def features() -> frozenset[str]:
    """What the processor can do, in Linux's words; empty where it is not told."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(word for line in lines if line.startswith(("flags", "Features")) for word in line.split())


def _agrees(made: Native) -> bool:
    """Whether it gives the table's numbers, of each type, from a place within a block; and their products."""
    for height, width in ((6, 128), (5, 67)):
        W = torch.sin(torch.arange(height * width, dtype=torch.float32, device="cpu")).view(height, width)
        packed, same = quantize(W, 64, True, quantize_piece), quantize(W, 64, True, made.pack_piece)
        if not all(torch.equal(a, b) for a, b in zip(packed[:4], same[:4], strict=True) if a is not None is not b):
            return False
        rows, columns, shape = (1, height), (3, width), (height - 1, width - 3)
        for dtype in TYPES:
            table, ours = (torch.empty(shape, dtype=dtype, device="cpu") for _ in range(2))
            wide = torch.empty(shape, dtype=torch.float32, device="cpu")
            region(packed, rows, columns, table)
            made.unpack(packed, rows, columns, ours)
            made.unpack(packed, rows, columns, wide, dtype)
            if not (torch.equal(ours, table) and torch.equal(wide, table.to(torch.float32))):
                return False
    packed = quantize(
        torch.sin(torch.arange(5 * 128, dtype=torch.float32, device="cpu")).view(5, 128), 64, True, quantize_piece
    )
    W = region(packed, (0, 5), (0, 128), torch.empty((5, 128), dtype=torch.float32, device="cpu"))
    x = torch.cos(torch.arange(8 * 128, dtype=torch.float32, device="cpu")).view(8, 128)
    return torch.allclose(made.times(x, packed, torch.float32), x @ W.T, rtol=1e-4, atol=1e-4)
