"""lorary check: what other programs do with an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import nn

    from lorary.adapters.readers.reader import Verdict


def check(
    adapter: Annotated[str, typer.Argument(help="Adapter folder, run folder that holds one, or Hub id.")],
    readers: Annotated[
        list[str] | None,
        typer.Option("--for", help="peft, transformers, vllm, sglang, llama.cpp, mlx; may be repeated; all if absent."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="Base model, to compare the sites; else the one it names, if that is local."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what other programs do with an adapter: accept it, reject it, or silently miscompute it.

    Their reading rules are applied to the folder; nothing is started, and no weights are read. Exits with 0 if all
    accept it, and with 1 otherwise. lorary check out --for vllm --for sglang
    """
    from lorary.adapters.readers.check import check as checked
    from lorary.adapters.resolve import find_adapter
    from lorary.cli._notes import print_notes

    folder = find_adapter(adapter, "check")
    names = [name.strip() for entry in readers or () for name in entry.split(",") if name.strip()]
    model = _base(folder, base)
    verdicts = checked(folder, *names, model=model)
    if as_json:
        print(json.dumps([verdict.to_dict() for verdict in verdicts], indent=2))
    else:
        _show(adapter, verdicts)
        if model is None:
            print_notes(["without --base the sites are not compared with the base's modules"])
    if not all(verdict.accepted for verdict in verdicts):
        raise typer.Exit(1)


def _base(folder: Path, base: str | None) -> nn.Module | None:
    """The base on the meta device: the one given, or the one that the adapter names if it is on this machine."""
    from lorary.adapters.readers.folder import base_of
    from lorary.model.loading.from_pretrained import empty_model, load_config
    from lorary.model.loading.model_kind import own_class
    from lorary.model.loading.source import ModelSection

    name = base or base_of(folder)
    if not base and not (name.startswith("builtin:") or (name and (Path(name) / "config.json").is_file())):
        return None
    section = ModelSection.of(name)
    model: nn.Module = empty_model(section, own_class(load_config(section)))
    return model


def _show(adapter: str, verdicts: tuple[Verdict, ...]) -> None:
    from rich.console import Console

    from lorary.cli import printable
    from lorary.cli._table import rich_table

    rows = [(v.reader, str(v.outcome), v.release) for v in verdicts]
    Console().print(rich_table(printable(adapter), rows))
    for verdict in verdicts:
        for reason in verdict.reasons:
            print(f"\n{verdict.reader}: {printable(str(reason))}")
