"""Plan: what `attach` will do to a model, as a value that can be printed and compared."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lorary._deprecated import RenamedAttribute
from lorary.model.targets import abbreviate_paths
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite, shared_shapes, unique_tensor_sets


@dataclass(frozen=True)
class FullParameter:
    """A base parameter that trains in full.

    Args:
        name: its path in the model.
        shape: its shape.
        bytes: what it takes at the model's precision.
        trains: whether an optimizer trains it; otherwise a rule of the method writes it.
    """

    name: str
    shape: tuple[int, ...]
    bytes: int
    trains: bool = True

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Plan:
    """What `attach` will do, as a value.

    Args:
        method: the method, at the rank that sites without one of their own take.
        sites: the adapted sites in the model's order, each with its own rank and scale.
        full: the base parameters that train in full.
        total: parameters of the base model, tied ones counted once.
        base_bytes: what they take, once packed.
        packed: the layers that attaching packs, adapted or not.
        notes: what is worth knowing before training.
        given: site -> role -> values that the adapters begin with, of earlier tasks (`plan(after=...)`).
    """

    method: Method
    sites: tuple[AdaptedSite, ...]
    full: tuple[FullParameter, ...]
    total: int
    base_bytes: int
    notes: tuple[str, ...] = ()
    fixed_tensors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict, repr=False, compare=False)
    quantized: tuple[str, ...] = ()

    placed = RenamedAttribute("sites")
    given = RenamedAttribute("fixed_tensors")
    packed = RenamedAttribute("quantized")

    @property
    def trainable(self) -> int:
        """How many numbers train."""
        return sum(p.trainable for p in unique_tensor_sets(self.sites)) + sum(f.size for f in self.full if f.trains)

    @property
    def share(self) -> float:
        """Trained numbers over the base model's parameters."""
        return self.trainable / self.total

    @property
    def adapter_bytes(self) -> int:
        """What the adapters' tensors take, as 32-bit masters; what sites share counts once."""
        sets = unique_tensor_sets(self.sites)
        own = [shape for p in sets for role, shape in p.shapes.items() if role not in p.delta.shared]
        return 4 * sum(map(math.prod, [*own, *shared_shapes(self.sites).values()]))

    @property
    def training_bytes(self) -> int:
        """Gradients and AdamW's two moments: 12 bytes for each trained 32-bit number, 3 copies of a full parameter."""
        sets = unique_tensor_sets(self.sites)
        return 12 * sum(p.trainable for p in sets) + 3 * sum(f.bytes for f in self.full if f.trains)

    def __str__(self) -> str:
        lines = [str(self.method), *site_table(self.sites), *full_table(self.full), ""]
        lines.append(f"trains    {self.trainable:,} of {self.total:,} parameters ({self.share:.4%})")
        sizes = (self.base_bytes, self.adapter_bytes, self.training_bytes)
        base, adapters, training = (human_bytes(n) for n in sizes)
        lines.append(
            f"memory    base {base}, adapters {adapters}, gradients and AdamW {training}; activations come on top"
        )
        lines += [f"note      {note}" for note in self.notes]
        return "\n".join(lines)


def site_table(placed: Iterable[AdaptedSite]) -> list[str]:
    """The lines of a table of adapted sites, one for those that differ only in a number of their path."""
    by_name = {p.site.name: p for p in placed}
    rows: dict[tuple[Any, ...], list[str]] = {}
    for p in by_name.values():
        s = p.site
        key = (
            re.sub(r"\d+", "#", s.name),
            s.kind,
            s.out_features,
            s.in_features,
            s.parts,
            tuple(p.shapes.values()),
            p.scale,
            p.share,
        )
        rows.setdefault(key, []).append(s.name)
    table: list[tuple[str, ...]] = [("site", "kind", "out x in", "tensors", "s", "trains")]
    for names in rows.values():
        p = by_name[names[0]]
        parts = f"[{','.join(part.name for part in p.site.parts)}]" if p.site.parts else ""
        times = f" x{len(names)}" if len(names) > 1 else ""
        tensors = " ".join(f"{role}[{'x'.join(map(str, shape))}]" for role, shape in p.shapes.items())
        text = abbreviate_paths(names)[0][0] + parts + times
        if p.share:
            text += " share one"
        counts = f"{p.trainable * (1 if p.share else len(names)):,}"
        table.append(
            (text, p.site.kind, f"{p.site.out_features}x{p.site.in_features}", tensors, f"{p.scale:g}", counts)
        )
    return _aligned(table) if len(table) > 1 else []


def full_table(full: Iterable[FullParameter]) -> list[str]:
    """The lines of a table of the base parameters that train in full."""
    lines = []
    sizes = {f.name: f.size for f in full if f.trains}
    for text, names in abbreviate_paths(sizes):
        lines.append((text + (f" x{len(names)}" if len(names) > 1 else ""), f"{sum(sizes[n] for n in names):,}"))
    shown = lines[:20] + ([(f"... and {len(lines) - 20} more", "")] if len(lines) > 20 else [])
    return _aligned([("base parameter, in full", "trains"), *shown]) if lines else []


def _aligned(table: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    rows = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
    return ["", rows[0], "-" * max(map(len, rows)), *rows[1:]]


def human_bytes(n: float) -> str:
    """A size for people: 1,536 -> `1.5 KiB`.

    >>> human_bytes(1536)
    '1.5 KiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    raise AssertionError("unreachable")
