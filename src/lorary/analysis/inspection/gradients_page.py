"""The page of an adapter's first step."""

from __future__ import annotations

from collections.abc import Iterator

from lorary.analysis.heatmap import values_svg
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
from lorary.analysis.inspection.gradients import HEAD, SITE_HEAD, FirstGradients

_ABOUT = (
    "Norms over all tensors of a role: their first values, their gradients before clipping, and their change by the "
    "first optimizer step at the full learning rate. A factor that starts at zero blocks the gradient of its partner: "
    "∂L/∂A = s·Bᵀ·G and ∂L/∂B = s·G·Aᵀ, with G the gradient of the effective weight."
)


def gradients_page(found: FirstGradients, name: str) -> str:
    """The page.

    Args:
        found: the figures.
        name: of the run.
    """
    moving = ", ".join(found.moving) or "nothing"
    figures = [KeyFigure("Moves first", moving, f"of {', '.join(found.roles)}")]
    if found.sites:
        largest = max(site.effect for site in found.sites)
        figures.append(KeyFigure("First step", f"{largest:.2%}", "largest ‖ΔW‖/‖W‖ of a site"))
    lead = f"{found.method} on {name}: {found.verdict}."
    return html_report("The first step", lead, figures, [*_sections(found)])


def _sections(found: FirstGradients) -> Iterator[Section]:
    yield Section("Roles", [Table(HEAD, found.rows()), Paragraph(_ABOUT)])
    if found.sites:
        effects = {site.site: site.effect for site in found.sites}
        caption = "‖ΔW‖/‖W‖ of the effective weight, in units of 0.01 %."
        maps = [Picture(values_svg(effects, "Change of the weights", caption, text=_basis_points), "")]
        yield Section("Sites", [Pictures([*_maps(found), *maps]), Table(SITE_HEAD, _rows(found))])
    if found.full:
        tensors = sorted(found.full.items(), key=lambda item: -item[1].gradient)
        rows = [(name, f"{t.gradient:.3g}", f"{t.step:.3g}") for name, t in tensors]
        yield Section("Trained in full", [Table(("parameter", "gradient", "first step"), rows)])
    if found.notes:
        yield Section("Notes", [Paragraph(note) for note in found.notes])
    yield versions_section()


def _maps(found: FirstGradients) -> Iterator[Picture]:
    """The gradients of each role that has one, relative to its largest."""
    for role in found.moving:
        values = {site.site: site.roles[role].gradient for site in found.sites if role in site.roles}
        if not values:
            continue
        largest = max(values.values()) or 1.0
        shares = {site: value / largest for site, value in values.items()}
        caption = f"In percent of the largest norm, {largest:.3g}."
        yield Picture(values_svg(shares, f"Gradient of {role}", caption, text=_percent), "")


def _rows(found: FirstGradients) -> list[tuple[str, ...]]:
    return [
        (
            site.site,
            ", ".join(f"∂{role} {t.gradient:.3g}" for role, t in site.roles.items()),
            f"{site.effect:.3%}",
        )
        for site in sorted(found.sites, key=lambda site: -site.effect)
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.0f}"


def _basis_points(share: float) -> str:
    value = 1e4 * share
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"
