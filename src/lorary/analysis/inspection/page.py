"""The report of an inspected adapter as one HTML page."""

from __future__ import annotations

from collections.abc import Iterator

from lorary.analysis.html_report import (
    KeyFigure,
    Paragraph,
    Picture,
    Pictures,
    Section,
    Table,
    html_report,
    versions_section,
)
from lorary.analysis.inspection import pictures
from lorary.analysis.inspection.figures import HEAD, AdapterInspection

_SPECTRA = (
    "Singular values of W' − W, relative to the largest of each site. The stable rank, ‖ΔW‖² over σ₁², counts "
    "directions by their squares; the entropy rank, exp of the entropy of σᵢ/Σσ (Roy & Vetterli 2007), counts small "
    "ones more."
)
_BOUND = (
    "No matrix of rank k is nearer to ΔW than this (Eckart & Young 1936): what a rank that is too small loses at "
    "least. Medians over the sites."
)
_BOUND_TUNED = " Points: the distance of each adapted weight from that of the tuned model, at the adapter's rank."
_INTRUDERS = (
    "Singular vectors of the adapted weight that the base's weight does not have (Shuttleworth et al. 2024, "
    "arXiv:2410.21228): {left:,} of the left ones, in the output space, and {right:,} of the right ones, in the input "
    "space, among the {top} largest of each site. Models with many of them were found to forget more of what they were "
    "not tuned on. Where a weight has more outputs than inputs, small new directions count as left intruders too."
)
_ROWS = (
    "The mean change of the rows of each weight: how much longer or shorter they are (ΔM), and how far they have "
    "turned (ΔD), equations 2 and 3 of Liu et al. 2024 (arXiv:2402.09353). Beside each module kind stands the "
    "correlation of the two over its layers. The paper finds it negative for full fine-tuning and DoRA and positive "
    "for LoRA, over the layers and several steps of a run; these are the layers of one model."
)


def inspection_page(found: AdapterInspection, name: str, base: str = "", tuned: str = "") -> str:
    """The page.

    Args:
        found: the figures.
        name: of the adapter.
        base: the name of its base; empty without one.
        tuned: the name of the other tuned model; empty without one.
    """
    lead = f"What {found.method} changes in {len(found.sites):,} weights" + (f" of {base}" if base else "")
    lead += f", beside {tuned}." if tuned else "."
    return html_report(f"Inside {name}", lead, [*_figures(found)], [*_sections(found)])


def _figures(found: AdapterInspection) -> Iterator[KeyFigure]:
    def both(text: str, other: str, label: str, note: str) -> KeyFigure:
        return KeyFigure(label, text, f"{note}; tuned model {other}" if found.compares else note)

    effect, of_tuned = found.effect(), found.effect(tuned=True) if found.compares else None
    if effect is not None:
        yield both(f"{effect:.2%}", f"{of_tuned or 0:.2%}", "Size of the change", "‖ΔW‖/‖W‖ over all sites")
    other = f"{found.stable_rank(tuned=True):.2f}" if found.compares else ""
    yield both(f"{found.stable_rank():.2f}", other, "Stable rank", "median of the sites")
    if (intruders := found.intruders()) is not None:
        tuned = found.intruders(tuned=True) if found.compares else None
        yield both(str(intruders[0]), str(tuned[0] if tuned else ""), "Intruders", "left singular vectors, all sites")
    if (r := found.correlation()) is not None:
        tuned_r = found.correlation(tuned=True) if found.compares else None
        text = "" if tuned_r is None else f"{tuned_r:+.2f}"
        yield both(f"{r:+.2f}", text, "Magnitude and direction", "mean correlation over the layers of a kind")


def _sections(found: AdapterInspection) -> Iterator[Section]:
    models = (False, True) if found.compares else (False,)
    if found.effect() is not None:
        maps = [Picture(pictures.effect_svg(found, tuned=tuned), "") for tuned in models]
        yield Section("Size", [Pictures(maps), *([Paragraph(text)] if (text := _altered(found)) else [])])
    spectra = Picture(pictures.spectra_svg(found), _SPECTRA)
    ranks = [Picture(pictures.stable_rank_svg(found, tuned=tuned), "") for tuned in models]
    bound = Picture(pictures.energy_svg(found), _BOUND + (_BOUND_TUNED if found.compares else ""))
    yield Section("Spectrum", [spectra, Pictures(ranks), bound])
    if (counts := found.intruders()) is not None:
        about = Paragraph(_INTRUDERS.format(left=counts[0], right=counts[1], top=found.top))
        maps = [Picture(pictures.intruders_svg(found, tuned=tuned), "") for tuned in models]
        yield Section("Intruder dimensions", [about, Pictures(maps)])
    if found.effect() is not None:
        yield Section("Magnitude and direction", [Picture(pictures.magnitude_direction_svg(found), _ROWS)])
    for tuned in models:
        rows = found.rows(len(found.sites), tuned=tuned)
        yield Section(f"All sites, {pictures.NAMES[tuned]}", [Table(HEAD, rows)])
    if found.notes:
        yield Section("Notes", [Paragraph(note) for note in found.notes])
    yield versions_section()


def _altered(found: AdapterInspection) -> str:
    """The share of the numbers that a merge changes, in words."""
    shares = [(f.altered, s.shape) for s in found.sites if (f := s.adapter).altered is not None]
    if not shares:
        return ""
    total = sum(out * inp for _, (out, inp) in shares)
    changed = sum(share * out * inp for share, (out, inp) in shares if share is not None)
    return f"Merged and rounded to the base's dtype, {changed / total:.1%} of the numbers of these weights change."
