"""Target resolution: the layers of a model that names, globs and presets match; whole components, never substrings.

A target is one of
- a preset: `all-linear`, `attention`, `attention-qv`, `attention-kv`, `attention-output`, `mlp`, `mlp-output`,
  `embedding`, `vocabulary`, `conv`; of a multimodal model `language`, `vision`, `audio`, `projector`;
- one or more whole components at the end of a module's path: `q_proj`, `self_attn.q_proj`;
- a glob over the path, `*` and `?` only: `model.layers.1?.mlp.*`;
- `re:` and a regular expression for the whole path: `re:.*language_model.*q_proj` (`lorary.model.patterns`).
Names and globs may pick projections of a fused weight: `c_attn[q,v]`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from torch import nn

from lorary.errors import Diagnostic, suggestion
from lorary.layers.fused_qkv import FUSED, fused_parts
from lorary.layers.kinds import KINDS
from lorary.layers.module_kinds import NUMBER, module_positions
from lorary.layers.multihead_attention import is_attention
from lorary.model._presets import LINEAR_PRESETS, PARTS, PRESETS, layers_of_preset
from lorary.model.patterns import expression_error, is_expression, looks_like_expression, matches
from lorary.model.scan import Scan, ScannedModule
from lorary.spec.site import Part


@dataclass(frozen=True)
class TargetMatch:
    """A layer that a target matches, and the targeted projections of it (empty: the whole weight)."""

    name: str
    layer: nn.Module
    parts: tuple[Part, ...] = ()


_PRESET_HINT = f"presets: {', '.join(PRESETS)}"
_NUMBER = re.compile(r"(?:(?<=\.)|^)\d+(?=\.|$)")  # a component of a path


def abbreviate_paths(names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Groups of paths that differ only in numbers: (`layers.{0-31}.q_proj`, the paths)."""
    groups: dict[tuple[str, ...], list[str]] = {}  # by the text between the numbers
    for name in names:
        groups.setdefault(tuple(_NUMBER.split(name)), []).append(name)
    abbreviated = []
    for texts, members in groups.items():
        columns = zip(*map(_NUMBER.findall, members), strict=True)
        spans = [_span(sorted(set(map(int, column)))) for column in columns]
        abbreviated.append(("".join(map("".join, zip(texts, [*spans, ""], strict=True))), members))
    return abbreviated


def abbreviated(names: Iterable[str]) -> str:
    """Paths in one line: `layers.{0-31}.q_proj, lm_head`."""
    return ", ".join(text for text, _ in abbreviate_paths(names))


