"""plan: a model, a method and targets become a checked, printable Plan; nothing is touched."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import nn

from lorary.errors import MethodError, PlanError, Problem, nearest, once
from lorary.packing import packable, packed_already
from lorary.past import Learnt, with_past
from lorary.placed import Placed, with_rank
from lorary.plans import FullParameter, Plan, human_bytes
from lorary.preconditions import not_ready, not_words, unwritable
from lorary.record import Method
from lorary.sites import KINDS, kind_of, site
from lorary.storage.foreign import stored
from lorary.targets import Found, blocked, collapse, head_names, listed, matches, resolve
from lorary.weights import held, is_packed
from lorary.words import Init, Storage


def plan(
    model: nn.Module,
    method: Method,
    targets: str | Sequence[str] | None = None,
    *,
    ranks: Mapping[str, int] | None = None,
    alphas: Mapping[str, float] | None = None,
    exclude: str | Sequence[str] = (),
    after: Sequence[Learnt] = (),
) -> Plan:
    """Where a method goes in a model, and what that costs. Touches nothing; works on a meta-device model.

    Args:
        model: any module; a Transformers model's output head is left out of `all-linear`.
        method: what `lorary.method` made.
        targets: presets (`all-linear`, `attention`, `attention-qv`, `mlp`, `embedding`, `conv`), whole-component
            names (`q_proj`), globs (`*.layers.1?.*`), projections of fused weights (`c_attn[q,v]`). None: the
            method's own, which is `all-linear` for most.
        ranks: site pattern -> rank; the first pattern that matches wins.
        alphas: site pattern -> alpha, likewise.
        exclude: what not to adapt, written like targets.
        after: the adapters of earlier tasks, which stay as they are beneath the new one (O-LoRA).

    Raises:
        PlanError: every problem at once, with the nearest names and the model's layers where a target names none.
    """
    problems = not_ready(model) + not_words(method, ranks, alphas)
    if problems:
        raise PlanError("cannot plan for this model:", problems)
    if method.context is not None:
        context = method.context.planned(model)
        method = method.replace(context=context)
        problems += [Problem("context", *found) for found in context.problems(model)]
    targets = usual_targets(method) if targets is None else targets
    found: list[Found] = []
    if method.delta is not None:
        found, wrong = resolve(model, targets, exclude)
        problems += wrong
    else:  # targets have a default, so only what was certainly said can be wrong
        for field, value in (("ranks", ranks), ("alphas", alphas), ("exclude", exclude)):
            if value:
                problems.append(Problem(field, "makes sense for adapted layers only, and this method adapts none"))
    placed = _place(found, method, ranks or {}, alphas or {}, problems)
    placed, given, past = with_past(model, placed, after)
    problems += past
    full = _full_parameters(model, method, placed, problems)
    for p in placed:
        problems += p.problems()
    packed = packable(model, method.storage, {f.name for f in full})
    problems += _pack_problems(model, method, placed, packed)
    if problems:
        raise PlanError("invalid plan:", problems)
    total, size = _sizes(model, method.storage, packed)
    notes = [*_rank_notes(placed), *_tie_notes(model, placed), *_head_notes(model, method, full), *_coarse_notes(full)]
    notes += _pack_notes(model, placed, method.storage, packed)
    notes += method.context.notes(model) if method.context else []
    if "all-linear" in listed(targets):
        notes += _reach_notes(model, placed, total)
    return Plan(method, tuple(placed), tuple(full), total, size, tuple(notes), given, tuple(packed))


def usual_targets(method: Method) -> tuple[str, ...]:
    """The targets of a method where nobody says any."""
    return ("all-linear",) if method.context is None else tuple(method.context.targets)


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
    names: set[str] = set()
    for pattern, hits in _asked(model, method).items():
        if not hits and not (pattern == "norms" and any(map(_is_norm, model.modules()))):  # they may have no weights
            problems.append(_no_parameter(pattern, list(parameters)))
        names |= hits
    if _NEW_HEAD.search(type(model).__name__):
        heads = head_names(model)
        names |= {name for name in parameters if any(name.startswith(f"{head}.") for head in heads)}
    sites = {f"{p.site.name}.weight" for p in placed}
    sites |= {f"{p.site.name}.bias" for p in placed if p.delta.biases}
    weights = {known for name, known in _paths(model) if name in sites}
    for name in sorted(names & weights):
        what = "is adapted and trains in full as well: the adapter would have nothing of its own to learn"
        problems.append(Problem(name, what, "exclude the site, or narrow `full`"))
    for name in sorted(names):
        path, _, last = name.rpartition(".")
        if last != "bias" and is_packed(model.get_submodule(path)):
            problems.append(Problem(name, "is packed and cannot train in full", "leave it out of `full`"))
        elif not torch.is_floating_point(parameters[name]):
            problems.append(Problem(name, f"is {parameters[name].dtype} and cannot train in full"))
    written = _written(model, method, placed, problems)
    return [
        FullParameter(n, tuple(t.shape), t.numel() * t.element_size(), n in names)
        for n, t in parameters.items()
        if n in names | written
    ]


def _paths(model: nn.Module) -> list[tuple[str, str]]:
    """(path, the first path of the same parameter) of every parameter: a tied one has several."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return [(name, first[id(p)]) for name, p in model.named_parameters(remove_duplicate=False)]


def _asked(model: nn.Module, method: Method) -> dict[str, set[str]]:
    """Pattern of `full` -> the parameters that it means, tied ones by their first path."""
    sorts, paths = _sorts(model) if method.full else {}, _paths(model)
    return {
        pattern: {known for name, known in paths if name in sorts.get(pattern, ()) or _covers(pattern, name)}
        for pattern in method.full
    }


