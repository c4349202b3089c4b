"""The record of a search as JSON, and as a page with pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorary.adapters.card import setting_text
from lorary.adapters.compose.lorahub import WeightSearch
from lorary.analysis.html_report import KeyFigure, Picture, Section, Table, html_report, versions_section
from lorary.analysis.weight_search_plot import search_svg, weights_svg
from lorary.files.strict_json import finite

RECORD, PAGE = "lorahub.json", "lorahub.html"


def record(found: WeightSearch) -> dict[str, Any]:
    """Everything that a search has found and tried."""
    assert found.adapter.provenance is not None
    candidates = [finite({"weights": [*c.weights], "loss": c.loss, "objective": c.objective}) for c in found.candidates]
    return {
        "settings": dict(found.adapter.provenance.settings),
        "weights": dict(zip(found.names, found.weights, strict=True)),
        "loss": found.loss,
        "loss_of_base": found.losses[0],
        "alone": dict(zip(found.names, found.alone, strict=True)),
        "tried": candidates,
    }


def write_report(found: WeightSearch, folder: Path) -> None:
    """Write `lorahub.json` and `lorahub.html`."""
    (folder / RECORD).write_text(json.dumps(record(found), indent=2) + "\n", encoding="utf-8")
    (folder / PAGE).write_text(page(found), encoding="utf-8")


def page(found: WeightSearch) -> str:
    """The report as HTML."""
    provenance = found.adapter.provenance
    assert provenance is not None
    count = len(found.losses)
    figures = [
        KeyFigure("Loss", f"{found.loss:.4f}", "of the mixture on the examples"),
        KeyFigure("Base", f"{found.losses[0]:.4f}", "all weights zero"),
        KeyFigure("Best adapter", f"{min(found.alone):.4f}", "alone, with weight 1"),
        KeyFigure("Candidates", f"{count:,}", "tried without gradients"),
        KeyFigure("Rank", f"{max((a.r for a in found.adapter.sites), default=0):,}", "at most, of a layer"),
    ]
    parents = [
        (p.name, f"{p.weight:+.4f}", f"{alone:.4f}", p.sha256[:16])
        for p, alone in zip(provenance.parents, found.alone, strict=True)
    ]
    settings = [(name, setting_text(value)) for name, value in provenance.settings.items()]
    bars = Picture(weights_svg(found.names, found.weights), "A weight below zero takes an adapter's update away.")
    curve = Picture(search_svg(found), f"The objective adds {provenance.settings['l1']:g} times the mean of |w|.")
    sections = [
        Section("Weights", [bars, Table(("adapter", "weight", "loss alone", "SHA-256"), parents)]),
        Section("Search", [curve]),
        Section("Settings", [Table(("setting", "value"), settings)]),
        versions_section(),
    ]
    lead = f"The weights of {len(found.names)} adapters that fit the examples best, by LoRAHub (arXiv:2307.13269)."
    return html_report("A mixture of adapters", lead, figures, sections)