def _span(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{{{numbers[0]}-{numbers[-1]}}}"
    return "{" + ",".join(map(str, numbers)) + "}"


def tree(scan: Scan, most: int = 40) -> str:
    """The model's layers that can be adapted, one line per group of repeated ones."""
    lines = []
    for text, members in abbreviate_paths(scan.layers):
        lines.append(f"{text}  {_shape(scan.modules[members[0]])}" + (f"  x{len(members)}" if len(members) > 1 else ""))
    hidden = len(lines) - most
    return "\n".join(lines[:most] + ([f"... and {hidden} more"] if hidden > 0 else []))


def _shape(m: ScannedModule) -> str:
    layer: Any = m.module
    shape = KINDS[str(m.kind)].size(layer) if m.quantised else layer.weight.shape
    return f"{type(layer).__name__} {'x'.join(map(str, shape))}"


# --- resolution -----------------------------------------------------------------------------------------------


def resolve(
    scan: Scan, targets: str | Sequence[str], exclude: str | Sequence[str] = ()
) -> tuple[list[TargetMatch], list[Diagnostic]]:
    """The layers that the targets match, in the model's order, and every problem."""
    targets, exclude = as_list(targets), as_list(exclude)
    problems = [Diagnostic("targets", "no target is given", _PRESET_HINT)] if not targets else []
    excluded = _excluded(scan, exclude, problems)
    found: dict[str, TargetMatch] = {}
    for entry in targets:
        for f in _matching(scan, entry, "targets", problems):
            before = found.get(f.name, f)
            parts = before.parts + f.parts if before.parts and f.parts else ()  # the whole weight wins
            found[f.name] = TargetMatch(f.name, f.layer, tuple(dict.fromkeys(parts)))
    kept = [found[name] for name in scan.modules if name in found and name not in excluded]
    if any(entry in LINEAR_PRESETS for entry in targets):
        problems += _unrecognised(scan, excluded | scan.heads)
    if found and not kept and not problems:
        problems.append(Diagnostic("exclude", "excludes every layer that the targets name"))
    refused = {f.name: why for f in kept if (why := scan.modules[f.name].why_not_adaptable)}
    problems += [Diagnostic(text, why) for text, why in grouped(refused)]
    if refused:
        others = len(refused) < len(kept)
        fix = exclusions(refused, scan.layers) if others else "name layers that an adapter can reach"
        problems[-1] = dataclasses.replace(problems[-1], fix=fix)
    return kept, problems


def target_notes(
    scan: Scan, targets: str | Sequence[str], exclude: str | Sequence[str], sites: Iterable[str]
) -> list[str]:
    """The layers that presets among the targets leave out, and the adapted ones that were named by their wrappers."""
    excluded = _excluded(scan, as_list(exclude), [])
    notes = []
    for entry in as_list(targets):
        if entry in PRESETS:
            skipped = {
                path: why for path, why in _skipped(layers_of_preset(scan, entry)).items() if path not in excluded
            }
            notes += [f"`{entry}` leaves out {text}: {why}" for text, why in grouped(skipped)]
            continue
        wrapped = [path for path in sites if (outer := scan.wrapper_of(path)) and matches(entry, outer)]
        if wrapped := [path for path in wrapped if not matches(entry, path)]:
            notes.append(f"`{entry}` wraps a layer, which is adapted: {abbreviated(wrapped)}")
    return notes


def grouped(reasons: Mapping[str, str]) -> list[tuple[str, str]]:
    """(all abbreviated paths, reason) for path -> reason."""
    groups: dict[str, list[str]] = {}
    for path, why in reasons.items():
        groups.setdefault(why, []).append(path)
    return [(abbreviated(paths), why) for why, paths in groups.items()]


def exclusions(names: Collection[str], layers: Iterable[str]) -> str:
    """The hint `exclude=[...]` that leaves out these layers and no other ones."""
    positions = module_positions(layers)

    def pattern(name: str) -> str:
        short = positions[name].kind.replace(NUMBER, "*")
        return short if all(path in names for path in positions if matches(short, path)) else name

    quoted = dict.fromkeys(f'"{pattern(name)}"' for name in names)
    return f"exclude=[{', '.join(quoted)}]"


def _excluded(scan: Scan, exclude: Sequence[str], problems: list[Diagnostic]) -> set[str]:
    """The paths that `exclude` names, and those inside of them."""
    excluded: set[str] = set()
    for entry in exclude:
        hits = {f.name for f in _matching(scan, entry, "exclude", problems)}
        excluded |= hits | {name for name in scan.modules if any(name.startswith(f"{hit}.") for hit in hits)}
    return excluded


def _unrecognised(scan: Scan, excluded: Set[str]) -> list[Diagnostic]:
    """Quantised layers of unregistered classes: a preset that skipped them would leave most of a model untrained."""
    paths = (path for path, m in scan.modules.items() if path and m.unrecognised and path not in excluded)
    return [
        Diagnostic(text, str(scan.modules[names[0]].why_not_adaptable), "or exclude it")
        for text, names in abbreviate_paths(paths)
    ]


def as_list(entries: str | Sequence[str] | None) -> list[Any]:
    """Targets as a list: one entry, several or none."""
    if isinstance(entries, str) or (entries is not None and not isinstance(entries, Iterable)):
        return [entries]
    return list(entries or ())


def _matching(scan: Scan, entry: Any, field: str, problems: list[Diagnostic]) -> list[TargetMatch]:
    """The layers that one entry of `targets` or `exclude` matches; its problems are added to the list."""
    if not isinstance(entry, str) or not entry.strip():
        problems.append(Diagnostic(field, f"{entry!r} is not the name of a layer", _PRESET_HINT))
        return []
    if entry in PRESETS:
        return _preset(scan, entry, field, problems)
    fused = None if is_expression(entry) else re.fullmatch(r"([^\[\]]+)\[([^\[\]]+)\]", entry)
    pattern, wanted = (fused[1], [part.strip() for part in fused[2].split(",")]) if fused else (entry, [])
    hits = [m for m in scan.modules.values() if any(path and matches(pattern, path) for path in m.paths)]
    layers = [m for m in hits if m.kind is not None]
    if field == "targets":
        wrapped = [inner for m in hits if (inner := scan.wrapped_in(m.path))]
        named = {m.path for m in hits if is_attention(m.module)}  # as PEFT names an attention, for both its projections
        wrapped += [m for m in scan.layers.values() if m.owner in named]
        layers = list({m.path: m for m in [*layers, *wrapped]}.values())
    if not layers and field == "exclude" and hits:
        return [TargetMatch(m.path, m.module) for m in hits]  # whole blocks may be excluded
    if not layers:
        what, fix = _why_no_layer(scan, entry, pattern, hits)
        fix = fix if fix.startswith(("inside", "a regular")) else f"{fix} {_layers(scan, problems)}".strip()
        problems.append(Diagnostic(field, what, fix))
    if wanted and field == "exclude":
        fix = "target the other projections instead"
        problems.append(Diagnostic(field, f"`{entry}` names projections, but layers are excluded whole", fix))
        return []
    found = []
    for m in layers:
        parts = _fused_parts(scan, m) if wanted else {}
        missing = [part for part in wanted if part not in parts]
        if missing and field == "targets":
            known = f"it has {', '.join(parts)}" if parts else "it is not known to be fused"
            problems.append(Diagnostic(m.path, f"has no projection {', '.join(missing)}", known))
        else:
            found.append(TargetMatch(m.path, m.module, tuple(parts[part] for part in wanted)))
    return found


def _fused_parts(scan: Scan, m: ScannedModule) -> dict[str, Part]:
    return fused_parts(m.path, m.module, getattr(scan.model, "config", None))


def _preset(scan: Scan, entry: str, field: str, problems: list[Diagnostic]) -> list[TargetMatch]:
    """The layers of a preset."""
    named = layers_of_preset(scan, entry)
    skipped = _skipped(named)  # only explicit names make them an error
    chosen = [m for m in named if m.path not in skipped]
    if not chosen and not (field == "targets" and any(m.unrecognised for m in scan.modules.values())):
        problems += [Diagnostic(text, why) for text, why in grouped(skipped)]
        what, hint = f"`{entry}` matches no layer of this model", _layers(scan, problems)
        if skipped:
            what, hint = f"`{entry}` names only layers that no adapter can reach", "leave it out"
        problems.append(Diagnostic(field, what, hint))
    found = []
    for m in chosen:
        parts: dict[str, Part] = {}
        if entry in PARTS and m.path.rpartition(".")[2] in FUSED:
            parts = _fused_parts(scan, m)
            if not parts and entry != "attention":
                what = "is fused, and the layout of its q, k and v is not known"
                problems.append(Diagnostic(m.path, what, "target the whole layer by its name"))
        picked = tuple(part for name, part in parts.items() if name in PARTS[entry])
        found.append(TargetMatch(m.path, m.module, picked))
    return found


def _skipped(named: Iterable[ScannedModule]) -> dict[str, str]:
    """path -> why a preset leaves this layer out. Not for quantised layers of unknown classes: see `_unrecognised`."""
    return {m.path: why for m in named if not m.unrecognised and (why := m.why_not_adaptable)}


def _why_no_layer(scan: Scan, entry: str, pattern: str, hits: list[ScannedModule]) -> tuple[str, str]:
    """Why an entry matches no layer, and a hint."""
    if hits:
        first = hits[0]
        if first.unrecognised:
            return str(first.why_not_adaptable), ""
        inside = sorted({path.rpartition(".")[2] for path in scan.layers if path.startswith(f"{first.path}.")})
        what = f"`{entry}` is a {type(first.module).__name__}, not a layer with a weight matrix"
        return what, f"inside it are {', '.join(inside)}" if inside else ""
    expression = f"re:{entry}"
    valid = looks_like_expression(entry) and not expression_error(expression)
    if valid and any(matches(expression, path) for path in scan.layers):
        return f"`{entry}` matches no layer", f"a regular expression begins with `re:`: '{expression}'"
    known = [*dict.fromkeys(path.rpartition(".")[2] for path in scan.layers), *PRESETS]
    return f"`{entry}` matches no layer", suggestion(pattern.rpartition(".")[2], known)


def _layers(scan: Scan, problems: list[Diagnostic]) -> str:
    """The model's layers for a hint, unless one of the problems lists them already."""
    if any("this model's layers:" in problem.fix for problem in problems):
        return ""
    lines = tree(scan).splitlines() or ["none that can be adapted"]
    return "this model's layers:\n" + "\n".join(f"        {line}" for line in lines)
