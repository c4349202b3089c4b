"""Plan: the layers, parameters and memory of a future `attach`, as a value that can be printed and compared."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lorary._deprecated import RenamedAttribute
from lorary.model.targets import abbreviate_paths
from lorary.model.towers import Tower
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite, by_method, family, shared_shapes, unique_tensor_sets


@dataclass(frozen=True)
class FullParameter:
    """A base parameter, or a buffer, that trains in full.

    Args:
        name: its path in the model.
        shape: its shape.
        bytes: its size at the model's precision.
        trains: whether an optimizer trains it; otherwise a rule of the method or, if it is a buffer, the layer's own
            forward pass writes it.
    """

    name: str
    shape: tuple[int, ...]
    bytes: int
    trains: bool = True

    @property
    def size(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Plan:
    """The layers that `attach` will adapt, the parameters that will train, and their memory.

    Args:
        method: the method, at the default rank; the first, if there are several.
        sites: the adapted sites in the model's order, each with its own rank and scale.
        full: the base parameters that train in full.
        total: parameters of the base model, tied ones counted once.
        base_bytes: the size of the base, once quantised.
        notes: hints about the result, such as tied weights or a rank that is too large.
        fixed_tensors: site -> role -> the values of earlier tasks (`plan(after=...)`).
        quantized: the paths of the layers that attaching quantises, adapted or not.
        unproved: the sites that no dry forward has shown to run; the first training forward does.
        towers: the parts of a multimodal model, with their shares.
    """

    method: Method
    sites: tuple[AdaptedSite, ...]
    full: tuple[FullParameter, ...]
    total: int
    base_bytes: int
    notes: tuple[str, ...] = ()
    fixed_tensors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict, repr=False, compare=False)
    quantized: tuple[str, ...] = ()
    unproved: tuple[str, ...] = field(default=(), repr=False, compare=False)
    towers: tuple[Tower, ...] = field(default=(), repr=False, compare=False)

    placed = RenamedAttribute("sites")
    given = RenamedAttribute("fixed_tensors")
    packed = RenamedAttribute("quantized")

    @property
    def trainable(self) -> int:
        """The number of parameters that train."""
        return trainable_size(self.sites, self.full)

    @property
    def share(self) -> float:
        """Trained parameters over the base model's."""
        return self.trainable / self.total

    @property
    def adapter_bytes(self) -> int:
        """The size of the adapters' tensors, as 32-bit masters; shared tensors count once."""
        sets = unique_tensor_sets(self.sites)
        own = [shape for p in sets for role, shape in p.shapes.items() if role not in p.delta.shared]
        return 4 * sum(map(math.prod, [*own, *shared_shapes(self.sites).values()]))

    @property
    def training_bytes(self) -> int:
        """Gradients and AdamW's two moments: 12 bytes for each trained 32-bit number, 3 copies of a full parameter."""
        sets = unique_tensor_sets(self.sites)
        return 12 * sum(p.trainable for p in sets) + 3 * sum(f.bytes for f in self.full if f.trains)

    def __str__(self) -> str:
        lines = trained_table(self.method, self.sites, self.full, self.total)
        lines += [*_tower_table(self.towers), ""] if self.towers else []
        sizes = (self.base_bytes, self.adapter_bytes, self.training_bytes)
        base, adapters, training = (human_bytes(n) for n in sizes)
        memory = f"base {base}, adapters {adapters}, gradients and AdamW {training}"
        lines.append(f"memory    {memory}; activations come on top")
        lines += [f"note      {note}" for note in self.notes]
        return "\n".join(lines)


def trainable_size(sites: Iterable[AdaptedSite], full: Iterable[FullParameter]) -> int:
    """The number of parameters that train; shared tensors count once."""
    return sum(p.trainable for p in unique_tensor_sets(sites)) + sum(f.size for f in full if f.trains)


def trained_table(method: Method, sites: Sequence[AdaptedSite], full: Sequence[FullParameter], total: int) -> list[str]:
    """The lines that a plan and an attachment have in common: the method, the sites and the trained share."""
    trains, groups = trainable_size(sites, full), by_method(sites)
    share = f"trains    {trains:,} of {total:,} parameters ({trains / total:.4%})"
    lines = [str(method), *_site_table(sites)]
    if len(groups) > 1:
        firsts = [group[0].method for group in groups]
        shown = [method if family(method) == family(one) else one for one in firsts]
        blocks = zip(shown, groups, strict=True)
        lines = [line for one, group in blocks for line in (str(one), *_site_table(group), "")][:-1]
    return [*lines, *_full_table(full), "", share]


def _site_table(sites: Iterable[AdaptedSite]) -> list[str]:
    """The lines of a table of adapted sites, one line for those that differ only in a number of their path."""
    rows: dict[tuple[Any, ...], list[AdaptedSite]] = {}
    for p in sites:
        site = dataclasses.replace(p.site, name=re.sub(r"\d+", "#", p.site.name), bias=False)
        rows.setdefault((site, tuple(p.shapes.values()), p.scale, p.share), []).append(p)
    table: list[tuple[str, ...]] = [("site", "kind", "out x in", "tensors", "s", "trains")]
    for p, *others in rows.values():
        site, count = p.site, 1 + len(others)
        parts = f"[{','.join(part.name for part in site.parts)}]" if site.parts else ""
        text = abbreviate_paths([site.name, *(other.site.name for other in others)])[0][0] + parts
        text += (f" x{count}" if others else "") + (" share one" if p.share else "")
        tensors = " ".join(f"{role}[{'x'.join(map(str, shape))}]" for role, shape in p.shapes.items())
        scale = f"{p.scale:g}" if p.r else ""
        trains = f"{p.trainable * (1 if p.share else count):,}"
        kind = site.kind + (", one adapter" if site.one_adapter else "")
        table.append((text, kind, f"{site.out_features}x{site.in_features}", tensors, scale, trains))
    return _aligned(table) if rows else []


def _tower_table(towers: Sequence[Tower]) -> list[str]:
    """The lines of a table of a multimodal model's towers."""
    rows = [(t.name, f"{t.adapted}", f"{t.layers}", f"{t.parameters:,}", f"{t.trains:,}") for t in towers]
    return _aligned([("tower", "adapted", "linear layers", "parameters", "trains"), *rows])


def _full_table(full: Iterable[FullParameter]) -> list[str]:
    """The lines of a table of the base parameters that train in full."""
    sizes = {f.name: f.size for f in full if f.trains}
    rows = [
        (text + (f" x{len(names)}" if len(names) > 1 else ""), f"{sum(sizes[name] for name in names):,}")
        for text, names in abbreviate_paths(sizes)
    ]
    rows[20:] = [(f"... and {len(rows) - 20} more", "")] if len(rows) > 20 else []
    return _aligned([("base parameter, in full", "trains"), *rows]) if rows else []


def _aligned(table: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    rows = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
    return ["", rows[0], "-" * max(map(len, rows)), *rows[1:]]


def human_bytes(n: float) -> str:
    """A number of bytes in a readable unit.

    >>> human_bytes(1536)
    '1.5 KiB'
    """
    if n < 1024:
        return f"{n:.0f} B"
    for unit in ("KiB", "MiB"):
        n /= 1024
        if n < 1024:
            return f"{n:.1f} {unit}"
    return f"{n / 1024:.1f} GiB"
