"""Random adapters of one layer, in a table, and what the reference computes for pieces of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lorary.serve.batch.ops.reference import rows_with_terms
from lorary.serve.batch.ops.table import AdapterTable
from lorary.serve.forms.serving_form import ServingForm, SiteForm

RANKS = (1, 3, 8, 17, 64, 0)  # 0: the adapter does not adapt the layer, or by vectors only
Piece = tuple[int, int, int, float]  # adapter, start, stop, weight

# name -> pieces of 40 rows
PIECES: dict[str, tuple[Piece, ...]] = {
    "one row each": tuple((i % 6, i, i + 1, 1.0) for i in range(40)),
    "one adapter": ((3, 0, 40, 1.0),),
    "sorted": ((0, 0, 5, 1.0), (1, 5, 6, 1.0), (2, 6, 10, 1.0), (3, 13, 22, 1.0), (4, 25, 38, 1.0)),
    "twice": ((4, 3, 5, 1.0), (1, 5, 9, 1.0), (4, 30, 34, 1.0)),
    "sums": ((0, 0, 3, 0.5), (2, 0, 3, -2.0), (3, 4, 9, 1.5), (4, 4, 9, 1.0), (1, 4, 9, 0.1), (2, 9, 10, 1.0)),
    "none": (),
}
SIZES = ((1, 1), (7, 5), (64, 64), (45, 131), (200, 96))  # in and out


def adapters(inp: int, out: int, dtype: torch.dtype, device: str, *, transposed: bool) -> list[ServingForm]:
    """One of each rank: with a gain and a shift, with VeRA's vectors, or plain; and one without this layer."""
    forms = []
    for number, rank in enumerate(RANKS):

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=device).to(dtype)

        B = random(rank, out).T if transposed else random(out, rank)
        gain, shift = (random(out).float(), random(out)) if number % 3 == 1 else (None, None)
        d, b = (random(rank), random(out)) if number % 3 == 2 else (None, None)
        site = SiteForm(random(rank, inp), B, gain, shift, d, b) if rank else SiteForm(gain=random(out).float())
        forms.append(ServingForm(f"rank {rank}", {"layer": site}))
    return forms


def table_of(forms: Sequence[ServingForm], dtype: torch.dtype, device: str) -> AdapterTable:
    """The table of these adapters, with another layer before theirs."""
    table = AdapterTable({"another": dtype, "layer": dtype}, torch.device(device))
    for form in forms:
        table.add(form)
    return table


def slots(table: AdapterTable, forms: Sequence[ServingForm], pieces: Sequence[Piece]) -> Iterator[Piece]:
    """The pieces with slots instead of adapters."""
    for index, *rest in pieces:
        slot = table.slot(forms[index])
        assert slot is not None
        yield (slot, *rest)  # type: ignore[misc]


def expected(forms: Sequence[ServingForm], pieces: Sequence[Piece], x: Tensor, y: Tensor) -> Tensor:
    """The reference's y, of fp32 sums that are rounded once."""
    wide = y.float().clone()
    for index, start, stop, weight in pieces:
        site = forms[index].sites["layer"]
        wide[start:stop] = rows_with_terms(wide[start:stop], x[start:stop], site, weight)
    return wide.to(y.dtype)


def close(found: Tensor, wanted: Tensor) -> None:
    """Equal up to the order of sums, or to a rounding of the type and of each term of a sum."""
    tolerance = 1e-5 if found.dtype is torch.float32 else 2e-2
    scale = max(1.0, wanted.float().abs().max().item() if wanted.numel() else 0.0)
    torch.testing.assert_close(found.float(), wanted.float(), rtol=tolerance, atol=tolerance * scale)
