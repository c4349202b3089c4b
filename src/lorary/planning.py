"""plan: a model, a method and targets become a checked, printable Plan; nothing is touched."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorary.errors import MethodError, PlanError, Problem, nearest
from lorary.placed import Placed, shared_shapes, with_rank
from lorary.preconditions import not_ready, not_words
from lorary.record import Method
from lorary.sites import kind_of, site
from lorary.targets import Found, blocked, collapse, head_names, listed, matches, resolve


@dataclass(frozen=True)
class FullParameter:
    """A base parameter that trains in full.

    Args:
        name: its path in the model.
        shape: its shape.
        bytes: what it takes at the model's precision.
    """

    name: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Plan:
    """What `attach` will do, as a value.

    Args:
        method: the method, at the rank that sites without one of their own take.
        placed: the adapted sites in the model's order, each with its own rank and scale.
        full: the base parameters that train in full.
        total: parameters of the base model, tied ones counted once.
        base_bytes: what they take.
        notes: what is worth knowing before training.
    """

    method: Method
    placed: tuple[Placed, ...]
    full: tuple[FullParameter, ...]
    total: int
    base_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def trainable(self) -> int:
        """How many numbers train."""
        return sum(p.trainable for p in self.placed) + sum(f.size for f in self.full)

    @property
    def share(self) -> float:
        """Trained numbers over the base model's parameters."""
        return self.trainable / self.total

    @property
    def adapter_bytes(self) -> int:
        """What the adapters' tensors take, as 32-bit masters; what sites share counts once."""
        own = [shape for p in self.placed for role, shape in p.shapes.items() if role not in p.delta.shared]
        return 4 * sum(map(math.prod, [*own, *shared_shapes(self.placed).values()]))

    @property
    def training_bytes(self) -> int:
        """Gradients and AdamW's two moments: 12 bytes for each trained 32-bit number, 3 copies of a full parameter."""
        return 12 * sum(p.trainable for p in self.placed) + 3 * sum(f.bytes for f in self.full)

    def __str__(self) -> str:
        lines = [str(self.method), *self._site_lines(), *self._full_lines(), ""]
        lines.append(f"trains    {self.trainable:,} of {self.total:,} parameters ({self.share:.4%})")
        sizes = (self.base_bytes, self.adapter_bytes, self.training_bytes)
        base, adapters, training = (human_bytes(n) for n in sizes)
        lines.append(
            f"memory    base {base}, adapters {adapters}, gradients and AdamW {training}; activations come on top"
        )
        lines += [f"note      {note}" for note in self.notes]
        return "\n".join(lines)

    def _site_lines(self) -> list[str]:
        by_name = {p.site.name: p for p in self.placed}
        rows: dict[tuple[Any, ...], list[str]] = {}
        for p in self.placed:  # one row for the sites that differ in nothing but a number in their path
            s = p.site
            key = (re.sub(r"\d+", "#", s.name), s.kind, s.out, s.inp, s.parts, p.r, p.scale)
            rows.setdefault(key, []).append(s.name)
        table: list[tuple[str, ...]] = [("site", "kind", "out x in", "tensors", "s", "trains")]
        for names in rows.values():
            p = by_name[names[0]]
            parts = f"[{','.join(part.name for part in p.site.parts)}]" if p.site.parts else ""
            times = f" x{len(names)}" if len(names) > 1 else ""
            tensors = " ".join(f"{role}[{'x'.join(map(str, shape))}]" for role, shape in p.shapes.items())
            text = collapse(names)[0][0] + parts + times
            counts = f"{p.trainable * len(names):,}"
            table.append((text, p.site.kind, f"{p.site.out}x{p.site.inp}", tensors, f"{p.scale:g}", counts))
        return _aligned(table) if len(table) > 1 else []

    def _full_lines(self) -> list[str]:
        lines = []
        sizes = {f.name: f.size for f in self.full}
        for text, names in collapse(sizes):
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


