"""Rows from jsonl, json, csv, tsv and parquet files, each with the line that it stands on."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lorary.errors import DataError, Diagnostic
from lorary.files import strict_json
from lorary.train.data.records import BadRows, Record

MAX_LINE = 16 * 2**20  # bytes of one row; a longer line is no training example but a wrong file


def read_file(path: Path) -> list[Record]:
    """Every row of the file `path`.

    Raises:
        DataError: the file is empty, is not what its name says, or holds rows that cannot be read; the first five
            of these are named with their lines, the others counted.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(sorted(READERS))
        raise DataError(
            f"cannot read {path}:", [Diagnostic("", f"`{path.suffix}` is no known kind of file", f"known: {known}")]
        )
    if not path.is_file():
        raise DataError(f"cannot read {path}:", [Diagnostic("", "it is not a regular file")])
    offenders = BadRows()
    try:
        records = list(reader(path, offenders))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    offenders.refuse(path.name, len(records) + offenders.count)
    if not records:
        raise DataError(f"{path} holds no rows")
    return records


def _jsonl(path: Path, offenders: BadRows) -> Iterator[Record]:
    for number, line in _lines(path, offenders):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            yield Record(_value(line), where)
        except ValueError as error:
            offenders.add(where, str(error))


def _json(path: Path, offenders: BadRows) -> Iterator[Record]:
    text = "".join(line for _, line in _lines(path, offenders))
    if offenders.count or not text.strip():
        return
    try:
        rows = _value(text)
    except ValueError as error:
        if text.lstrip().startswith("["):
            raise _unreadable(path, str(error)) from None
        yield from _jsonl(path, offenders)  # JSON lines under the name of JSON are common
        return
    rows = rows if isinstance(rows, list) else [rows]
    yield from (Record(row, f"{path.name}: row {i}") for i, row in enumerate(rows, 1))


def _csv(path: Path, offenders: BadRows) -> Iterator[Record]:
    text = "".join(line for _, line in _lines(path, offenders, keep_ends=True))
    if offenders.count or not text.strip():
        return
    before = csv.field_size_limit(MAX_LINE)
    try:
        rows = csv.reader(
            io.StringIO(text, newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True
        )
        yield from _table(path.name, rows, offenders)
    finally:
        csv.field_size_limit(before)


def _table(name: str, rows: Any, offenders: BadRows) -> Iterator[Record]:
    header: list[str] | None = None
    line = 1
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            return offenders.add(f"{name}:{line}", f"is no CSV: {error}")
        where, line = f"{name}:{line}", rows.line_num + 1
        if header is None:
            header = row
            twice = sorted({column for column in row if row.count(column) > 1})
            if twice or "" in row:
                what = f"two columns are named `{twice[0]}`" if twice and twice[0] else "a column has no name"
                raise DataError(f"cannot read {name}:", [Diagnostic(where, what)])
        elif row and len(row) != len(header):
            fields = f"{len(row)} field{'s' if len(row) > 1 else ''}"
            offenders.add(where, f"{fields}, but the header has {len(header)}")
        elif row:
            yield Record(dict(zip(header, row, strict=True)), where)


def _parquet(path: Path, offenders: BadRows) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise _unreadable(path, "is no parquet file, or a damaged one") from error
    yield from (Record(row, f"{path.name}: row {i}") for i, row in enumerate(rows, 1))


READERS: dict[str, Callable[[Path, BadRows], Iterator[Record]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}


def _unreadable(path: Path, what: str, fix: str = "") -> DataError:
    return DataError(f"cannot read {path}:", [Diagnostic(path.name, what, fix)])


def _lines(path: Path, offenders: BadRows, keep_ends: bool = False) -> Iterator[tuple[int, str]]:
    """The text lines of a file, counted from 1; a UTF-8 byte order mark is passed over."""
    with path.open("rb") as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise _unreadable(path, "is UTF-16", "save it as UTF-8")
        file.seek(0)
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
            if len(line) > MAX_LINE:
                what = f"a line of more than {MAX_LINE:,} bytes"
                return offenders.add(f"{path.name}:{number}", what, "one row stands on one line")
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if b"\0" in line:
                offenders.add(f"{path.name}:{number}", "contains a NUL byte")
                continue
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                offenders.add(
                    f"{path.name}:{number}", f"byte 0x{line[error.start]:02x} is not UTF-8", "save it as UTF-8"
                )
                continue
            yield number, text if keep_ends else text.rstrip("\r\n") + ("\n" if path.suffix == ".json" else "")


def _value(text: str) -> Any:
    """The value of strict JSON; ids in data sets may have many digits."""
    return strict_json.loads(text, most_digits=300)
