"""GGUF files: the header read strictly and in bounded work, the tensors read from the same descriptor.

The format: `GGUF`, a version, the numbers of tensors and of values; the values, key -> type and value; for each tensor
its name, dimensions (the fastest first), type and offset; then, aligned, the tensors' bytes. The `gguf` package's
reader maps the file into memory and trusts its counts; an adapter may come from a stranger.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lorary.errors import Diagnostic, FileError
from lorary.files.safe_open import open_inside, read_exactly
from lorary.files.strict_json import named, show
from lorary.files.tensor_file import MOST_DIMENSIONS, MOST_EXTENT, MOST_TENSORS, Entry, Header, memory, name_problem

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_BYTES = 2**40
_MOST_VALUES = 10_000
_MOST_TEXT = 2**20
_ARRAY, _STRING = 9, 8
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_ALIGNMENT = "general.alignment"
_QUANTISED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass
class _Bytes:
    """The bytes of a header, taken from the front."""

    file: BinaryIO
    left: int
    name: str

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise _damaged(self.name, "is cut short within its header")
        buffer = bytearray(count)
        read_exactly(self.file, memoryview(buffer), self.name)
        self.left -= count
        return bytes(buffer)

    def number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def text(self) -> str:
        length = self.number("Q")
        if length > _MOST_TEXT:
            raise _damaged(self.name, f"announces a text of {length:,} bytes, more than the {_MOST_TEXT:,} accepted")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise _damaged(self.name, "has a text that is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise _damaged(self.name, f"has a value of the unknown type {kind}")
        of, count = self.number("I"), self.number("Q")
        if of == _ARRAY or count > _MOST_VALUES:
            raise _damaged(self.name, f"has an array of {count:,} values of the type {of}, which no adapter has")
        return [self.value(of) for _ in range(count)]


def missing_package() -> list[Diagnostic]:
    """Why no GGUF file can be read or written, if the package is missing."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        return [Diagnostic("", "the package `gguf` is not installed", "pip install 'lorary[gguf]'")]
    return []


class GGUFFile:
    """An open GGUF file whose header has been checked. A context manager, and a `TensorSource`.

    Args:
        folder: the resolved folder that the file must be in.
        name: the file's name there.

    Raises:
        FileError: the file or its header is not acceptable, or the package `gguf` is missing.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        if problems := missing_package():
            raise FileError("", problems)
        self._file, size = open_inside(folder, name, _MOST_BYTES)
        try:
            source = _Bytes(self._file, size, name)
            self.values, self.header = _read_header(source, size)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of these names; quantised ones as llama.cpp computes with them, in fp32.

        Raises:
            FileError: they need more memory than the machine has, or the file was truncated meanwhile.
        """
        entries = {name: self.header.tensors[name] for name in names}
        if (needed := sum(math.prod(e.shape) * 4 for e in entries.values())) > memory():
            raise _damaged(self.name, f"its tensors need {needed:,} bytes, more than this machine has")
        return {name: self._tensor(entry) for name, entry in entries.items()}

    def _tensor(self, entry: Entry) -> Tensor:
        data = bytearray(entry.stop - entry.start)
        self._file.seek(self.header.data + entry.start)
        read_exactly(self._file, memoryview(data), self.name)
        if entry.dtype in _PLAIN:
            flat = torch.frombuffer(data, dtype=_PLAIN[entry.dtype]) if data else torch.empty(0)
            return flat.reshape(entry.shape)
        import gguf
        import numpy as np

        rows = np.frombuffer(data, dtype=np.uint8).reshape(*entry.shape[:-1], -1)
        values = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[entry.dtype])
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).reshape(entry.shape)


def _read_header(source: _Bytes, size: int) -> tuple[dict[str, Any], Header]:
    """The values by key, and the tensors."""
    if source.take(4) != MAGIC:
        raise _damaged(source.name, "does not begin with `GGUF`")
    if (version := source.number("I")) not in _VERSIONS:
        raise _damaged(source.name, f"is of GGUF's version {version}; lorary reads {_VERSIONS[0]} and {_VERSIONS[1]}")
    tensors, values = source.number("Q"), source.number("Q")
    if tensors > MOST_TENSORS or values > _MOST_VALUES:
        raise _damaged(source.name, f"announces {tensors:,} tensors and {values:,} values, which no adapter has")
    found: dict[str, Any] = {}
    for _ in range(values):
        key, kind = source.text(), source.number("I")
        if key in found:
            raise _damaged(source.name, f"has two values of {show(key)}")
        found[key] = source.value(kind)
    described = list(_descriptions(source, tensors))
    alignment = found.get(_ALIGNMENT, 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 2**16:
        raise _damaged(source.name, f"has the alignment {alignment!r}")
    start = -(-(size - source.left) // alignment) * alignment
    entries, problems, end = dict[str, Entry](), [], 0
    for name, shape, kind, offset in described:
        what = name_problem(name) or ("is there twice" if name in entries else "")
        dtype, bytes_ = _size(shape, kind)
        what = what or ("" if dtype else f"has the unknown type {kind}, or a size that does not fit it")
        what = what or ("reaches beyond the end of the file" if start + offset + bytes_ > size else "")
        # llama.cpp reads no other order: what it refuses may be the bytes of another tensor
        what = what or ("" if offset == end else f"begins at byte {offset:,}, and the tensors before it end at {end:,}")
        end = offset + -(-bytes_ // alignment) * alignment
        problems += [Diagnostic(f"{source.name}: {named(name)}", what)] if what else []
        entries[name] = Entry(dtype, shape, offset, offset + bytes_)
    if problems:
        raise FileError("", problems[:20])
    return found, Header(entries, start)


def _descriptions(source: _Bytes, count: int) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
    for _ in range(count):
        name, dimensions = source.text(), source.number("I")
        if dimensions > MOST_DIMENSIONS:
            raise _damaged(f"{source.name}: {named(name)}", f"has {dimensions:,} dimensions")
        shape = tuple(source.number("Q") for _ in range(dimensions))[::-1]
        if any(extent > MOST_EXTENT for extent in shape):
            raise _damaged(f"{source.name}: {named(name)}", f"has the shape {list(shape)}")
        yield name, shape, source.number("I"), source.number("Q")


def _size(shape: tuple[int, ...], kind: int) -> tuple[str, int]:
    """The name of a tensor's type and its number of bytes; no name if the type is unknown or does not fit."""
    import gguf

    try:
        dtype = gguf.GGMLQuantizationType(kind)
    except ValueError:
        return "", 0
    block, size = gguf.GGML_QUANT_SIZES[dtype]
    known = dtype.name in _PLAIN or dtype.name in _QUANTISED
    if not known or (shape and shape[-1] % block):
        return "", 0
    return dtype.name, math.prod(shape) // block * size


def _damaged(where: str, what: str) -> FileError:
    return FileError("", [Diagnostic(where, what)])
