"""Safetensors files: opened and checked once and read from the same descriptor; and written.

The format: eight bytes, little endian, the length N of the header; N bytes of JSON that begin with `{`, tensor name ->
{dtype, shape, data_offsets}; then the tensors' bytes, contiguous, in the order of their offsets, to the end of the
file. The safetensors library accepts some things that its specification forbids (equal keys, a space before the brace,
further fields in an entry) and sets no bounds on numbers and names; here all of it is checked, in plain Python, before
any tensor is read.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lorary.errors import Diagnostic, FileError
from lorary.files import strict_json
from lorary.files.safe_open import open_inside, read_exactly
from lorary.files.strict_json import named, show

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# numbers that may be whole: of a batch norm that PEFT saved, and the alphas of sd-scripts
_COUNTERS, _COUNTER_DTYPE = (".num_batches_tracked", ".alpha"), "I64"
_MOST_BYTES = 2**40  # the header and the memory set the real limits; this one only keeps numbers sane
ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
MOST_HEADER_BYTES = 10 * 2**20
MOST_TENSORS = 20_000
MOST_NAME = 512  # characters
MOST_DIMENSIONS = 5  # a Conv3d's weight
MOST_EXTENT = 2**31
MOST_METADATA = 64 * 2**10  # characters
_NAME = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?")
_MOST_REPORTED = 20
_CHUNK = 2**20


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: its dtype in the format's spelling, its shape, and its byte range in the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """A checked header.

    Args:
        tensors: name -> entry, in the order of the file.
        data: the offset of the tensors' bytes in the file.
        metadata: the texts that the file's writer left beside the tensors.
    """

    tensors: dict[str, Entry]
    data: int
    metadata: dict[str, str] = field(default_factory=dict)


class TensorSource(Protocol):
    """An open file of tensors, of any format.

    Attributes:
        name: the file's name, in messages.
        header: its checked header.
    """

    name: str
    header: Header

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of these names, each in its own memory."""
        ...


class TensorFile:
    """An open safetensors file whose header has been checked. A context manager.

    Args:
        folder: the resolved folder that the file must be in.
        name: the file's name there.

    Raises:
        FileError: the file or its header is not acceptable; no tensor has been read.
    """

    header: Header

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self._file: BinaryIO
        self._file, self.size = open_inside(folder, name, _MOST_BYTES)
        try:
            self.header = read_header(self._file, self.size, name)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of these names, each in its own memory and dtype; whole numbers in fp32.

        Raises:
            FileError: they need more memory than the machine has, or the file was truncated meanwhile.
        """
        entries = {name: self.header.tensors[name] for name in names}
        needed, most = sum(e.stop - e.start for e in entries.values()), memory()
        if needed > most:
            what = f"its tensors need {needed:,} bytes, this machine has {most:,} of memory"
            raise FileError("", [Diagnostic(self.name, what)])
        return {name: self._tensor(entry) for name, entry in sorted(entries.items(), key=lambda i: i[1].start)}

    def sha256(self) -> str:
        """The SHA-256 of the whole file, from the descriptor of the tensors, which may be read at the same time."""
        total, position = hashlib.sha256(), 0
        while chunk := os.pread(self._file.fileno(), _CHUNK, position):
            total.update(chunk)
            position += len(chunk)
        return total.hexdigest()

    def _tensor(self, entry: Entry) -> Tensor:
        tensor = torch.empty(entry.shape, dtype=DTYPES.get(entry.dtype, torch.int64))
        if tensor.numel():
            self._file.seek(self.header.data + entry.start)
            raw = tensor.reshape(-1).view(torch.uint8).numpy()
            read_exactly(self._file, raw.data, self.name)
        return tensor if tensor.is_floating_point() else tensor.float()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a new safetensors file, whose bytes depend on the tensors and their names alone.

    Raises:
        OSError: the disk is full, or the system refuses.
    """
    plain = {name: t.detach().to("cpu").contiguous() for name, t in sorted(tensors.items())}
    shared = {t.untyped_storage().data_ptr() for t in plain.values() if t.numel()}
    if len(shared) < sum(1 for t in plain.values() if t.numel()):  # the library refuses views of one memory
        plain = {name: t.clone() for name, t in plain.items()}
    with open(path, "xb") as file:
        mode = os.fstat(file.fileno()).st_mode  # the library creates files that only their owner can read
    try:
        save_file(plain, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise _as_os_error(error, path) from error
    os.chmod(path, mode)


def _as_os_error(error: SafetensorError, path: Path) -> OSError:
    """The system's error, whose number the library gives only inside its text."""
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1])), str(path)) if number else OSError(0, str(error))


