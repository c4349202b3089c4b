"""The figures of an inspected adapter: `ChangeFigures` of a weight's change, `SiteInspection`, `AdapterInspection`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any

from lorary.analysis.inspection.intruders import Intruders
from lorary.analysis.inspection.magnitude_direction import MagnitudeDirection, correlation
from lorary.analysis.inspection.spectrum import Spectrum
from lorary.files.strict_json import finite
from lorary.layers.module_kinds import module_positions
from lorary.model.text_table import aligned, first_rows

_SHOWN = 20  # sites in a printed table
HEAD = ("site", "shape", "‖ΔW‖/‖W‖", "stable rank", "entropy rank", "rank for 90 %", "intruders", "ΔD")


@dataclass(frozen=True)
class ChangeFigures:
    """The change of one weight from W to W'.

    Args:
        spectrum: of W' - W.
        weight: ||W||, the Frobenius norm; None, as all that follows, without the base.
        intruders: the singular vectors of W' that W does not have; None if they were not looked for.
        rows: the mean change of the rows in magnitude and direction.
        altered: the share of the numbers of W that change when W' is rounded to the weight's dtype.
    """

    spectrum: Spectrum
    weight: float | None = None
    intruders: Intruders | None = None
    rows: MagnitudeDirection | None = None
    altered: float | None = None

    @property
    def effect(self) -> float | None:
        """||W' - W|| / ||W||."""
        if self.weight is None:
            return None
        return self.spectrum.norm / self.weight if self.weight else math.inf if self.spectrum.norm else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The figures in JSON types."""
        record: dict[str, Any] = self.spectrum.to_dict() | {"effect": self.effect, "altered": self.altered}
        if self.rows is not None:
            record |= {"magnitude": self.rows.magnitude, "direction": self.rows.direction}
        if (found := self.intruders) is not None:
            record |= {"intruders": found.count, "intruders_right": found.count_right}
            record |= {"cosines": list(found.left), "cosines_right": list(found.right)}
        return finite(record)


@dataclass(frozen=True)
class SiteInspection:
    """One weight that an adapter changes.

    Args:
        site: the name of its layer.
        shape: (out, in).
        adapter: its change by the adapter.
        tuned: its change in the other tuned model, if there is one.
        distance: ||W'_tuned - W'_adapter||, the Frobenius norm of their difference.
    """

    site: str
    shape: tuple[int, int]
    adapter: ChangeFigures
    tuned: ChangeFigures | None = None
    distance: float | None = None

    @property
    def rank(self) -> int:
        """The number of directions of the adapter's change; all, if it is not a product."""
        return len(self.adapter.spectrum.values)

    @property
    def error(self) -> float | None:
        """The distance of the adapter's change from the tuned model's, relative to the latter."""
        return None if self.tuned is None or self.distance is None else _ratio(self.distance, self.tuned.spectrum.norm)

    @property
    def least_error(self) -> float | None:
        """The least error that any change of the adapter's rank has: Eckart and Young's bound."""
        return None if self.tuned is None else _ratio(self.tuned.spectrum.tail(self.rank), self.tuned.spectrum.norm)

    def to_dict(self) -> dict[str, Any]:
        """The figures in JSON types."""
        record = {"site": self.site, "shape": list(self.shape), "adapter": self.adapter.to_dict()}
        if self.tuned is not None:
            compared = {"error": self.error, "least_error": self.least_error}
            record |= {"tuned": self.tuned.to_dict()} | finite(compared)
        return record


