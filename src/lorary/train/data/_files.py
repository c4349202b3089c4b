"""Rows from jsonl, json, csv, tsv, parquet, txt and md files, each with its line number, read one after the other."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from lorary.errors import DataError
from lorary.files import strict_json
from lorary.train.data import _tables
from lorary.train.data._records import BadRows, Record, unreadable

MAX_LINE = 16 * 2**20  # bytes of one row; a longer line means a wrong file
COMPRESSED = (".gz", ".bz2", ".zst")
DOCUMENTS = (".txt", ".md")


def read_file(path: Path, wanted: frozenset[str] | None, limit: int | None = None) -> list[Record]:
    """The rows of a file.

    Args:
        path: the file.
        wanted: the columns that a table must be read for; None: all.
        limit: only the first so many rows.

    Raises:
        DataError: the file is empty, is not of the kind that its name says, or has rows that cannot be read; the first
            five of these are named with their lines, the others counted.
    """
    bad = BadRows()
    records = list(islice(iterate(path, bad, wanted), limit))
    bad.refuse(path.name, len(records) + bad.count)
    if not records:
        raise DataError(f"{path} has no rows")
    return records


def iterate(path: Path, bad: BadRows, wanted: frozenset[str] | None) -> Iterator[Record]:
    """The rows of a file, one after the other; those that cannot be read go to `bad`.

    Raises:
        DataError: the file cannot be read at all.
    """
    reader = READERS.get(suffix(path))
    if reader is None and suffix(path) != ".parquet":
        known = ", ".join(sorted([*READERS, ".parquet"]))
        name = "".join(path.suffixes[-2:]) if path.suffix.lower() in COMPRESSED else path.suffix
        what = f"unknown file type `{name}`" if name else "its name does not end in a file type"
        raise unreadable(path, what, f"known: {known}, and these as {', '.join(COMPRESSED)}")
    if not path.is_file():
        raise unreadable(path, "it is not a regular file")
    try:
        yield from reader(path, bad) if reader is not None else _tables.parquet(path, bad, wanted)
    except OSError as error:
        if error.strerror is None and path.suffix.lower() in COMPRESSED:
            kind = path.suffix.lower().removeprefix(".")
            raise unreadable(path, f"not a {kind} file, or a damaged one ({error})", where=path.name) from error
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None


def suffix(path: Path) -> str:
    """The suffix that names the kind of a file, in lower case, without that of a compression."""
    inner = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return inner.suffix.lower()


def is_data(path: Path) -> bool:
    """Whether the name is one of a file of rows or of a document."""
    return suffix(path) in (*READERS, ".parquet")


def _jsonl(path: Path, bad: BadRows) -> Iterator[Record]:
    for where, line in _lines(path, bad):
        if line.strip():
            try:
                yield Record(_value(line.rstrip("\r\n")), where)
            except ValueError as error:
                bad.add(where, str(error))


def _json(path: Path, bad: BadRows) -> Iterator[Record]:
    text = _text(path)
    if not text.strip():
        return
    try:
        rows = _value(text)
    except ValueError as error:
        if text.lstrip().startswith("["):
            raise unreadable(path, str(error), where=path.name) from None
        yield from _jsonl(path, bad)  # JSON lines in a .json file are common
        return
    for i, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        yield Record(row, f"{path.name}: row {i}")


def _document(path: Path, bad: BadRows) -> Iterator[Record]:
    """One document; its line ends belong to the file, and become those of Python."""
    yield Record({"text": _text(path).replace("\r\n", "\n")}, path.name)


def _csv(path: Path, bad: BadRows) -> Iterator[Record]:
    before = csv.field_size_limit(MAX_LINE)
    try:
        delimiter = "\t" if suffix(path) == ".tsv" else ","
        lines = (line for _, line in _lines(path, bad, in_place_of_bad="\n"))
        yield from _table(path.name, csv.reader(lines, delimiter=delimiter, strict=True), bad)
    finally:
        csv.field_size_limit(before)


def _table(name: str, rows: Any, bad: BadRows) -> Iterator[Record]:
    header: list[str] | None = None
    line = 1
    try:
        for row in rows:
            where, line = f"{name}:{line}", rows.line_num + 1
            if header is None and not bad.count:
                header = row
                _check_header(name, where, header)
            elif header is not None and row and len(row) != len(header):
                fields = f"{len(row)} field{'s' if len(row) > 1 else ''}"
                bad.add(where, f"{fields}, but the header has {len(header)}")
            elif header is not None and row:
                yield Record(dict(zip(header, row, strict=True)), where)
    except csv.Error as error:
        alone = "new-line character" in str(error)  # Python's hint is for programmers
        what, fix = (
            ("a carriage return ends a line", "save it with \\n line ends") if alone else (f"not CSV: {error}", "")
        )
        bad.add(f"{name}:{line}", what, fix)


def _check_header(name: str, where: str, header: list[str]) -> None:
    if "" in header:
        raise unreadable(name, "a column has no name", where=where)
    seen: set[str] = set()
    for column in header:
        if column in seen:
            raise unreadable(name, f"two columns are named `{column}`", where=where)
        seen.add(column)


READERS: dict[str, Callable[[Path, BadRows], Iterator[Record]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    **dict.fromkeys(DOCUMENTS, _document),
}


# --- text -------------------------------------------------------------------------------------------------------


def _open(path: Path) -> Any:
    """The bytes of a file, decompressed."""
    if path.suffix.lower() not in COMPRESSED:
        return path.open("rb")
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="detect"))


def _skip_mark(path: Path, file: Any) -> None:
    """Go past a UTF-8 byte order mark.

    Raises:
        DataError: the file is UTF-16.
    """
    head = file.peek(3)[:3]
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise unreadable(path, "is UTF-16", "save it as UTF-8", path.name)
    if head == b"\xef\xbb\xbf":
        file.read(3)


def _text(path: Path) -> str:
    """The text of a file that is read whole.

    Raises:
        DataError: it is not UTF-8, or holds a NUL byte.
    """
    with _open(path) as file:
        _skip_mark(path, file)
        data: bytes = file.read()
    if b"\0" in data:
        line = data.count(b"\n", 0, data.index(b"\0")) + 1
        raise unreadable(path, "contains a NUL byte", where=f"{path.name}:{line}")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        what = f"byte 0x{data[error.start]:02x} is not UTF-8"
        raise unreadable(path, what, "save it as UTF-8", f"{path.name}:{line}") from None


def _lines(path: Path, bad: BadRows, in_place_of_bad: str = "") -> Iterator[tuple[str, str]]:
    """(`file:number`, text with its line end) of every line, without a UTF-8 byte order mark.

    Args:
        path: the file.
        bad: takes the lines that cannot be read.
        in_place_of_bad: what is yielded for such a line, if anything.
    """
    with _open(path) as file:
        _skip_mark(path, file)
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
            where, what, fix = f"{path.name}:{number}", "", ""
            if len(line) > MAX_LINE:
                return bad.add(where, f"a line of more than {MAX_LINE:,} bytes", "write one row per line")
            if b"\0" in line:
                what = "contains a NUL byte"
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                what, fix = f"byte 0x{line[error.start]:02x} is not UTF-8", "save it as UTF-8"
            if what:
                bad.add(where, what, fix)
                text = in_place_of_bad
            if text:
                yield where, text


def _value(text: str) -> Any:
    """The value of strict JSON; ids in data sets may have many digits."""
    return strict_json.loads(text, most_digits=300)
