"""The pictures of an inspected adapter, as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from lorary.analysis.heatmap import percent, values_svg
from lorary.analysis.inspection.figures import AdapterInspection, ChangeFigures
from lorary.analysis.svg import line, style, to_svg

NAMES = {False: "adapter", True: "tuned model"}
_MOST_DRAWN = 64  # ranks on an axis
_SMALLEST = 1e-6  # of the largest singular value: what is below is not drawn


def effect_svg(found: AdapterInspection, *, tuned: bool = False) -> str:
    """||W' - W|| / ||W|| of every site, in percent."""
    values = {site: f.effect for site, f in found.changes(tuned=tuned).items() if f.effect is not None}
    title = f"Size of the change, {NAMES[tuned]}"
    return values_svg(values, title, "‖ΔW‖/‖W‖ in percent, Frobenius norms.", text=percent)


def stable_rank_svg(found: AdapterInspection, *, tuned: bool = False) -> str:
    """The stable rank of every site."""
    values = {site: f.spectrum.stable_rank for site, f in found.changes(tuned=tuned).items()}
    caption = "‖ΔW‖² over the square of its largest singular value: 1 if a single direction dominates."
    return values_svg(values, f"Stable rank of the change, {NAMES[tuned]}", caption, text=_rank)


def intruders_svg(found: AdapterInspection, *, tuned: bool = False) -> str:
    """The number of intruders of every site, among the left singular vectors."""
    changes = found.changes(tuned=tuned)
    values = {site: float(f.intruders.count) for site, f in changes.items() if f.intruders is not None}
    caption = (
        f"Of the {found.top} largest left singular vectors of W', those whose cosine with every one of W is below "
        f"{found.epsilon:g}."
    )
    title = f"Intruder dimensions, {NAMES[tuned]}"
    return values_svg(values, title, caption, text="{:.0f}".format, full_shade=float(found.top))


def spectra_svg(found: AdapterInspection, title: str = "Singular values of the change") -> str:
    """The singular values relative to the largest: the median of each module kind, one panel for each model."""
    models = [False, True] if found.compares else [False]
    with style():
        figure = Figure(figsize=(7.2 if len(models) == 1 else 10.4, 3.4))
        panels = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
        for axes, tuned in zip(panels, models, strict=True):
            _spectra(axes, found.by_kind(tuned=tuned))
            axes.set(title=f"{title}, {NAMES[tuned]}" if len(models) == 1 else f"{NAMES[tuned]}", xlabel="index i")
        panels[0].set_ylabel("σᵢ / σ₁, median of a kind")
        panels[-1].legend()
        ranks = ", ".join(f"{NAMES[tuned]} {found.stable_rank(tuned=tuned):.2f}" for tuned in models)
        return to_svg(figure, title, f"median stable rank: {ranks}")


def energy_svg(found: AdapterInspection, title: str = "Least error of a lower rank") -> str:
    """Eckart and Young's bound over the rank: the median of all sites; with a tuned model, also the adapter's error."""
    with style():
        figure = Figure(figsize=(7.2, 3.4))
        axes = figure.add_subplot()
        ends = []
        for i, tuned in enumerate([False, True] if found.compares else [False]):
            changes = [f for f in found.changes(tuned=tuned).values() if f.spectrum.norm]
            most = min(max((len(f.spectrum.values) for f in changes), default=0), _MOST_DRAWN)
            bound = [median(f.spectrum.tail(k) / f.spectrum.norm for f in changes) for k in range(most + 1)]
            axes.plot(range(len(bound)), bound, label=f"bound for the {NAMES[tuned]}", **line(i, marker=most < 17))
            ends.append(f"{NAMES[tuned]} {bound[-1]:.2g} at rank {most}" if changes else "")
        if points := [(s.rank, s.error) for s in found.sites if s.error is not None and math.isfinite(s.error)]:
            look = line(2) | {"linestyle": ""}
            axes.plot(*zip(*points, strict=True), label="adapter against the tuned model", **look)
        axes.set(title=title, xlabel="rank", ylabel="‖difference‖ / ‖ΔW‖", ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
        return to_svg(figure, title, "median over the sites: " + ", ".join(ends))


def magnitude_direction_svg(found: AdapterInspection, title: str = "Magnitude and direction") -> str:
    """The mean change of magnitude over that of direction, a point for each site: DoRA's figure 2."""
    models = [False, True] if found.compares else [False]
    with style():
        figure = Figure(figsize=(5.2 * len(models) + 2.0, 3.6))
        panels = figure.subplots(1, len(models), squeeze=False)[0]
        words = []
        for axes, tuned in zip(panels, models, strict=True):
            correlations = found.correlations(tuned=tuned)
            for i, (kind, changes) in enumerate(found.by_kind(tuned=tuned).items()):
                rows = [f.rows for f in changes if f.rows is not None]
                x, y = [p.direction for p in rows], [p.magnitude for p in rows]
                r = correlations[kind]
                label = kind if r is None else f"{kind} {r:+.2f}"
                axes.plot(x, y, label=label, **line(i) | {"linestyle": ""})
            mean = found.correlation(tuned=tuned)
            words.append(f"{NAMES[tuned]}" + ("" if mean is None else f", mean correlation {mean:+.2f}"))
            axes.set(title=words[-1], xlabel="ΔD, mean of 1 − cos", ylabel="ΔM, mean change of a norm")
            axes.ticklabel_format(scilimits=(-4, 4))
            axes.margins(0.1)
            axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        return to_svg(figure, title, "; ".join(words))


def _rank(value: float) -> str:
    """At most four characters: 1.3, 12, 1024."""
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def _spectra(axes: Axes, kinds: Mapping[str, Sequence[ChangeFigures]]) -> None:
    for i, (kind, changes) in enumerate(kinds.items()):
        spectra = [f.spectrum.values for f in changes if f.spectrum.norm]
        if not spectra:
            continue
        most = min(max(map(len, spectra)), _MOST_DRAWN)
        values = [median(s[k] / s[0] if k < len(s) else 0.0 for s in spectra) for k in range(most)]
        drawn = [value if value > _SMALLEST else math.nan for value in values]
        axes.plot(range(1, most + 1), drawn, label=kind, **line(i, marker=most < 17))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
