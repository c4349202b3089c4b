"""Earlier tasks of a plan (O-LoRA): the frozen updates of earlier adapters, to which a new one is added."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from lorary.errors import Diagnostic, MethodError, deduplicated
from lorary.model.fingerprint import Fingerprint
from lorary.spec.interfaces import Factors, Sequential
from lorary.spec.join import KEEP_ATTACHED
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite

FixedTensors = dict[str, dict[str, Tensor]]  # site -> role -> values


class PreviousAdapter(Protocol):
    """The part of `lorary.Adapter` that a plan reads."""

    @property
    def sites(self) -> Sequence[AdaptedSite]: ...
    @property
    def base(self) -> Fingerprint: ...
    @property
    def full(self) -> Mapping[str, Tensor]: ...
    def low_rank(self) -> Mapping[str, Any]:
        """site -> (B, A, gain, shift)."""
        ...


class TrainedAdapter(PreviousAdapter, Protocol):
    """The part of `lorary.Adapter` that a plan to go on from it reads."""

    @property
    def method(self) -> Method: ...


def with_previous_tasks(
    model: nn.Module, sites: list[AdaptedSite], after: Sequence[PreviousAdapter]
) -> tuple[list[AdaptedSite], FixedTensors, list[Diagnostic]]:
    """The sites with the updates of earlier adapters as fixed tensors, these tensors, and every problem.

    A task that several of the adapters hold, because one was trained after the other, counts once.
    """
    if isinstance(after, str | bytes) or not isinstance(after, Sequence):
        what, fix = f"is a {type(after).__name__}, not a list of adapters", "after=[lorary.load_adapter(path), ...]"
        return sites, {}, [Diagnostic("after", what, fix)]
    if not after:
        return sites, {}, []
    here, holding = Fingerprint.of(model), [p for p in sites if isinstance(p.delta, Sequential)]
    problems = [
        Diagnostic("after", f"{type(p.delta).__name__} cannot hold earlier tasks", "use o-lora")
        for p in sites[:1]
        if not holding
    ]
    for i, adapter in enumerate(after):
        problems += _cannot_follow(here, holding or sites, adapter, i)
    if problems:
        return sites, {}, deduplicated(problems)
    tasks: dict[str, list[Factors]] = {p.site.name: [] for p in holding}
    for adapter in after:
        for name, found in _tasks(adapter).items():
            tasks[name] += [task for task in found if not _contains(tasks[name], task)]
    following, fixed = [], {}
    for p in sites:
        if earlier := tasks.get(p.site.name):
            delta, fixed[p.site.name] = cast(Sequential, p.delta).after(earlier, p.scale)
            p = dataclasses.replace(p, method=p.method.replace(delta=delta))
        following.append(p)
    return following, fixed, []


def _cannot_follow(base: Fingerprint, sites: list[AdaptedSite], adapter: Any, i: int) -> list[Diagnostic]:
    """Why this plan cannot follow an adapter: another base, other sites, or updates that do not add up."""
    where = f"after[{i}]"
    if not hasattr(adapter, "low_rank"):
        return [Diagnostic(where, f"{adapter!r} is not an adapter", "read one with lorary.load_adapter(path)")]
    problems = [Diagnostic(where, problem.what, problem.fix) for problem in adapter.base.disagreements(base)]
    if adapter.full:
        what = f"it trained base parameters in full ({', '.join(sorted(adapter.full)[:3])})"
        problems.append(Diagnostic(where, f"{what}; earlier tasks must be updates that add up"))
    here = {p.site.name: p.site for p in sites}
    for theirs in (p.site for p in adapter.sites):
        site = here.get(theirs.name)
        if site is None:
            what = f"it adapts {theirs.name}, which this plan does not: its update there would be lost"
            problems.append(Diagnostic(where, what, "use the same targets"))
        elif (site.out_features, site.in_features) != (theirs.out_features, theirs.in_features):
            there, own = (f"{s.out_features}x{s.in_features}" for s in (theirs, site))
            problems.append(Diagnostic(where, f"{theirs.name} is {there} there and {own} here"))
    try:
        forms = adapter.low_rank()
    except MethodError as error:
        fix = {KEEP_ATTACHED: "leave it out"}
        return problems + [
            Diagnostic(where, f"{p.where}: {p.what}", fix.get(p.fix, "merge it into the base first"))
            for p in error.problems
        ]
    if any(form.gain is not None or form.shift is not None for form in forms.values()):
        problems.append(Diagnostic(where, "it gives outputs a gain or a shift, which do not add up", "merge it first"))
    if any(not t.is_meta and not bool(t.isfinite().all()) for form in forms.values() for t in form[:2]):
        problems.append(Diagnostic(where, "holds NaN or infinite numbers"))
    return problems


def _tasks(adapter: PreviousAdapter) -> dict[str, list[Factors]]:
    """site -> the factors of each task of an adapter, in fp32 on the CPU, the first task first."""
    forms = adapter.low_rank()
    tasks = {}
    for p in adapter.sites:
        B, A = forms[p.site.name][:2]
        tasks[p.site.name] = p.delta.tasks(B, A) if isinstance(p.delta, Sequential) else [(B, A)]
    return tasks


def _contains(tasks: list[Factors], task: Factors) -> bool:
    """Whether a task is among these: with equal A, and B equal up to the rounding of a scale."""
    B, A = task
    return any(torch.equal(a, A) and b.shape == B.shape and torch.allclose(b, B, rtol=1e-5) for b, a in tasks)