@dataclass(frozen=True)
class AdapterInspection:
    """The inspected changes of an adapter. Prints as a table, the largest changes first.

    Args:
        method: its presets.
        sites: the weights, in the order of the adapter.
        top: the number of singular vectors checked for intruders.
        epsilon: the cosine below which one is an intruder.
        notes: what was left out, and why.
    """

    method: str
    sites: tuple[SiteInspection, ...] = field(repr=False)
    top: int
    epsilon: float
    notes: tuple[str, ...] = ()

    def changes(self, *, tuned: bool = False) -> dict[str, ChangeFigures]:
        """site -> the change by the adapter, or in the other tuned model."""
        found = {s.site: s.tuned if tuned else s.adapter for s in self.sites}
        return {site: figures for site, figures in found.items() if figures is not None}

    @property
    def compares(self) -> bool:
        """Whether another tuned model was measured beside the adapter."""
        return any(s.tuned is not None for s in self.sites)

    def effect(self, *, tuned: bool = False) -> float | None:
        """||W' - W|| / ||W|| over all sites together; None without the base."""
        found = list(self.changes(tuned=tuned).values())
        weights = [f.weight for f in found if f.weight is not None]
        return _ratio(math.hypot(*(f.spectrum.norm for f in found)), math.hypot(*weights)) if weights else None

    def stable_rank(self, *, tuned: bool = False) -> float:
        """The median stable rank of the changes."""
        return median(f.spectrum.stable_rank for f in self.changes(tuned=tuned).values())

    def intruders(self, *, tuned: bool = False) -> tuple[int, int] | None:
        """The numbers of intruders among all left and all right singular vectors; None if not looked for."""
        found = [f.intruders for f in self.changes(tuned=tuned).values() if f.intruders is not None]
        return (sum(i.count for i in found), sum(i.count_right for i in found)) if found else None

    def by_kind(self, *, tuned: bool = False) -> dict[str, list[ChangeFigures]]:
        """module kind -> the changes of its layers."""
        changes = self.changes(tuned=tuned)
        positions = module_positions(changes)
        found: dict[str, list[ChangeFigures]] = {}
        for site, figures in changes.items():
            found.setdefault(positions[site].kind, []).append(figures)
        return found

    def correlations(self, *, tuned: bool = False) -> dict[str, float | None]:
        """module kind -> the correlation of magnitude and direction over its layers (DoRA's figure 2)."""
        return {
            kind: correlation([f.rows for f in changes if f.rows is not None])
            for kind, changes in self.by_kind(tuned=tuned).items()
        }

    def correlation(self, *, tuned: bool = False) -> float | None:
        """The mean of `correlations`: kinds differ in their sizes, so that one over all would compare the kinds."""
        known = [r for r in self.correlations(tuned=tuned).values() if r is not None]
        return mean(known) if known else None

    def to_dict(self) -> dict[str, Any]:
        """The inspection in JSON types; None for values that are not finite."""
        return {
            "method": self.method,
            "top": self.top,
            "epsilon": self.epsilon,
            "adapter": self._together(tuned=False),
            **({"tuned": self._together(tuned=True)} if self.compares else {}),
            "notes": list(self.notes),
            "sites": [site.to_dict() for site in self.sites],
        }

    def _together(self, *, tuned: bool) -> dict[str, Any]:
        found = self.intruders(tuned=tuned) or (None, None)
        record: dict[str, Any] = {"effect": self.effect(tuned=tuned), "stable_rank": self.stable_rank(tuned=tuned)}
        record |= {"intruders": found[0], "intruders_right": found[1], "correlation": self.correlation(tuned=tuned)}
        record["correlations"] = self.correlations(tuned=tuned)
        return finite(record)

    def rows(self, most: int = _SHOWN, *, tuned: bool = False) -> list[tuple[str, ...]]:
        """Rows of a table under `HEAD`: the `most` sites with the largest changes, and the number of the others."""
        changes = self.changes(tuned=tuned)
        shapes = {s.site: s.shape for s in self.sites}
        order = sorted(changes, key=lambda site: -_size(changes[site]))
        rows = [(site, "×".join(map(str, shapes[site])), *_cells(changes[site])) for site in order]
        return first_rows(rows, most)

    def __str__(self) -> str:
        return "\n".join([*aligned([HEAD, *self.rows()]), *self.summary(), *(f"note: {note}" for note in self.notes)])

    def summary(self) -> Iterator[str]:
        """The figures of all sites together, in a line for each model."""
        for tuned in (False, True) if self.compares else (False,):
            parts = [f"median stable rank {self.stable_rank(tuned=tuned):.2f}"]
            if (effect := self.effect(tuned=tuned)) is not None:
                parts.insert(0, f"‖ΔW‖/‖W‖ {effect:.2%}")
            if (found := self.intruders(tuned=tuned)) is not None:
                parts.append(f"{found[0]} intruders ({found[1]} on the input side)")
            if (r := self.correlation(tuned=tuned)) is not None:
                parts.append(f"ΔM and ΔD correlate by {r:+.2f}")
            yield f"{'tuned model' if tuned else 'adapter'}: " + ", ".join(parts)


def _size(figures: ChangeFigures) -> float:
    return figures.spectrum.norm if figures.effect is None else figures.effect


def _cells(figures: ChangeFigures) -> tuple[str, ...]:
    """The cells of a row after its site and shape."""
    s, i, rows = figures.spectrum, figures.intruders, figures.rows
    effect = "" if figures.effect is None else f"{figures.effect:.2%}"
    intruding = "" if i is None else f"{i.count} ({i.count_right})"
    direction = "" if rows is None else f"{rows.direction:.2g}"
    return effect, f"{s.stable_rank:.2f}", f"{s.entropy_rank:.2f}", str(s.rank_for(0.9)), intruding, direction


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.inf if part else 0.0