def plan(
    model: nn.Module,
    method: Method,
    targets: str | Sequence[str] = "all-linear",
    *,
    ranks: Mapping[str, int] | None = None,
    alphas: Mapping[str, float] | None = None,
    exclude: str | Sequence[str] = (),
) -> Plan:
    """Where a method goes in a model, and what that costs. Touches nothing; works on a meta-device model.

    Args:
        model: any module; a Transformers model's output head is left out of `all-linear`.
        method: what `lorary.method` made.
        targets: presets (`all-linear`, `attention`, `attention-qv`, `mlp`, `embedding`, `conv`), whole-component
            names (`q_proj`), globs (`*.layers.1?.*`), projections of fused weights (`c_attn[q,v]`).
        ranks: site pattern -> rank; the first pattern that matches wins.
        alphas: site pattern -> alpha, likewise.
        exclude: what not to adapt, written like targets.

    Raises:
        PlanError: every problem at once, with the nearest names and the model's layers where a target names none.
    """
    problems = not_ready(model) + not_words(method, ranks, alphas)
    if problems:
        raise PlanError("this model cannot be planned for:", problems)
    found: list[Found] = []
    if method.delta is not None:
        found, problems = resolve(model, targets, exclude)
    else:  # targets have a default, so only what was certainly said can be wrong
        for field, value in (("ranks", ranks), ("alphas", alphas), ("exclude", exclude)):
            if value:
                problems.append(Problem(field, "makes sense for adapted layers only, and this method adapts none"))
    placed = _place(found, method, ranks or {}, alphas or {}, problems)
    full = _full_parameters(model, method, placed, problems)
    for p in placed:
        problems += p.problems()
    if problems:
        raise PlanError("this plan cannot work:", problems)
    unique = {id(p): p for p in model.parameters()}.values()
    total, size = sum(p.numel() for p in unique), sum(p.numel() * p.element_size() for p in unique)
    notes = [*_rank_notes(placed), *_tie_notes(model, placed), *_head_notes(model, method, full)]
    if "all-linear" in listed(targets):
        notes += _reach_notes(model, placed, total)
    return Plan(method, tuple(placed), tuple(full), total, size, tuple(notes))


def _place(
    found: list[Found],
    method: Method,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    problems: list[Problem],
) -> list[Placed]:
    names = [f.name for f in found]
    for field, patterns in (("ranks", ranks), ("alphas", alphas)):
        for pattern in patterns:
            if found and not any(matches(str(pattern), name) for name in names):
                near = nearest(str(pattern).rpartition(".")[2], list({n.rpartition(".")[2] for n in names}))
                hint = f"did you mean {' or '.join(near)}?" if near else ""
                problems.append(Problem(field, f"`{pattern}` matches no adapted site", hint))
    if found and alphas and not hasattr(method.scale, "alpha"):
        problems.append(Problem("alphas", f"{method.scale} has no alpha", "leave them out"))
        alphas = {}
    placed = []
    for f in found:
        r = next((v for pattern, v in ranks.items() if matches(str(pattern), f.name)), None)
        alpha = next((v for pattern, v in alphas.items() if matches(str(pattern), f.name)), None)
        try:
            placed.append(Placed(site(f.name, f.layer, f.parts), with_rank(method, r, alpha)))
        except MethodError as error:
            problems += [Problem(f.name, p.what) for p in error.problems]
    return placed


_NEW_HEAD = re.compile(r"For((Sequence|Token|Image|Audio|Video)?Classification|QuestionAnswering|MultipleChoice)$")


