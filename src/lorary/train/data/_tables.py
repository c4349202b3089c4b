"""Rows from parquet files and Hugging Face data sets: only the columns that a row format can use are read.

What lies in the other columns, be it pictures or dates that Python does not know, costs nothing and does no harm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lorary.errors import DataError
from lorary.train.data._records import BadRows, Record, unreadable

NAMED = 100  # unread columns that a row still names, for messages


def parquet(path: Path, bad: BadRows, wanted: frozenset[str] | None) -> Iterator[Record]:
    """The rows of a parquet file.

    Raises:
        DataError: it is not a parquet file, or two of its columns have one name.
    """
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            kept = [name for name in names if wanted is None or name in wanted]
            if len(set(kept)) < len(kept):
                twice = next(name for i, name in enumerate(kept) if name in kept[:i])
                raise unreadable(path, f"two columns are named `{twice}`", where=path.name)
            unread = unread_columns(names, kept)
            if not kept:
                yield from (Record(unread, f"{path.name}: row {i + 1}") for i in range(file.metadata.num_rows))
                return
            for batch in file.iter_batches(batch_size=1000, columns=kept):
                for values in _rows(batch):
                    number += 1
                    where = f"{path.name}: row {number}"
                    if isinstance(values, str):
                        bad.add(where, values)
                    else:
                        yield Record(unread | values, where)
    except pyarrow.ArrowException as error:
        raise unreadable(path, "not a parquet file, or a damaged one", where=path.name) from error


def _rows(batch: Any) -> Iterator[dict[str, Any] | str]:
    """The rows of a batch; in place of one that is no Python value, the reason."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):  # a UnicodeDecodeError is a ValueError
        rows = [_row(batch, i) for i in range(batch.num_rows)]
    yield from rows


def _row(batch: Any, i: int) -> dict[str, Any] | str:
    values = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            values[name] = column[i].as_py()
        except UnicodeDecodeError as error:
            return f"`{name}`: byte 0x{error.object[error.start]:02x} is not UTF-8"
        except (ValueError, OverflowError):
            return f"`{name}` holds a {column.type} that Python cannot represent"
    return values


def dataset(rows: Any, name: str, wanted: frozenset[str] | None, limit: int | None = None) -> list[Record]:
    """The rows of a Hugging Face data set.

    Raises:
        DataError: it has none.
    """
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    if not len(rows):
        raise DataError(f"{name} has no rows")
    return list(dataset_rows(rows, name, wanted))


def dataset_rows(rows: Any, name: str, wanted: frozenset[str] | None) -> Iterator[Record]:
    """The rows of a Hugging Face data set or stream, one after the other."""
    names = rows.column_names
    if names is None:  # a stream that has not said its columns
        yield from (Record(dict(row), f"{name}: row {i}") for i, row in enumerate(rows, 1))
        return
    kept = [column for column in names if wanted is None or column in wanted]
    unread = unread_columns(names, kept)
    chosen = rows.select_columns(kept) if kept else rows
    for i, row in enumerate(chosen, 1):
        yield Record(unread | dict(row) if kept else unread, f"{name}: row {i}")


def unread_columns(names: Sequence[str], kept: Sequence[str]) -> dict[str, Any]:
    """The other columns' names, each with nothing: they stay known to messages."""
    known = frozenset(kept)
    return dict.fromkeys([name for name in names if name not in known][:NAMED])
