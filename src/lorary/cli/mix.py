"""lorary mix: one adapter from several."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lorary.adapters.adapter import Adapter
    from lorary.adapters.label_names import LabelNames

_SHOWN = 12  # layers in the table of errors


def mix(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER...", help="Adapter folders, run folders that hold one, or Hub ids.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the mixed adapter; must be empty.")],
    weights: Annotated[
        str | None, typer.Option("--weights", "-w", help="Comma-separated, one for each adapter; 1 by default.")
    ] = None,
    how: Annotated[
        str, typer.Option("--how", help="sum, slerp (both exact), ties, dare, dare-ties, magnitude.")
    ] = "sum",
    rank: Annotated[
        int | None, typer.Option("--rank", help="The most directions at a layer; else the sum of the ranks.")
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option("--energy", help="Instead, the share of the squared norm of each update to keep: 0.99."),
    ] = None,
    density: Annotated[
        float | None, typer.Option("--density", help="Share of elements that ties, dare, magnitude keep; else 0.2.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Base model; needed by --approximate and by layers trained in full.")
    ] = None,
    approximate: Annotated[
        bool, typer.Option("--approximate", help="Mix DoRA and GLoRA too: their closest updates of low rank.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Random seed of dare.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Mix adapters of different bases, if they fit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with weights, ranks and errors.")] = False,
) -> None:
    """Mix adapters of any methods into one: a weighted sum, exact, or TIES, DARE and others.

    Negative weights subtract: --weights 1,-1 takes the second adapter's task out of the first. Where the result is an
    approximation, its error is shown layer by layer and kept in lorary.json.
    """
    from lorary.adapters import save_adapter
    from lorary.adapters.card import write_card
    from lorary.adapters.compose.mix import mix as mixed
    from lorary.adapters.label_names import write_label_names
    from lorary.adapters.resolve import find_adapter, read_adapter
    from lorary.cli._progress import progress_bar
    from lorary.files.atomic import atomic_directory

    numbers = _weights(adapters, weights)
    folders = {name: find_adapter(name, "mix") for name in adapters}
    values = {name: read_adapter(folder, base) for name, folder in folders.items()}
    labels = _labels(folders)
    with atomic_directory(out) as written, progress_bar() as update:
        model = _base(base, folders, values)
        result = mixed(
            values,
            numbers,
            how=how,
            rank=rank,
            energy=energy,
            density=density,
            base=model,
            approximate=approximate,
            seed=seed,
            force=force,
            progress=lambda done, total: update(completed=done, total=total, description="layers"),
        )
        save_adapter(result, written, model=model)
        if labels is not None:
            write_label_names(written, *labels)
        write_card(written, result, name=out.name)
    _report(result, out, as_json)


def _weights(adapters: list[str], text: str | None) -> list[float] | None:
    """The numbers of --weights.

    Raises:
        ConfigError: they are not numbers, or an adapter is named twice.
    """
    from lorary.errors import ConfigError, Diagnostic

    problems = [
        Diagnostic(name, f"is named {adapters.count(name)} times", "name it once, with the sum of its weights")
        for name in dict.fromkeys(adapters)
        if adapters.count(name) > 1
    ]
    numbers = []
    for part in [] if text is None else text.split(","):
        try:
            numbers.append(float(part))
        except ValueError:
            problems.append(Diagnostic("--weights", f"{part!r} is not a number", "such as --weights 0.7,0.3"))
    if problems:
        raise ConfigError("cannot mix these adapters:", problems)
    return None if text is None else numbers


def _base(name: str | None, folders: dict[str, Path], adapters: dict[str, Adapter]) -> PreTrainedModel | None:
    """The base of --base, quantised as the adapters had it."""
    if name is None:
        return None
    from lorary.adapters.resolve import find_base, load_base

    holder = max(adapters, key=lambda each: len(adapters[each].full))  # of a new head, if one has it
    alike = len({a.method.storage for a in adapters.values()}) == 1
    return load_base(find_base(folders[holder], name), folders[holder], adapters[holder], quantized=alike)


def _labels(folders: dict[str, Path]) -> LabelNames | None:
    """The names of the labels of classifiers, which must agree.

    Raises:
        FileError: they differ.
    """
    from lorary.adapters.label_names import read_label_names
    from lorary.errors import Diagnostic, FileError

    found = {name: labels for name, folder in folders.items() if (labels := read_label_names(folder)) is not None}
    if len(set(found.values())) > 1:
        problems = [Diagnostic(name, f"its labels are {', '.join(labels.names)}") for name, labels in found.items()]
        raise FileError("cannot mix classifiers of different labels:", problems)
    return next(iter(found.values()), None)


def _report(adapter: Adapter, out: Path, as_json: bool) -> None:
    """The notes and the errors by layer on standard error; the folder, or JSON, on standard output."""
    from lorary.cli._notes import print_notes
    from lorary.cli._table import print_table
    from lorary.model.rank_pruning import directions_of
    from lorary.model.text_table import first_rows

    assert adapter.provenance is not None
    settings = adapter.provenance.settings
    ranks = {s.site.name: directions_of(s) for s in adapter.sites}
    print_notes(adapter.notes)
    if as_json:
        print(json.dumps(adapter.provenance.record() | {"out": str(out), "ranks": ranks}, indent=2))
        return
    errors = dict(sorted(settings.get("errors", {}).items(), key=lambda each: -each[1]))
    rows = first_rows([(name, str(ranks[name]), f"{error:.2%}") for name, error in errors.items()], _SHOWN)
    if errors:
        rows.append(("together", str(max(ranks.values())), f"{settings['error']:.2%}"))
        print_table("the layers with the largest errors", ("layer", "rank", "error / ||dW||"), rows, stderr=True)
    else:
        print(f"exact: rank {max(ranks.values(), default=0)}", file=sys.stderr)
    print(out)
