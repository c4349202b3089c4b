"""The layers that the methods of a plan adapt, each with its own rank and alpha."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorary.errors import Diagnostic, MethodError, suggestion
from lorary.layers.kinds import site
from lorary.model._full_parameters import without_full_layers
from lorary.model._parts import Part, joined
from lorary.model._presets import PRESETS
from lorary.model.layer_ranges import LayerChoice, Layers, choose_layers
from lorary.model.patterns import expression_problems, is_expression, matches
from lorary.model.scan import Scan
from lorary.model.targets import TargetMatch, abbreviate_paths, as_list, grouped, resolve
from lorary.spec.interfaces import has_rank
from lorary.spec.method import Method
from lorary.spec.per_expert import why_not_per_expert
from lorary.spec.placement import AdaptedSite, why_not_in_attention, with_rank
from lorary.spec.site import EACH, SHARED, Site


@dataclass(frozen=True)
class Wanted:
    """The arguments of `plan` that narrow its targets, give ranks and alphas by pattern, and say how experts share."""

    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    exclude: str | Sequence[str]
    layers: Layers | None
    experts: str = EACH

    def site_of(self, f: TargetMatch) -> Site:
        """The site of a matched layer."""
        found = site(f.name, f.layer, f.parts)
        return dataclasses.replace(found, one_adapter=True) if found.experts and self.experts == SHARED else found


def adapted_sites(
    scanned: Scan, parts: Sequence[Part], wanted: Wanted, head: Sequence[str] = ()
) -> tuple[list[AdaptedSite], list[Diagnostic], list[str]]:
    """The adapted sites in the model's order, every problem with them, and notes; `head` is in no block."""
    if parts[0].method.delta is None:  # targets have a default, so only explicit arguments can be wrong
        what = "has no effect: this method adapts no layer"
        problems = [
            Diagnostic(key, what) for key, value in vars(wanted).items() if value not in (None, (), {}, [], EACH)
        ]
        return [], problems, []
    found: list[list[TargetMatch]] = []
    problems, notes = [], []
    if wanted.experts not in (EACH, SHARED):
        what = f"is {wanted.experts!r}; the experts of a block have an adapter `{EACH}`, or a `{SHARED}` one"
        problems.append(Diagnostic("experts", what, suggestion(str(wanted.experts), (EACH, SHARED))))
    for part in parts:
        matched, unresolved = resolve(scanned, part.targets, wanted.exclude)
        matched, left_out = _without_impossible(part, matched, wanted)
        notes += left_out
        found.append(without_full_layers(scanned, matched, part.targets, part.method))
        if matched and not found[-1]:
            what = f"every layer of `{', '.join(map(str, as_list(part.targets)))}` trains in full, and none is adapted"
            problems.append(Diagnostic("targets", what, "adapt others, or train fewer in full"))
        problems += [problem for problem in unresolved if problem not in problems]  # what all have in common
    names = [match.name for matched in found for match in matched if match.name not in head]
    choice = LayerChoice(set(names))
    if wanted.layers is not None:
        choice = choose_layers(scanned, names, wanted.layers, [t for t in _targets(parts) if t not in head])
        problems += choice.problems
    found = [[match for match in matched if match.name in {*choice.kept, *head}] for matched in found]
    everywhere = [match for matched in found for match in matched]
    problems += _unmatched("ranks", wanted.ranks, everywhere) + _unmatched("alphas", wanted.alphas, everywhere)
    placed = []
    for part, matched in zip(parts, found, strict=True):
        sites, unplaced = _sites_of(part.method, matched, wanted)
        placed.append((part, sites))
        problems += unplaced
    shared, unshared = _shared_experts([p for _, sites in placed for p in sites], wanted, notes)
    notes, problems = [*notes, *shared], [*problems, *unshared]
    if len(parts) == 1:
        return _sharing_ties(scanned, placed[0][1]), problems, [*notes, *choice.notes]
    together, overlapping = joined(scanned, placed)
    return _sharing_ties(scanned, together), [*problems, *overlapping], [*notes, *choice.notes]


def _sharing_ties(scanned: Scan, sites: list[AdaptedSite]) -> list[AdaptedSite]:
    """The sites, those on one weight with one set of tensors if their join keeps ties."""
    by_weight: dict[tuple[str, Method], list[AdaptedSite]] = {}
    for p in sites:
        if p.join.keeps_ties and (weight := scanned.names.get(f"{p.site.name}.weight")):
            by_weight.setdefault((weight, p.method), []).append(p)
    shares = {p.site.name: tied[0].site.name for tied in by_weight.values() if len(tied) > 1 for p in tied}
    return [dataclasses.replace(p, share=shares[p.site.name]) if p.site.name in shares else p for p in sites]


