"""Which layers: names, globs and presets, resolved against a model; whole components, never substrings.

A target is one of
- a preset: `all-linear`, `attention`, `attention-qv`, `mlp`, `embedding`, `conv`;
- one or more whole components at the end of a module's path: `q_proj`, `self_attn.q_proj`;
- a glob over the path, `*` and `?` only: `model.layers.1?.mlp.*`;
and may name projections of a fused weight: `c_attn[q,v]`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lorary.errors import Diagnostic, suggestion
from lorary.layers.fused_qkv import FUSED, fused_parts
from lorary.layers.kinds import KINDS
from lorary.model.scan import Scan, ScannedModule
from lorary.spec.site import Part


@dataclass(frozen=True)
class TargetMatch:
    """A layer that a target names, and the projections of it that are meant (empty: all of the weight)."""

    name: str
    layer: nn.Module
    parts: tuple[Part, ...] = ()


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern names this path: its whole last components, or a glob over the path or its end."""
    if "*" in pattern or "?" in pattern:
        pattern = pattern.replace("[", "[[]")  # nothing but * and ? is special
        return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
    return name == pattern or name.endswith(f".{pattern}")


def abbreviate_paths(names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Paths that differ only in numbers, as one: `layers.{0-31}.q_proj` and the names that it stands for."""
    shapes: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        shapes.setdefault(tuple(re.split(r"(?:(?<=\.)|^)\d+(?=\.|$)", name)), []).append(name)
    return [(_joined(shape, members), members) for shape, members in shapes.items()]


def _joined(shape: tuple[str, ...], members: list[str]) -> str:
    columns = list(zip(*(re.findall(r"(?:(?<=\.)|^)\d+(?=\.|$)", m) for m in members), strict=True))
    text = shape[0]
    for column, rest in zip(columns, shape[1:], strict=True):
        text += _span(sorted({int(n) for n in column})) + rest
    return text


def _span(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{{{numbers[0]}-{numbers[-1]}}}"
    return "{" + ",".join(map(str, numbers)) + "}"


def tree(scan: Scan, most: int = 40) -> str:
    """The model's layers that can be adapted, one line for each that repeats."""
    lines = []
    for text, members in abbreviate_paths(scan.layers):
        lines.append(f"{text}  {_shape(scan.modules[members[0]])}" + (f"  x{len(members)}" if len(members) > 1 else ""))
    hidden = len(lines) - most
    return "\n".join(lines[:most] + ([f"... and {hidden} more"] if hidden > 0 else []))


def _shape(m: ScannedModule) -> str:
    own: Any = m.module
    shape = KINDS[str(m.kind)].size(own) if m.quantised else own.weight.shape
    return f"{type(own).__name__} {'x'.join(str(n) for n in shape)}"


# --- presets --------------------------------------------------------------------------------------------------

_QV = {"q", "q_proj", "query", "query_proj", "q_lin", "wq", "to_q", "v", "v_proj", "value", "value_proj", "v_lin"}
_QV |= {"wv", "to_v"}
_K = {"k", "k_proj", "key", "key_proj", "k_lin", "wk", "to_k"}
_OUT = {"o", "o_proj", "out_proj", "out_lin", "to_out", "o_lin"}
_PLAIN = {"dense", "c_proj", "proj", "Wo", "0"}  # an output projection only where the path says attention
_MLP = {"gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "fc_in", "fc_out", "c_fc", "wi", "wi_0"}
_MLP |= {"wi_1", "wo", "w1", "w2", "w3", "lin1", "lin2", "dense_h_to_4h", "dense_4h_to_h", "ff_proj", "ff_out", "Wi"}
_ATTENTION_WORD = re.compile(
    r"^(attn|attention|self_attn|self_attention|selfattention|cross_attn|crossattention|"
    r"encoder_attn|encdecattention|mha|to_out|attn\d)$",
    re.IGNORECASE,
)


def _in_attention(path: Sequence[str]) -> bool:
    return any(_ATTENTION_WORD.match(component) for component in path)


def _is_linear(m: ScannedModule) -> bool:
    return m.kind in ("linear", "transposed")


def _is_attention(m: ScannedModule) -> bool:
    *path, last = m.path.split(".")
    if not _is_linear(m):
        return False
    return last in _QV | _K | FUSED | _OUT or (last in _PLAIN and _in_attention(path))


def _is_mlp(m: ScannedModule) -> bool:
    *path, last = m.path.split(".")
    if not _is_linear(m) or _in_attention(path):
        return False
    return last in _MLP or (last in {"dense", "c_proj", "proj", "Wo"} and any(p in _MLP_WORDS for p in path))


_MLP_WORDS = {"mlp", "ffn", "intermediate", "output", "feed_forward", "ff"}

_PRESETS: dict[str, Callable[[ScannedModule], bool]] = {
    "all-linear": _is_linear,
    "attention": _is_attention,
    "attention-qv": lambda m: _is_linear(m) and m.path.rpartition(".")[2] in _QV | FUSED,
    "mlp": _is_mlp,
    "embedding": lambda m: m.kind == "embedding",
    "conv": lambda m: (m.kind or "").startswith("conv"),
}
PRESET_NAMES = tuple(_PRESETS)
_OF_LINEAR = {"all-linear", "mlp", "attention", "attention-qv"}


# --- resolution -----------------------------------------------------------------------------------------------


def resolve(
    scan: Scan, targets: str | Sequence[str], exclude: str | Sequence[str] = ()
) -> tuple[list[TargetMatch], list[Diagnostic]]:
    """The layers that the targets name, in the model's order, and every problem with naming them."""
    targets, exclude = as_list(targets), as_list(exclude)
    problems = [Diagnostic("targets", "no target is given", _known())] if not targets else []
    dropped: set[str] = set()
    for entry in exclude:
        hit = {f.name for f in _entry(scan, entry, "exclude", problems)}
        hit |= {name for name in scan.modules if any(name.startswith(f"{h}.") for h in hit)}
        dropped |= hit
    found: dict[str, TargetMatch] = {}
    for entry in targets:
        for f in _entry(scan, entry, "targets", problems):
            before = found.get(f.name)
            parts = before.parts + f.parts if before and before.parts and f.parts else f.parts
            found[f.name] = TargetMatch(
                f.name, f.layer, tuple(dict.fromkeys(parts)) if not before or before.parts else ()
            )
    kept = [found[name] for name in scan.modules if name in found and name not in dropped]
    if any(entry in _OF_LINEAR for entry in targets):
        problems += _unrecognised(scan, dropped | scan.heads)
    if found and not kept and not problems:
        problems.append(Diagnostic("exclude", "excludes every layer that the targets name"))
    for f in kept:
        reason = scan.modules[f.name].why_not_adaptable
        if reason:
            problems.append(Diagnostic(f.name, reason, "exclude it"))
    return kept, problems


def _unrecognised(scan: Scan, dropped: Set[str]) -> list[Diagnostic]:
    """Quantised layers of classes that are not registered: skipping them silently would leave most of a model
    untrained."""
    paths = abbreviate_paths(
        path for path, m in scan.modules.items() if path and m.unrecognised and path not in dropped
    )
    return [Diagnostic(text, str(scan.modules[names[0]].why_not_adaptable), "or exclude it") for text, names in paths]


def as_list(entries: str | Sequence[str] | None) -> list[Any]:
    """Targets as a list, whichever way they were given."""
    if isinstance(entries, str) or (entries is not None and not isinstance(entries, Iterable)):
        return [entries]
    return list(entries or ())


def _known() -> str:
    return "presets: " + ", ".join(PRESET_NAMES)


def _entry(scan: Scan, entry: Any, field: str, problems: list[Diagnostic]) -> list[TargetMatch]:
    """The layers of one entry; a problem where there is none."""
    if not isinstance(entry, str) or not entry.strip():
        problems.append(Diagnostic(field, f"{entry!r} is no name of a layer", _known()))
        return []
    if entry in _PRESETS:
        return _preset(scan, entry, field, problems)
    pattern, wanted = _bracket(entry)
    hits = [m for m in scan.modules.values() if any(path and matches(pattern, path) for path in m.paths)]
    layers = [m for m in hits if m.kind is not None]
    if not layers and field == "exclude" and hits:
        return [TargetMatch(m.path, m.module) for m in hits]  # whole blocks may be excluded
    if not layers:
        what, fix = _nothing(scan, entry, pattern, hits)
        fix = fix if fix.startswith("inside") else f"{fix} {_layers(scan, problems)}".strip()
        problems.append(Diagnostic(field, what, fix))
    if wanted and field == "exclude":
        fix = "target the projections that you want"
        problems.append(Diagnostic(field, f"`{entry}` names projections, and layers are excluded whole", fix))
        return []
    found = []
    for m in layers:
        parts = _fused_parts(scan, m) if wanted else {}
        missing = [w for w in wanted if w not in parts]
        if missing and field == "targets":
            known = f"it has {', '.join(parts)}" if parts else "it is not known to be fused"
            problems.append(Diagnostic(m.path, f"has no projection {', '.join(missing)}", known))
        else:
            found.append(TargetMatch(m.path, m.module, tuple(parts[w] for w in wanted)))
    return found


def _bracket(entry: str) -> tuple[str, list[str]]:
    match = re.fullmatch(r"([^\[\]]+)\[([^\[\]]+)\]", entry)
    return (match[1], [w.strip() for w in match[2].split(",")]) if match else (entry, [])


def _fused_parts(scan: Scan, m: ScannedModule) -> dict[str, Part]:
    return fused_parts(m.path, m.module, getattr(scan.model, "config", None))


def _preset(scan: Scan, entry: str, field: str, problems: list[Diagnostic]) -> list[TargetMatch]:
    heads = scan.heads if entry in _OF_LINEAR else ()
    chosen = [m for path, m in scan.modules.items() if path and path not in heads and _PRESETS[entry](m)]
    if entry == "embedding":
        chosen = _token_tables(scan.model, chosen)
    if entry == "all-linear":  # a preset skips unsupported layers; only explicit names make them an error
        chosen = [m for m in chosen if m.why_not_adaptable is None]
    if not chosen and not (field == "targets" and any(m.unrecognised for m in scan.modules.values())):
        problems.append(Diagnostic(field, f"`{entry}` matches no layer of this model", _layers(scan, problems)))
    found = []
    for m in chosen:
        parts: dict[str, Part] = {}
        if entry in ("attention", "attention-qv") and m.path.rpartition(".")[2] in FUSED:
            parts = _fused_parts(scan, m)
            if not parts and entry == "attention-qv":
                what = "is fused, and how its q, k and v lie in it is not known"
                problems.append(Diagnostic(m.path, what, "target the whole of it by its name"))
        picked = [p for n, p in parts.items() if entry == "attention" or n in ("q", "v")]
        found.append(TargetMatch(m.path, m.module, tuple(picked)))
    return found


def _token_tables(model: Any, chosen: list[ScannedModule]) -> list[ScannedModule]:
    """Of a model's embeddings those that look up token ids, not the tables of positions and types."""
    try:
        tokens = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return chosen
    # an encoder-decoder only keeps the table that it names; its two halves look up in modules tied to it
    W = getattr(tokens, "weight", None)
    tied = [m for m in chosen if m.module is not tokens and getattr(m.module, "weight", m) is W]
    return tied or [m for m in chosen if m.module is tokens] or chosen


def _nothing(scan: Scan, entry: str, pattern: str, hits: list[ScannedModule]) -> tuple[str, str]:
    """What is wrong with an entry that names no layer, and a hint."""
    if hits:
        first = hits[0]
        if first.unrecognised:
            return str(first.why_not_adaptable), ""
        inside = sorted({path.rpartition(".")[2] for path in scan.layers if path.startswith(f"{first.path}.")})
        what = f"`{entry}` is a {type(first.module).__name__}, not a layer with a weight matrix"
        return what, f"inside it are {', '.join(inside)}" if inside else ""
    words = [*dict.fromkeys(path.rpartition(".")[2] for path in scan.layers), *PRESET_NAMES]
    return f"`{entry}` matches no layer", suggestion(pattern.rpartition(".")[2], words)


def _layers(scan: Scan, problems: list[Diagnostic]) -> str:
    """The model's layers for a hint, unless one of the problems has shown them already."""
    if any("this model's layers:" in problem.fix for problem in problems):
        return ""
    lines = tree(scan).splitlines() or ["none that can be adapted"]
    return "this model's layers:\n" + "\n".join(f"        {line}" for line in lines)