def _sorts(model: nn.Module) -> dict[str, set[str]]:
    """What `full` can say of parameters by what their layer is, whatever its name: the paths that it means."""
    found: dict[str, set[str]] = {"embeddings": set(), "norms": set()}
    for path, module in model.named_modules(remove_duplicate=False):
        own = dict(module.named_parameters(path, recurse=False))
        if kind_of(module) == "embedding":
            found["embeddings"] |= own.keys()
        elif _is_norm(module) and all(t.dim() <= 1 for t in own.values()):
            found["norms"] |= own.keys()
    return found


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _written(model: nn.Module, method: Method, placed: list[Placed], problems: list[Problem]) -> set[str]:
    """The adapted weights, where a rule of the method writes them."""
    names = {f"{p.site.name}.weight" for p in placed} if any(rule.writes_base for rule in method.rules) else set()
    problems += unwritable(model, method, names)
    return names


def _pack_problems(model: nn.Module, method: Method, placed: list[Placed], packed: list[str]) -> list[Problem]:
    """Why the base cannot be kept as the method says, or an init cannot take a part of it."""
    layers, init = dict(model.named_modules()), cast(Init, method.init)
    late = [p.site.name for p in placed if init is not None and init.moves_base and is_packed(layers[p.site.name])]
    problems = once(packed_already(name, init) for name in late)
    if not method.storage.writable and not packed and not any(map(is_packed, layers.values())):
        what = f"{type(method.storage).__name__} has nothing to pack: plain linear layers, without the output head"
        problems.append(Problem("storage", what))
    return problems


def _sizes(model: nn.Module, storage: Storage, packed: Sequence[str]) -> tuple[int, int]:
    """(numbers, bytes) of the base, these layers packed; tied parameters count once."""
    layers = {id(held(m)[0]): m for m in model.modules() if is_packed(m)}.values()
    theirs = {id(t) for m in layers for t in held(m)}
    unique = {id(p): p for p in model.parameters() if id(p) not in theirs}.values()
    total = sum(p.numel() for p in unique) + sum(math.prod(KINDS[str(kind_of(m))].size(m)) for m in layers)
    size = sum(p.numel() * p.element_size() for p in unique) + sum(map(stored, layers))
    for name in packed:
        weight = model.get_parameter(f"{name}.weight")
        n, width = weight.numel(), weight.element_size()
        size += storage.bytes(n, width) - n * width
    return total, size


def _pack_notes(model: nn.Module, placed: list[Placed], storage: Storage, packed: list[str]) -> list[str]:
    if storage.writable:
        return []
    name, notes = type(storage).__name__, []
    if packed:
        weights = [model.get_parameter(f"{layer}.weight") for layer in packed]
        now = human_bytes(sum(storage.bytes(w.numel(), w.element_size()) for w in weights))
        was = human_bytes(sum(w.numel() * w.element_size() for w in weights))
        notes.append(f"{name} packs {len(packed)} layers, in {now} instead of {was}")
    there = {name for name, module in model.named_modules() if is_packed(module)}
    rest = [p.site.name for p in placed if p.site.name not in there | set(packed)]
    if rest:
        sites = ", ".join(text for text, _ in collapse(rest))
        notes.append(f"{sites} stays as it is: {name} packs linear layers whose weight is theirs alone")
    return notes


def _covers(pattern: str, name: str) -> bool:
    """Whether a pattern names this parameter, or a module that holds it."""
    components = name.split(".")
    return any(matches(pattern, ".".join(components[: i + 1])) for i in range(len(components)))


def _no_parameter(pattern: str, names: list[str]) -> Problem:
    if pattern == "bias":
        what = "this model has no biases (models of the Llama kind have none): there is nothing to train"
        return Problem("full", what, "use another method")
    near = nearest(pattern, names + list({".".join(n.split(".")[-2:]) for n in names}))
    return Problem("full", f"`{pattern}` matches no parameter", f"did you mean {' or '.join(near)}?" if near else "")


def _rank_notes(placed: list[Placed]) -> list[str]:
    """Sites where two factors hold more numbers than the matrix that they stand for."""
    wasteful = [p for p in placed if p.r * (p.site.out + p.site.inp) > p.site.out * p.site.inp]
    if not wasteful:
        return []
    sites = ", ".join(text for text, _ in collapse(p.site.name for p in wasteful))
    return [f"the factors are larger than the weight itself at {sites}: a lower rank loses nothing"]


def _coarse_notes(full: list[FullParameter]) -> list[str]:
    """Base parameters that train in 16 bits, where small steps are rounded away."""
    coarse = [f.name for f in full if f.trains and f.bytes < 4 * f.size]
    if not coarse:
        return []
    names = ", ".join(text for text, _ in collapse(coarse))
    return [f"{names} would train in 16 bits, where small steps are rounded away: load the base in float32"]


def _tie_notes(model: nn.Module, placed: list[Placed]) -> list[str]:
    """Adapted weights that other layers hold too: an adapter acts on one use, which gets its own copy when merged."""
    holders: dict[int, list[str]] = {}
    for path, module in model.named_modules():  # a layer under two paths is one layer, and adapted under both
        for name, parameter in module.named_parameters(path, recurse=False):
            holders.setdefault(id(parameter), []).append(name)
    notes = []
    for p in placed:
        own = f"{p.site.name}.weight"
        W = model.get_submodule(p.site.name)._parameters.get("weight")  # a packed layer may have none
        others = [n for n in holders.get(id(W), []) if n != own]
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
    asked = set().union(*_asked(model, method).values())
    heads = [f.name for f in full if f.name not in asked]
    return [f"the new head trains in full: {', '.join(heads)}"] if heads else []