def _shared_experts(
    sites: Sequence[AdaptedSite], wanted: Wanted, left_out: Sequence[str]
) -> tuple[list[str], list[Diagnostic]]:
    """The note about adapters that experts share, with their count; or the error, with what was left out and why."""
    together = [p for p in sites if p.site.one_adapter]
    if not together:
        what = f"is {SHARED!r}, and no adapted layer holds the matrices of experts"
        what += "".join(f"; {note}" for note in left_out)
        return [], [Diagnostic("experts", what, "leave it out")] if sites and wanted.experts == SHARED else []
    trained = sum(p.trainable for p in together)
    apart = sum(p.trainable * p.site.experts for p in together)
    names, E = ", ".join(text for text, _ in abbreviate_paths(p.site.name for p in together)), together[0].site.experts
    return [f"all {E} experts of {names} share one adapter: {trained:,} numbers in place of {apart:,}"], []


def _without_impossible(part: Part, matched: list[TargetMatch], wanted: Wanted) -> tuple[list[TargetMatch], list[str]]:
    """The matches without the experts and projections that a preset names and the method cannot adapt, and a note."""
    named = [entry for entry in as_list(part.targets) if entry not in PRESETS]
    why = {}
    for f in matched:
        at = wanted.site_of(f)
        reasons = why_not_per_expert(at, part.method) + why_not_in_attention(at, part.method)
        if reasons and not f.parts and not any(matches(str(entry), f.name) for entry in named):
            why[f.name] = "; ".join(reasons)
    notes = [f"the presets leave out {text}: {reason}" for text, reason in grouped(why)]
    return [f for f in matched if f.name not in why], notes


def pattern_problems(scanned: Scan, parts: Sequence[Part], wanted: Wanted) -> list[Diagnostic]:
    """The regular expressions of a plan that are invalid or take too long; no other may be asked about a name."""
    patterns: dict[str, Iterable[object]] = {"targets": _targets(parts), "exclude": as_list(wanted.exclude)}
    patterns |= {"ranks": wanted.ranks, "alphas": wanted.alphas, "full": parts[0].method.full}
    if not any(map(is_expression, (pattern for listed in patterns.values() for pattern in listed))):
        return []
    return expression_problems(patterns, [*scanned.modules, *scanned.names])


def _targets(parts: Sequence[Part]) -> list[Any]:
    return [entry for part in parts for entry in as_list(part.targets)]


def _sites_of(method: Method, found: list[TargetMatch], wanted: Wanted) -> tuple[list[AdaptedSite], list[Diagnostic]]:
    """The sites of one method."""
    sites, problems = [], []
    ranks, alphas = wanted.ranks, wanted.alphas
    if any(matches(str(pattern), f.name) for pattern in alphas for f in found) and not hasattr(method.scale, "alpha"):
        problems.append(Diagnostic("alphas", f"{method.scale} has no alpha", "leave them out"))
        alphas = {}
    if any(matches(str(pattern), f.name) for pattern in ranks for f in found) and not has_rank(method.delta):
        problems.append(Diagnostic("ranks", f"{type(method.join).__name__} has no rank", "leave them out"))
        ranks = {}
    for f in found:
        r = next((value for pattern, value in ranks.items() if matches(str(pattern), f.name)), None)
        alpha = next((value for pattern, value in alphas.items() if matches(str(pattern), f.name)), None)
        try:
            sites.append(AdaptedSite(wanted.site_of(f), with_rank(method, r, alpha)))
        except MethodError as error:
            problems += [Diagnostic(f.name, problem.what) for problem in error.problems]
    return sites, problems


def _unmatched(field: str, patterns: Mapping[str, Any], found: list[TargetMatch]) -> list[Diagnostic]:
    """The patterns of `ranks` or `alphas` that match no adapted site."""
    known = {f.name.rpartition(".")[2] for f in found}
    return [
        Diagnostic(field, f"`{pattern}` matches no adapted site", suggestion(pattern.rpartition(".")[2], known))
        for pattern in map(str, patterns)
        if found and not any(matches(pattern, f.name) for f in found)
    ]
