"""lorary compress: an adapter at fewer directions."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorary.cli._options import Base

if TYPE_CHECKING:
    from lorary.adapters.adapter import Adapter
    from lorary.adapters.compose.compression import Compression


def compress(
    adapter: Annotated[str, typer.Argument(help="Adapter folder, run folder that holds one, or Hub id.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the compressed adapter; must be empty.")],
    rank: Annotated[int | None, typer.Option("--rank", help="The most directions at a layer.")] = None,
    energy: Annotated[
        float | None, typer.Option("--energy", help="The share of the squared norm of the update to keep: 0.99.")
    ] = None,
    kl: Annotated[
        float | None, typer.Option("--kl", help="The largest divergence of the outputs, in nats per token: 0.01.")
    ] = None,
    base: Base = None,
    rows: Annotated[
        int, typer.Option("--rows", min=2, max=100_000, help="For --kl: how many rows, half of them to check.")
    ] = 16,
    data: Annotated[
        str | None, typer.Option("--data", help="For --kl: rows; else the held-out rows of the run, or built-in.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, with the rank and error of every layer.")
    ] = False,
) -> None:
    """Write a smaller adapter: a plain LoRA with the strongest directions of an adapter of any method.

    Exactly one of --rank, --energy and --kl. --energy and --kl keep the largest singular values of all layers together;
    --kl finds the smallest adapter whose outputs stay within the bound on half of the rows, and measures it on the
    others. The error is shown, and saved in lorary.json.
    """
    from lorary.adapters import save_adapter
    from lorary.adapters.card import write_card
    from lorary.adapters.resolve import find_adapter, read_adapter
    from lorary.files.atomic import atomic_directory

    folder = find_adapter(adapter, "compress")
    value = read_adapter(folder, base)
    with atomic_directory(out) as written:
        if kl is None:
            from lorary.analysis.compress import compress as compressed

            found = compressed(value, rank=rank, energy=energy)
        else:
            found = _within(Path(adapter), folder, value, base, rows, data, {"rank": rank, "energy": energy, "kl": kl})
        result = _named(found.adapter, adapter)
        save_adapter(result, written)
        write_card(written, result, name=out.name)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        print(found, file=sys.stderr)
    print(out, file=sys.stderr if as_json else sys.stdout)


def _named(adapter: Adapter, parent: str) -> Adapter:
    """The adapter with the name of its parent in its provenance."""
    import dataclasses

    from lorary.model.fingerprint import base_name

    record = adapter.provenance
    assert record is not None
    (source,) = record.parents
    parents = (dataclasses.replace(source, name=base_name(parent)),)
    return dataclasses.replace(adapter, provenance=dataclasses.replace(record, parents=parents))


def _within(
    path: Path, folder: Path, value: Adapter, base: str | None, most: int, data: str | None, cuts: dict[str, Any]
) -> Compression:
    """The compression whose divergence stays below a bound on the rows of the command line."""
    from lorary.adapters.resolve import find_base, load_base
    from lorary.analysis.compress import compress as compressed
    from lorary.cli._comparison_rows import comparison_rows
    from lorary.cli._model import tokenizer_or_none
    from lorary.cli._notes import print_notes
    from lorary.cli._progress import progress_bar
    from lorary.model.loading.from_pretrained import load_config

    section = find_base(folder, base)
    compared = comparison_rows(path, tokenizer_or_none(section, folder), load_config(section), most, data)
    model = load_base(section, folder, value)
    with progress_bar() as update:

        def progress(count: int, divergence: float) -> None:
            update(description=f"{count:,} directions: KL {divergence:.3g}")

        found = compressed(value, **cuts, model=model, rows=compared.ids, progress=progress)
    print_notes([*compared.notes, f"compared on {len(compared.ids):,} {compared.source}"])
    return found