def memory() -> int:
    """This machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# --- the header -------------------------------------------------------------------------------------------------------


def read_header(file: BinaryIO, size: int, where: str) -> Header:
    """Read and check the header of an open file; the position is left at the first byte of the data.

    Args:
        file: the file, at its start.
        size: its size in bytes.
        where: its name, for messages.

    Raises:
        FileError: every reason why this is not a well-formed file of tensors of `DTYPES`.
    """
    if size < 10:
        what = "is empty" if size == 0 else f"has {size} bytes, too few for a safetensors file"
        raise FileError("", [Diagnostic(where, what)])
    start = bytearray(9)
    read_exactly(file, memoryview(start), where)
    length = int.from_bytes(start[:8], "little")
    if problem := _length_problem(bytes(start), length, size):
        raise FileError("", [Diagnostic(where, problem)])
    raw = bytearray(length)
    raw[:1] = start[8:]
    read_exactly(file, memoryview(raw)[1:], where)
    try:
        written = strict_json.parse(bytes(raw), MOST_HEADER_BYTES)
    except ValueError as error:
        raise FileError("", [Diagnostic(where, f"the header is damaged: {error}")]) from None
    return _checked(written, size - 8 - length, 8 + length, where)


def _length_problem(start: bytes, length: int, size: int) -> str:
    pickled = start.startswith(b"PK\x03\x04") or start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    fits = length <= min(size - 8, MOST_HEADER_BYTES) and start[8:] == b"{"
    if pickled and not fits:  # a header of 1,152 bytes begins as a pickle does
        return "is a pickle under another name; pickles can run code and are never opened"
    if length > MOST_HEADER_BYTES:
        return f"announces a header of {length:,} bytes, more than the {MOST_HEADER_BYTES:,} that are accepted"
    if length > size - 8:
        return f"announces a header of {length:,} bytes, but {size - 8:,} follow: the file is cut short"
    if start[8:] != b"{":
        return f"the header begins with {show(start[8:].decode('latin-1'))}, not with '{{'"
    return ""


def _checked(written: Any, data_size: int, data: int, where: str) -> Header:
    problems: list[Diagnostic] = []
    metadata = written.pop("__metadata__", None)
    if what := _metadata_problem({} if metadata is None else metadata):  # mlx writes null
        problems.append(Diagnostic("__metadata__", what))
    if len(written) > MOST_TENSORS:
        what = f"{len(written):,} tensors, more than the {MOST_TENSORS:,} that are accepted"
        raise FileError("", [Diagnostic(where, what)])
    tensors = {}
    for name, fields in written.items():
        if what := name_problem(name) or _entry_problem(name, fields):
            problems.append(Diagnostic(named(name), what))
        else:
            tensors[name] = Entry(fields["dtype"], tuple(fields["shape"]), *fields["data_offsets"])
    if not problems:  # an unreadable entry would show up as a hole too
        problems += _span_problems(tensors, data_size)
    if len(problems) > _MOST_REPORTED:
        more = len(problems) - _MOST_REPORTED
        problems = [*problems[:_MOST_REPORTED], Diagnostic("", f"and {more:,} more of this sort")]
    if problems:
        raise FileError("", [Diagnostic(f"{where}: {p.where}" if p.where else where, p.what, p.fix) for p in problems])
    return Header(tensors, data, metadata or {})


def _metadata_problem(metadata: Any) -> str:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        return "must map names to texts"
    most = f"more than the {MOST_METADATA:,} characters that are accepted"
    return most if sum(len(k) + len(v) for k, v in metadata.items()) > MOST_METADATA else ""


def name_problem(name: str) -> str:
    """The error in a tensor's name; empty if it is valid."""
    if len(name) > MOST_NAME:
        return f"a tensor's name has at most {MOST_NAME} characters"
    if not _NAME.fullmatch(name):
        return "a tensor's name is made of printable ASCII"
    # a module's path has no empty component, so a name with `..` in it can only be meant as a path
    return "a tensor's name is not a path" if ".." in name or name.startswith(("/", "\\")) else ""


def _entry_problem(name: str, fields: Any) -> str:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        return "its entry must have exactly the fields dtype, shape and data_offsets"
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    counter = name.endswith(_COUNTERS) and dtype == _COUNTER_DTYPE
    if not counter and (not isinstance(dtype, str) or dtype not in DTYPES):  # not every JSON value can be looked up
        known = isinstance(dtype, str) and dtype in ITEM_SIZES
        return f"{'is' if known else 'has the unknown dtype'} {show(dtype)}; accepted are {', '.join(DTYPES)}"
    if not _are_counts(shape, MOST_EXTENT) or len(shape) > MOST_DIMENSIONS:
        return f"the shape {show(shape)} is not at most {MOST_DIMENSIONS} whole numbers up to {MOST_EXTENT:,}"
    if not _are_counts(offsets, 2**63) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"the offsets {show(offsets)} are not [start, stop]"
    expected, found = math.prod(shape) * ITEM_SIZES[dtype], offsets[1] - offsets[0]
    if found != expected:
        return f"{dtype} of shape {shape} takes {expected:,} bytes, its offsets give it {found:,}"
    return ""


def _are_counts(values: Any, most: int) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v <= most for v in values)


def _span_problems(tensors: dict[str, Entry], data_size: int) -> list[Diagnostic]:
    problems, end = [], 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            gap = "overlaps the tensor before it" if entry.start < end else "leaves a hole before it"
            problems.append(Diagnostic(named(name), f"begins at byte {entry.start:,} and {gap}, which ends at {end:,}"))
        end = max(end, entry.stop)
    if end > data_size:
        problems.append(Diagnostic("", f"the tensors need {end:,} bytes, the file has {data_size:,}: it is cut short"))
    elif end < data_size:
        problems.append(Diagnostic("", f"{data_size - end:,} bytes follow the last tensor"))
    return problems
