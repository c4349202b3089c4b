"""Safetensors files: opened and checked once and read from the same descriptor; and written."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lorary.errors import Diagnostic, FileError
from lorary.files.safe_open import open_inside, read_exactly
from lorary.files.safetensors_header import Entry, Header, read_header

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MOST_BYTES = 2**40  # the header and the memory set the real limits; this one only keeps numbers sane


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
        """The tensors of these names, each in its own memory and dtype.

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
        """The SHA-256 of the whole file, from the same descriptor as the tensors."""
        self._file.seek(0)
        return hashlib.file_digest(cast(Any, self._file), "sha256").hexdigest()

    def _tensor(self, entry: Entry) -> Tensor:
        tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        if tensor.numel():
            self._file.seek(self.header.data + entry.start)
            raw = tensor.reshape(-1).view(torch.uint8).numpy()
            read_exactly(self._file, raw.data, self.name)
        return tensor


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
