"""Rows from jsonl, json, csv, tsv and parquet files, each with its line number."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lorary.errors import DataError
from lorary.files import strict_json
from lorary.train.data._records import BadRows, Record, unreadable

MAX_LINE = 16 * 2**20  # bytes of one row; a longer line means a wrong file


def read_file(path: Path) -> list[Record]:
    """Every row of a file.

    Raises:
        DataError: the file is empty, is not of the kind that its name says, or has rows that cannot be read; the first
            five of these are named with their lines, the others counted.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise unreadable(path, f"unknown file type `{path.suffix}`", f"known: {', '.join(sorted(READERS))}")
    if not path.is_file():
        raise unreadable(path, "it is not a regular file")
    bad = BadRows()
    try:
        records = list(reader(path, bad))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    bad.refuse(path.name, len(records) + bad.count)
    if not records:
        raise DataError(f"{path} has no rows")
    return records


def _jsonl(path: Path, bad: BadRows) -> Iterator[Record]:
    for where, line in _lines(path, bad):
        if line.strip():
            try:
                yield Record(_value(line.rstrip("\r\n")), where)
            except ValueError as error:
                bad.add(where, str(error))


def _json(path: Path, bad: BadRows) -> Iterator[Record]:
    text = _text(path, bad)
    if not text:
        return
    try:
        rows = _value(text)
    except ValueError as error:
        if text.lstrip().startswith("["):
            raise unreadable(path, str(error), where=path.name) from None
        yield from _jsonl(path, bad)  # JSON lines in a .json file are common
        return
    yield from _numbered(path, rows if isinstance(rows, list) else [rows])


def _csv(path: Path, bad: BadRows) -> Iterator[Record]:
    before = csv.field_size_limit(MAX_LINE)
    try:
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        rows = csv.reader(io.StringIO(_text(path, bad), newline=""), delimiter=delimiter, strict=True)
        yield from _table(path.name, rows, bad)
    finally:
        csv.field_size_limit(before)


def _table(name: str, rows: Any, bad: BadRows) -> Iterator[Record]:
    header: list[str] | None = None
    line = 1
    try:
        for row in rows:
            where, line = f"{name}:{line}", rows.line_num + 1
            if header is None:
                header = row
                twice = sorted({column for column in row if row.count(column) > 1})
                if twice or "" in row:
                    what = f"two columns are named `{twice[0]}`" if twice and twice[0] else "a column has no name"
                    raise unreadable(name, what, where=where)
            elif row and len(row) != len(header):
                fields = f"{len(row)} field{'s' if len(row) > 1 else ''}"
                bad.add(where, f"{fields}, but the header has {len(header)}")
            elif row:
                yield Record(dict(zip(header, row, strict=True)), where)
    except csv.Error as error:
        bad.add(f"{name}:{line}", f"not CSV: {error}")


def _parquet(path: Path, bad: BadRows) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise unreadable(path, "not a parquet file, or a damaged one", where=path.name) from error
    yield from _numbered(path, rows)


READERS: dict[str, Callable[[Path, BadRows], Iterator[Record]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}


def _numbered(path: Path, rows: list[Any]) -> Iterator[Record]:
    return (Record(row, f"{path.name}: row {i}") for i, row in enumerate(rows, 1))


def _text(path: Path, bad: BadRows) -> str:
    """The text of a file; empty if it is blank or has bad lines."""
    text = "".join(line for _, line in _lines(path, bad))
    return text if text.strip() and not bad.count else ""


def _lines(path: Path, bad: BadRows) -> Iterator[tuple[str, str]]:
    """(`file:number`, text with its line end) of every line, without a UTF-8 byte order mark."""
    with path.open("rb") as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise unreadable(path, "is UTF-16", "save it as UTF-8", path.name)
        file.seek(0)
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
            where = f"{path.name}:{number}"
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if len(line) > MAX_LINE:
                return bad.add(where, f"a line of more than {MAX_LINE:,} bytes", "write one row per line")
            if b"\0" in line:
                bad.add(where, "contains a NUL byte")
                continue
            try:
                yield where, line.decode("utf-8")
            except UnicodeDecodeError as error:
                bad.add(where, f"byte 0x{line[error.start]:02x} is not UTF-8", "save it as UTF-8")


def _value(text: str) -> Any:
    """The value of strict JSON; ids in data sets may have many digits."""
    return strict_json.loads(text, most_digits=300)
