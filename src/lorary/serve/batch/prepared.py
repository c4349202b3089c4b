"""The batch as the layers need it: prepared once for each forward pass, not in each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lorary.errors import Diagnostic, LoraryError, StateError
from lorary.serve.batch.batch import Batch, Piece, Segment
from lorary.serve.batch.merged import MergedWeights
from lorary.serve.batch.ops.kernels import Kernels, kernels_for
from lorary.serve.batch.ops.table import AdapterTable


class RowsError(LoraryError):
    """A layer got rows that the batch does not describe: a fault of the engine, not of a request."""


@dataclass(frozen=True)
class Rows:
    """The work of the layers that get a certain number of rows.

    Args:
        pieces: all of it.
        short: the pieces that kernels compute, as they take them; None without any.
        long: those that matrix products compute.
        shared: those of adapters with shared projections.
        overriding: those of adapters with parameters of their own.
    """

    pieces: tuple[Piece, ...]
    short: Any
    long: tuple[Piece, ...]
    shared: tuple[Piece, ...]
    overriding: tuple[Piece, ...]


@dataclass(frozen=True)
class PreparedBatch:
    """The batch of a forward pass, with the work of every layer.

    Args:
        table: [slots, layers, FIELDS] the table of adapters as it was when the batch was prepared.
        kernels: for short segments; None without any.
        rows: number of rows -> the work.
        merged: the merged weights of the only adapters; None if layers add terms.
    """

    table: Tensor
    kernels: Kernels | None
    rows: Mapping[int, Rows]
    merged: MergedWeights | None = None

    def rows_of(self, path: str, count: int) -> Rows:
        """The work of a layer that got so many rows.

        Raises:
            RowsError: the batch says nothing of so many rows.
        """
        found = self.rows.get(count)
        if found is None:
            expected = " or ".join(str(n) for n in sorted(self.rows))
            what = f"the layer got {count} rows, and the batch has {expected}: whose they are is not known"
            raise RowsError("cannot compute the batch:", [Diagnostic(path, what)])
        return found

    @staticmethod
    def of(batch: Batch, table: AdapterTable, merged: MergedWeights | None = None) -> PreparedBatch:
        """Prepare a batch.

        Args:
            batch: the batch.
            table: has its adapters.
            merged: the merged weights, if there may be any.

        Raises:
            StateError: its adapters are not covered or have no sum, or its segments are out of order.
        """
        kernels = kernels_for(table.tensor.device)
        tensor = table.tensor  # before the slots, which a later tensor may not have
        problems: list[Diagnostic] = []
        rows = {n: _rows(n, parts, table, kernels, problems) for n, parts in batch.tables.items()}
        if problems:
            raise StateError("cannot compute the batch:", problems)
        return PreparedBatch(tensor, kernels, rows, merged.begin(batch) if merged else None)


def _rows(
    count: int, segments: Sequence[Segment], table: AdapterTable, kernels: Kernels | None, problems: list[Diagnostic]
) -> Rows:
    """The pieces of these segments; what is wrong with them is added to `problems`."""
    pieces, short, long, shared = list[Piece](), list[tuple[int, int, int, float]](), list[Piece](), list[Piece]()
    end, most = 0, kernels.short(table.width) if kernels else 0
    for start, stop, adapters in segments:
        if not (end <= start < stop <= count):
            problems.append(Diagnostic(f"rows {start} to {stop} of {count}", f"are no rows after {end}"))
        end = stop
        few = stop - start <= most
        for form, weight in adapters:
            piece, known = Piece(start, stop, form, weight), table.get(form)
            if known is None:
                problems.append(Diagnostic(f"rows {start} to {stop}", f"the adapter {form.uid!r} is not covered"))
                continue
            if not known.additive and (len(adapters) > 1 or weight != 1):
                what = f"the adapter {form.uid!r} changes more than it adds, and has no weighted sum"
                problems.append(Diagnostic(f"rows {start} to {stop}", what))
            pieces.append(piece)
            if few and known.slot is not None:
                short.append((known.slot, start, stop, weight))
            else:
                long.append(piece)
            if known.shares:
                shared.append(piece)
    overriding = tuple(piece for piece in pieces if piece.form.overrides)
    found = kernels.prepare(short, count, table.tensor.device) if kernels and short else None
    return Rows(tuple(pieces), found, tuple(long), tuple(shared), overriding)
