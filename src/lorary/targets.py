"""Which layers: names, globs and presets, resolved against a model; whole components, never substrings.

A target is one of
- a preset: `all-linear`, `attention`, `attention-qv`, `mlp`, `embedding`, `conv`;
- one or more whole components at the end of a module's path: `q_proj`, `self_attn.q_proj`;
- a glob over the path, `*` and `?` only: `model.layers.1?.mlp.*`;
and may name projections of a fused weight: `c_attn[q,v]`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lorary.errors import Problem, suggestion
from lorary.fused import FUSED, fused_parts
from lorary.sites import KINDS, Part, kind_of, obstacle
from lorary.weights import is_packed, strange, unknown


@dataclass(frozen=True)
class Found:
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


def collapse(names: Iterable[str]) -> list[tuple[str, list[str]]]:
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


def tree(model: nn.Module, most: int = 40) -> str:
    """The model's layers that can be adapted, one line for each that repeats."""
    layers = {name: m for name, m in model.named_modules() if kind_of(m) is not None}
    lines = []
    for text, members in collapse(layers):
        lines.append(f"{text}  {_shape(layers[members[0]])}" + (f"  x{len(members)}" if len(members) > 1 else ""))
    hidden = len(lines) - most
    return "\n".join(lines[:most] + ([f"... and {hidden} more"] if hidden > 0 else []))


def _shape(layer: nn.Module) -> str:
    own: Any = layer
    shape = KINDS[str(kind_of(layer))].size(layer) if is_packed(layer) else own.weight.shape
    return f"{type(layer).__name__} {'x'.join(str(n) for n in shape)}"


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


def _is_linear(layer: nn.Module) -> bool:
    return kind_of(layer) in ("linear", "transposed")


def _is_attention(name: str, layer: nn.Module) -> bool:
    *path, last = name.split(".")
    if not _is_linear(layer):
        return False
    return last in _QV | _K | FUSED | _OUT or (last in _PLAIN and _in_attention(path))


def _is_mlp(name: str, layer: nn.Module) -> bool:
    *path, last = name.split(".")
    if not _is_linear(layer) or _in_attention(path):
        return False
    return last in _MLP or (last in {"dense", "c_proj", "proj", "Wo"} and any(p in _MLP_WORDS for p in path))


_MLP_WORDS = {"mlp", "ffn", "intermediate", "output", "feed_forward", "ff"}

_PRESETS: dict[str, Callable[[str, nn.Module], bool]] = {
    "all-linear": lambda name, layer: _is_linear(layer),
    "attention": _is_attention,
    "attention-qv": lambda name, layer: _is_linear(layer) and name.rpartition(".")[2] in _QV | FUSED,
    "mlp": _is_mlp,
    "embedding": lambda name, layer: kind_of(layer) == "embedding",
    "conv": lambda name, layer: (kind_of(layer) or "").startswith("conv"),
}
PRESET_NAMES = tuple(_PRESETS)
_OF_LINEAR = {"all-linear", "mlp", "attention", "attention-qv"}


def head_names(model: Any) -> set[str]:
    """Layers that turn hidden states into answers: the language-model head, or all that is outside the base model."""
    names = dict(model.named_modules())
    heads: set[str] = set()
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    heads |= {name for name, module in names.items() if output is not None and module is output}
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and isinstance(getattr(model, prefix, None), nn.Module):
        heads |= {name for name in names if name and name != prefix and not name.startswith(f"{prefix}.")}
    return heads


# --- resolution -----------------------------------------------------------------------------------------------


def resolve(
    model: nn.Module, targets: str | Sequence[str], exclude: str | Sequence[str] = ()
) -> tuple[list[Found], list[Problem]]:
    """The layers that the targets name, in the model's order, and every problem with naming them."""
    targets, exclude = listed(targets), listed(exclude)
    problems = [Problem("targets", "no target is given", _known())] if not targets else []
    modules = {name: module for name, module in model.named_modules() if name}
    dropped: set[str] = set()
    for entry in exclude:
        hit = {f.name for f in _entry(model, modules, entry, "exclude", problems)}
        hit |= {name for name in modules if any(name.startswith(f"{h}.") for h in hit)}
        dropped |= hit
    found: dict[str, Found] = {}
    for entry in targets:
        for f in _entry(model, modules, entry, "targets", problems):
            before = found.get(f.name)
            parts = before.parts + f.parts if before and before.parts and f.parts else f.parts
            found[f.name] = Found(f.name, f.layer, tuple(dict.fromkeys(parts)) if not before or before.parts else ())
    kept = [found[name] for name in modules if name in found and name not in dropped]
    if any(entry in _OF_LINEAR for entry in targets):
        without = dropped | head_names(model)
        problems += _strangers({n: m for n, m in modules.items() if n not in without})
    if found and not kept and not problems:
        problems.append(Problem("exclude", "excludes every layer that the targets name"))
    for f in kept:
        reason = blocked(model, f.name)
        if reason:
            problems.append(Problem(f.name, reason, "exclude it"))
    return kept, problems


def _strangers(modules: dict[str, nn.Module]) -> list[Problem]:
    """Packed layers that nobody has made known: to pass over them in silence would leave most of a model untrained."""
    packed = collapse(name for name, module in modules.items() if strange(module))
    return [Problem(text, unknown(modules[names[0]]), "or exclude it") for text, names in packed]


def listed(entries: str | Sequence[str] | None) -> list[Any]:
    """Targets as a list, whichever way they were given."""
    if isinstance(entries, str) or (entries is not None and not isinstance(entries, Iterable)):
        return [entries]
    return list(entries or ())


def _known() -> str:
    return "presets: " + ", ".join(PRESET_NAMES)


