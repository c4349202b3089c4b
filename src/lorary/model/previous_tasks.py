"""The past of a plan: what earlier adapters have learnt, put beneath a new one that leaves it as it is (O-LoRA)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lorary.errors import Diagnostic, MethodError, deduplicated
from lorary.model.fingerprint import Fingerprint
from lorary.spec.interfaces import Sequential
from lorary.spec.placement import AdaptedSite

Pair = tuple[Tensor, Tensor]
Given = dict[str, dict[str, Tensor]]


class PreviousAdapter(Protocol):
    """The adapter of an earlier task, as far as a plan reads it (`lorary.Adapter` is the one that exists)."""

    @property
    def sites(self) -> Sequence[AdaptedSite]: ...
    @property
    def base(self) -> Fingerprint: ...
    @property
    def full(self) -> Mapping[str, Tensor]: ...
    def low_rank(self) -> Mapping[str, Any]:
        """site -> (B, A, gain, shift)."""
        ...


def with_past(
    model: nn.Module, placed: list[AdaptedSite], after: Sequence[PreviousAdapter]
) -> tuple[list[AdaptedSite], Given, list[Diagnostic]]:
    """The same sites with what earlier adapters have learnt there, the values that this gives them, and what is wrong.

    A task that several of the adapters hold, because one was trained after the other, counts once.
    """
    if isinstance(after, str | bytes) or not isinstance(after, Sequence):
        what, fix = f"is a {type(after).__name__}, not a list of adapters", "after=[lorary.load_adapter(path), ...]"
        return placed, {}, [Diagnostic("after", what, fix)]
    if not after:
        return placed, {}, []
    here = Fingerprint.of(model)
    problems = [problem for p in placed[:1] for problem in _no_place(p)]
    problems += [problem for i, adapter in enumerate(after) for problem in _cannot_follow(here, placed, adapter, i)]
    if problems:
        return placed, {}, deduplicated(problems)
    tasks: dict[str, list[Pair]] = {p.site.name: [] for p in placed}
    for adapter in after:
        for name, found in _tasks(adapter).items():
            tasks[name] += [task for task in found if not _known(tasks[name], task)]
    following, given = [], {}
    for p in placed:
        if tasks[p.site.name]:
            delta, given[p.site.name] = _sequential(p).after(tasks[p.site.name], p.scale)
            p = dataclasses.replace(p, method=p.method.replace(delta=delta))
        following.append(p)
    return following, given, []


def _sequential(p: AdaptedSite) -> Any:
    return p.delta


def _no_place(p: AdaptedSite) -> list[Diagnostic]:
    if isinstance(p.delta, Sequential):
        return []
    what = f"{type(p.delta).__name__} has no place for what earlier tasks have learnt"
    return [Diagnostic("after", what, "take o-lora")]


def _cannot_follow(base: Fingerprint, placed: list[AdaptedSite], adapter: Any, i: int) -> list[Diagnostic]:
    """Why this plan cannot follow an adapter: another base, other sites, or updates that do not add up."""
    where = f"after[{i}]"
    if not hasattr(adapter, "low_rank"):
        what = f"{adapter!r} is no adapter"
        return [Diagnostic(where, what, "read one with lorary.Adapter.load(path)")]
    problems = [Diagnostic(where, p.what, p.fix) for p in adapter.base.disagreements(base)]
    if adapter.full:
        what = f"it trained base parameters in full ({', '.join(sorted(adapter.full)[:3])})"
        problems.append(Diagnostic(where, f"{what}; what earlier tasks have learnt must be updates that add up"))
    here = {p.site.name: p.site for p in placed}
    for p in adapter.sites:
        site = here.get(p.site.name)
        if site is None:
            what = f"it adapts {p.site.name}, which this plan does not: its update there would be lost"
            problems.append(Diagnostic(where, what, "use the same targets"))
        elif (ours := (site.out_features, site.in_features)) != (theirs := (p.site.out_features, p.site.in_features)):
            what = f"{p.site.name} is {theirs[0]}x{theirs[1]} there and {ours[0]}x{ours[1]} here"
            problems.append(Diagnostic(where, what))
    try:
        forms = adapter.low_rank()
    except MethodError as error:
        return problems + [
            Diagnostic(where, f"{q.where}: {q.what}", "merge it into the base first") for q in error.problems
        ]
    if any(form.gain is not None or form.shift is not None for form in forms.values()):
        problems.append(Diagnostic(where, "it gives outputs a gain or a shift, which do not add up", "merge it first"))
    if any(not t.is_meta and not bool(t.isfinite().all()) for form in forms.values() for t in form[:2]):
        problems.append(Diagnostic(where, "holds numbers that are not finite"))
    return problems


def _tasks(adapter: PreviousAdapter) -> dict[str, list[Pair]]:
    """site -> (B, A) of each task that an adapter holds there, in fp32 on the CPU, the first one first."""
    forms: Mapping[str, Any] = adapter.low_rank()
    found = {}
    for p in adapter.sites:
        B, A = forms[p.site.name][:2]
        found[p.site.name] = p.delta.tasks(B, A) if isinstance(p.delta, Sequential) else [(B, A)]
    return found


def _known(tasks: list[Pair], task: Pair) -> bool:
    """Whether a task is there already: with the very A, and B up to the rounding of a scale."""
    B, A = task
    return any(torch.equal(a, A) and b.shape == B.shape and torch.allclose(b, B, rtol=1e-5) for b, a in tasks)
