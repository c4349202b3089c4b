"""`lorary inspect adapter`: load the models, measure, report."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lorary
from lorary.adapters.adapter import Adapter
from lorary.adapters.resolve import base_class, find_adapter, find_base, find_model, load_base, read_adapter
from lorary.analysis.inspection.adapter import inspect_adapter
from lorary.analysis.inspection.figures import HEAD, AdapterInspection
from lorary.analysis.inspection.page import inspection_page
from lorary.cli._inspect.report import FILES, json_text, report_folder, write_report
from lorary.cli._notes import print_notes
from lorary.cli._out_folder import folder_problems
from lorary.cli._progress import progress_bar
from lorary.cli._table import print_table
from lorary.errors import ConfigError, Diagnostic
from lorary.model.loading.from_pretrained import load_config, load_model
from lorary.model.loading.quiet import quiet_progress_bars
from lorary.model.loading.source import ModelSection


@dataclass(frozen=True)
class Request:
    """The options of the command line.

    Args:
        adapter: a folder or Hub id.
        base: the base to compare with; None for the spectra alone.
        tuned: another model that was tuned from this base.
        top: singular vectors checked for intruders.
        epsilon: the cosine below which one is an intruder.
    """

    adapter: str
    base: str | None
    tuned: str | None
    top: int
    epsilon: float


def run(request: Request, out: Path | None, *, as_json: bool) -> None:
    """Measure and report.

    Raises:
        ConfigError: every invalid option.
        LoraryError: a model or the adapter cannot be loaded, or does not fit.
    """
    if problems := _problems(request, out):
        raise ConfigError("cannot inspect this adapter:", problems)
    folder = find_adapter(request.adapter, "inspect")
    adapter = read_adapter(folder, request.base)
    with report_folder(out) as target:
        found = _measure(request, folder, adapter)
        if target is not None:
            page = inspection_page(found, request.adapter, request.base or "", request.tuned or "")
            write_report(target, _record(request, found), page)
    _show(request, found, as_json=as_json)


def _problems(request: Request, out: Path | None) -> list[Diagnostic]:
    problems = folder_problems(out, FILES)
    if not 0 < request.epsilon <= 1 or math.isnan(request.epsilon):
        problems.append(Diagnostic(f"--epsilon {request.epsilon:g}", "is not a cosine above 0 and at most 1"))
    if request.tuned is not None and request.base is None:
        what = "cannot be compared without the base that it was tuned from"
        problems.append(Diagnostic(f"--tuned {request.tuned}", what, "give --base MODEL"))
    return problems


def _measure(request: Request, folder: Path, adapter: Adapter) -> AdapterInspection:
    options: dict[str, Any] = {"top": request.top, "epsilon": request.epsilon}
    if request.base is not None:
        section = find_base(folder, request.base)
        with quiet_progress_bars():
            options["base"] = _with_adapter(section, folder, adapter)
            options["dtype"] = _saved_dtype(section)
            if request.tuned is not None:
                options["tuned"] = _tuned(request.tuned, folder, adapter)
    with progress_bar(len(adapter.sites) + len(adapter.full)) as update:
        return inspect_adapter(adapter, **options, progress=_steps(update))


def _steps(update: Callable[..., Any]) -> Callable[[str], None]:
    """A callback that moves a progress bar on when the next weight begins."""
    begun: list[str] = []

    def begin(name: str) -> None:
        update(advance=1 if begun else 0, description=name)
        begun.append(name)

    return begin


def _with_adapter(section: ModelSection, folder: Path, adapter: Adapter) -> Any:
    """The base with the adapter on it, which checks that the two belong together."""
    return lorary.load(load_base(section, folder, adapter), folder)


def _tuned(name: str, folder: Path, adapter: Adapter) -> Any:
    """The other tuned model: a whole checkpoint, or an adapter or a run on its own base."""
    own, section = find_model(name)
    if own is not None:
        return _with_adapter(section, own, read_adapter(own))
    return load_model(section, model_class=base_class(section, folder, adapter))


def _saved_dtype(section: ModelSection) -> torch.dtype | None:
    """The dtype of the base on disk, which may compute in another one here."""
    saved = load_config(section).dtype
    return saved if isinstance(saved, torch.dtype) else None


def _record(request: Request, found: AdapterInspection) -> dict[str, Any]:
    return {"adapter_folder": request.adapter, "base": request.base, "tuned_model": request.tuned} | found.to_dict()


def _show(request: Request, found: AdapterInspection, *, as_json: bool) -> None:
    if as_json:
        print(json_text(_record(request, found)))
    else:
        title = f"{request.adapter}: {found.method}, {len(found.sites):,} weights, the largest changes first"
        used = [i for i, cells in enumerate(zip(*found.rows(), strict=True)) if any(cells)]
        rows = [[row[i] for i in used] for row in found.rows()]
        print_table(title, [HEAD[i] for i in used], rows, [*found.summary()])
    print_notes(found.notes)