def _entry(
    model: nn.Module, modules: dict[str, nn.Module], entry: Any, field: str, problems: list[Problem]
) -> list[Found]:
    """The layers of one entry; a problem where there is none."""
    if not isinstance(entry, str) or not entry.strip():
        problems.append(Problem(field, f"{entry!r} is no name of a layer", _known()))
        return []
    config = getattr(model, "config", None)
    if entry in _PRESETS:
        return _preset(model, modules, entry, field, config, problems)
    pattern, wanted = _bracket(entry)
    hits = _hits(model, pattern)
    layers = {name: m for name, m in hits.items() if kind_of(m) is not None}
    if not layers and field == "exclude" and hits:
        return [Found(name, m) for name, m in hits.items()]  # whole blocks may be excluded
    if not layers:
        what, fix = _nothing(modules, entry, pattern, hits)
        fix = fix if fix.startswith("inside") else f"{fix} {_layers(model, problems)}".strip()
        problems.append(Problem(field, what, fix))
    if wanted and field == "exclude":
        fix = "target the projections that you want"
        problems.append(Problem(field, f"`{entry}` names projections, and layers are excluded whole", fix))
        return []
    found = []
    for name, layer in layers.items():
        parts = fused_parts(name, layer, config) if wanted else {}
        strange = [w for w in wanted if w not in parts]
        if strange and field == "targets":
            known = f"it has {', '.join(parts)}" if parts else "it is not known to be fused"
            problems.append(Problem(name, f"has no projection {', '.join(strange)}", known))
        else:
            found.append(Found(name, layer, tuple(parts[w] for w in wanted)))
    return found


def _hits(model: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """The modules that a pattern names, each by its first path though another may have matched."""
    first: dict[int, str] = {}
    hits: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        first.setdefault(id(module), name)
        if name and matches(pattern, name):
            hits[first[id(module)]] = module
    return hits


def _bracket(entry: str) -> tuple[str, list[str]]:
    match = re.fullmatch(r"([^\[\]]+)\[([^\[\]]+)\]", entry)
    return (match[1], [w.strip() for w in match[2].split(",")]) if match else (entry, [])


def _preset(
    model: nn.Module, modules: dict[str, nn.Module], entry: str, field: str, config: Any, problems: list[Problem]
) -> list[Found]:
    heads = head_names(model) if entry in _OF_LINEAR else set()
    chosen = {n: m for n, m in modules.items() if n not in heads and _PRESETS[entry](n, m)}
    if entry == "embedding":
        chosen = _token_tables(model, chosen)
    if entry == "all-linear":  # what it cannot adapt it was not told to adapt by name
        chosen = {n: m for n, m in chosen.items() if not blocked(model, n)}
    if not chosen and not (field == "targets" and any(map(strange, modules.values()))):
        problems.append(Problem(field, f"`{entry}` matches no layer of this model", _layers(model, problems)))
    found = []
    for name, layer in chosen.items():
        parts: dict[str, Part] = {}
        if entry in ("attention", "attention-qv") and name.rpartition(".")[2] in FUSED:
            parts = fused_parts(name, layer, config)
            if not parts and entry == "attention-qv":
                what = "is fused, and how its q, k and v lie in it is not known"
                problems.append(Problem(name, what, "target the whole of it by its name"))
        picked = [p for n, p in parts.items() if entry == "attention" or n in ("q", "v")]
        found.append(Found(name, layer, tuple(picked)))
    return found


def _token_tables(model: Any, chosen: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Of a model's embeddings those that look up token ids, not the tables of positions and types."""
    try:
        tokens = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return chosen
    # an encoder-decoder only keeps the table that it names; its two halves look up in modules tied to it
    tied = {
        n: m
        for n, m in chosen.items()
        if m is not tokens and getattr(m, "weight", m) is getattr(tokens, "weight", None)
    }
    return tied or {n: m for n, m in chosen.items() if m is tokens} or chosen


def _nothing(modules: dict[str, nn.Module], entry: str, pattern: str, hits: dict[str, nn.Module]) -> tuple[str, str]:
    """What is wrong with an entry that names no layer, and a hint."""
    if hits:
        name, module = next(iter(hits.items()))
        if strange(module):
            return unknown(module), ""
        inside = sorted({n.rpartition(".")[2] for n, m in modules.items() if n.startswith(f"{name}.") and kind_of(m)})
        what = f"`{entry}` is a {type(module).__name__}, not a layer with a weight matrix"
        return what, f"inside it are {', '.join(inside)}" if inside else ""
    layers = [n for n, m in modules.items() if kind_of(m) is not None]
    words = list(dict.fromkeys([n.rpartition(".")[2] for n in layers])) + list(PRESET_NAMES)
    last = pattern.rpartition(".")[2]
    return f"`{entry}` matches no layer", suggestion(last, words)


def _layers(model: nn.Module, problems: list[Problem]) -> str:
    """The model's layers for a hint, unless one of the problems has shown them already."""
    if any("this model's layers:" in problem.fix for problem in problems):
        return ""
    lines = tree(model).splitlines() or ["none that can be adapted"]
    return "this model's layers:\n" + "\n".join(f"        {line}" for line in lines)


def blocked(model: nn.Module, name: str) -> str | None:
    """Why a layer of a known kind cannot be adapted where it is, or None where it can."""
    reason = obstacle(model.get_submodule(name))
    if reason:
        return reason
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weight and never calls it: an adapter there would do nothing"
    if isinstance(parent, nn.TransformerEncoderLayer):
        return "nn.TransformerEncoderLayer reads its weight when it evaluates: an adapter would act in training only"
    return None