def _full_parameters(
    model: nn.Module, method: Method, placed: list[Placed], problems: list[Problem]
) -> list[FullParameter]:
    """The base parameters that train in full: those of the method's patterns, and a new head where there is one."""
    parameters = dict(model.named_parameters())
    first = {id(parameter): name for name, parameter in parameters.items()}
    paths = [(name, first[id(p)]) for name, p in model.named_parameters(remove_duplicate=False)]
    names: set[str] = set()
    for pattern in method.full:
        hits = {known for name, known in paths if _covers(pattern, name)}  # a tied one under each of its names
        if not hits:
            problems.append(_no_parameter(pattern, list(parameters)))
        names |= hits
    if _NEW_HEAD.search(type(model).__name__):
        heads = head_names(model)
        names |= {name for name in parameters if any(name.startswith(f"{head}.") for head in heads)}
    sites = {f"{p.site.name}.weight" for p in placed}
    sites |= {f"{p.site.name}.bias" for p in placed if p.delta.biases}
    weights = {known for name, known in paths if name in sites}
    for name in sorted(names & weights):
        what = "is adapted and trains in full as well: the adapter would have nothing of its own to learn"
        problems.append(Problem(name, what, "exclude the site, or narrow `full`"))
    for name in sorted(names):
        if not torch.is_floating_point(parameters[name]):
            problems.append(Problem(name, f"is {parameters[name].dtype} and cannot train in full"))
    return [FullParameter(n, tuple(t.shape), t.numel() * t.element_size()) for n, t in parameters.items() if n in names]


def _covers(pattern: str, name: str) -> bool:
    """Whether a pattern names this parameter, or a module that holds it."""
    components = name.split(".")
    return any(matches(pattern, ".".join(components[: i + 1])) for i in range(len(components)))


def _no_parameter(pattern: str, names: list[str]) -> Problem:
    if pattern == "bias":
        what = "this model has no biases (models of the Llama kind have none): there is nothing to train"
        return Problem("full", what, "take another method")
    near = nearest(pattern, names + list({".".join(n.split(".")[-2:]) for n in names}))
    return Problem("full", f"`{pattern}` matches no parameter", f"did you mean {' or '.join(near)}?" if near else "")


def _rank_notes(placed: list[Placed]) -> list[str]:
    """Sites where two factors hold more numbers than the matrix that they stand for."""
    wasteful = [p for p in placed if p.r * (p.site.out + p.site.inp) > p.site.out * p.site.inp]
    if not wasteful:
        return []
    sites = ", ".join(text for text, _ in collapse(p.site.name for p in wasteful))
    return [f"the factors are larger than the weight itself at {sites}: a lower rank loses nothing"]


def _tie_notes(model: nn.Module, placed: list[Placed]) -> list[str]:
    """Adapted weights that other layers hold too: an adapter acts on one use, which gets its own copy when merged."""
    holders: dict[int, list[str]] = {}
    for path, module in model.named_modules():  # a layer under two paths is one layer, and adapted under both
        for name, parameter in module.named_parameters(path, recurse=False):
            holders.setdefault(id(parameter), []).append(name)
    notes = []
    for p in placed:
        own = f"{p.site.name}.weight"
        others = [n for n in holders[id(model.get_parameter(own))] if n != own]
        if others:
            notes.append(
                f"{p.site.name} shares its weight with {', '.join(others)}: the adapter acts on {p.site.name} alone, "
                "and merging gives it a weight of its own"
            )
    return notes


def _reach_notes(model: nn.Module, placed: list[Placed], total: int) -> list[str]:
    """Matrices that no target can name: fused experts, nn.MultiheadAttention and other weights outside of layers."""
    modules = dict(model.named_modules())
    beyond = {}
    for path, module in modules.items():
        if kind_of(module) is not None and not blocked(model, path):
            continue
        for name, parameter in module.named_parameters(path, recurse=False):
            if parameter.dim() > 1 and parameter.numel() > total / 100:
                beyond[name] = parameter.numel()
    if not beyond:
        return []
    names = ", ".join(text for text, _ in collapse(beyond))
    return [f"no adapter reaches {names} ({sum(beyond.values()) / total:.0%} of the model)"]


def _head_notes(model: nn.Module, method: Method, full: list[FullParameter]) -> list[str]:
    asked = {f.name for f in full if any(_covers(pattern, f.name) for pattern in method.full)}
    heads = [f.name for f in full if f.name not in asked]
    return [f"the new head trains in full: {', '.join(heads)}"] if heads else []
