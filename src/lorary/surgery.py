"""attach, detach, disabled, merge, unmerge: what a plan does to a model, and the way back, bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorary.adapted import Adapted, adapted
from lorary.errors import PlanError, Problem, StateError
from lorary.fingerprint import STATE, Fingerprint
from lorary.placed import Placed
from lorary.planning import Plan
from lorary.record import Method
from lorary.sites import Site, kind_of, site


@dataclass
class Attached:
    """What a model remembers while adapters are attached, so that everything can be put back.

    Args:
        method: the method.
        placed: the adapted sites.
        full: base parameters that train in full -> their values before training.
        trained: the names of parameters that required gradients before.
        paths: site -> every path of its layer, more than one for a shared layer.
        fingerprint: of the base, taken before anything changed or was sharded.
        merged: once merged, site -> what the merge replaced: weight, bias and the adapted layer.
        tied: the parameters that a merge untied from each other: module, name, and what it held there before.
        off: how many `disabled` blocks the model is in.
    """

    method: Method
    placed: tuple[Placed, ...]
    full: dict[str, Tensor]
    trained: frozenset[str]
    paths: dict[str, list[str]]
    fingerprint: Fingerprint
    merged: dict[str, tuple[nn.Parameter, nn.Parameter | None, Adapted]] | None = None
    tied: list[tuple[nn.Module, str, nn.Parameter]] | None = None
    off: int = 0


def attached(model: nn.Module) -> Attached | None:
    """What is attached to a model, or None."""
    return cast("Attached | None", getattr(model, STATE, None))


def require(model: nn.Module, verb: str) -> Attached:
    """What is attached to a model.

    Raises:
        StateError: nothing is, it has been merged, or it is disabled for now.
    """
    state = attached(model)
    if state is None:
        raise StateError(
            f"there is nothing to {verb}:", [Problem("model", "no adapter is attached", "attach one first")]
        )
    if state.merged is not None:
        raise StateError(f"cannot {verb}:", [Problem("model", "the adapter is merged", "unmerge it first")])
    if state.off and verb != "disable":
        what, fix = "the adapter is disabled, and the model has the base's values", "leave the `disabled` block first"
        raise StateError(f"cannot {verb}:", [Problem("model", what, fix)])
    return state


def attach(model: nn.Module, plan: Plan, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Do what the plan says, in place: adapters at its sites, everything else frozen. Nothing moves yet.

    Args:
        model: the model that was planned, or one of the same shapes (a plan made on the meta device fits).
        plan: what `lorary.plan` made.
        seed: of the adapters' start; each site draws from the seed and its own name.
        dtype: of the learnt tensors.

    Returns:
        The same model.

    Raises:
        StateError: something is attached already.
        PlanError: the plan was made for another model; every mismatch.
    """
    place(model, plan.method, plan.placed, {f.name: f.shape for f in plan.full}, dtype=dtype)
    for layer in adapted(model).values():
        layer.initialise(seed)
    return model


def place(
    model: nn.Module,
    method: Method,
    placed: tuple[Placed, ...],
    full: Mapping[str, tuple[int, ...]],
    *,
    dtype: torch.dtype = torch.float32,
    tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Put adapters at the sites, zero or with the given tensors, freeze the rest, and remember the way back."""
    if attached(model) is not None:
        what = "something is attached already"
        raise StateError("cannot attach:", [Problem("model", what, "detach it first, or use lorary.switch")])
    modules, problems = dict(model.named_modules()), []
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for p in placed:
        problems += mismatch(p.site, modules.get(p.site.name))
    for name, shape in full.items():
        if name not in parameters:
            problems.append(Problem(name, "the model has no such parameter"))
        elif tuple(parameters[name].shape) != tuple(shape):
            problems.append(Problem(name, f"is {tuple(parameters[name].shape)}, expected {tuple(shape)}"))
    if problems:
        raise PlanError("this does not fit the model:", problems)
    paths = _paths(model, placed)
    fingerprint = Fingerprint.of(model)
    trained = frozenset(name for name, t in parameters.items() if t.requires_grad)
    model.requires_grad_(False)
    for p in placed:
        layer = Adapted(modules[p.site.name], p, dtype)
        layer.train(modules[p.site.name].training)
        if tensors is not None:
            layer.load(dict(tensors[p.site.name]))
        for path in paths[p.site.name]:
            _set(model, path, layer)
    kept = {}
    for name in full:
        kept[name] = parameters[name].detach().to("cpu" if not parameters[name].is_meta else "meta", copy=True)
        parameters[name].requires_grad_(True)
    object.__setattr__(model, STATE, Attached(method, placed, kept, trained, paths, fingerprint))


def mismatch(expected: Site, layer: nn.Module | None) -> list[Problem]:
    """How a model's layer differs from the site that was planned or saved."""
    if layer is None:
        return [Problem(expected.name, "the model has no such module")]
    if kind_of(layer) is None:
        return [Problem(expected.name, f"is of class {type(layer).__name__}, expected a layer of kind {expected.kind}")]
    found = site(expected.name, layer)
    problems = []
    # a linear layer and GPT-2's transposed one are the same matrix
    if found.kind != expected.kind and {found.kind, expected.kind} != {"linear", "transposed"}:
        problems.append(Problem(expected.name, f"is {found.kind}, expected {expected.kind}"))
    for side in ("out", "inp", "groups"):
        if getattr(found, side) != getattr(expected, side):
            words = {"out": "output features", "inp": "input features", "groups": "groups"}[side]
            what = f"has {getattr(found, side)} {words}, expected {getattr(expected, side)}"
            problems.append(Problem(expected.name, what))
    if expected.window and found.window and expected.window != found.window:
        problems.append(Problem(expected.name, f"has a window of {found.window}, expected {expected.window}"))
    return problems


def _paths(model: nn.Module, placed: tuple[Placed, ...]) -> dict[str, list[str]]:
    """Every path of every site's layer: a shared layer must be replaced wherever it is used."""
    by_layer: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        by_layer.setdefault(id(module), []).append(name)
    return {p.site.name: by_layer[id(model.get_submodule(p.site.name))] for p in placed}


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, last = path.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def base_parameter(model: nn.Module, name: str) -> nn.Parameter:
    """A base parameter by its path in the plain model, wherever an adapter has moved it to."""
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    return cast(nn.Parameter, getattr(module, last))


def detach(model: nn.Module) -> nn.Module:
    """Take the adapters off: the very base, bit for bit, with the layers, values and flags that it had.

    Raises:
        StateError: nothing is attached, or it has been merged (unmerge first).
    """
    state = require(model, "detach")
    for name, value in state.full.items():
        parameter = base_parameter(model, name)
        parameter.grad = None  # it was that of another value
        with torch.no_grad():
            parameter.copy_(value)
    for name, layer in adapted(model).items():
        for path in state.paths[name]:
            _set(model, path, layer.base)
    object.__delattr__(model, STATE)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in state.trained)
    return model


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within, the model is its base: adapters do nothing, and parameters that train in full have their old values."""
    state = require(model, "disable")
    layers = list(adapted(model).values())
    before = [layer.enabled for layer in layers]
    tuned = {name: base_parameter(model, name) for name in state.full}
    values = {name: parameter.data for name, parameter in tuned.items()}
    state.off += 1
    try:
        for layer in layers:
            layer.enabled = False
        for name, parameter in tuned.items():
            parameter.data = state.full[name].to(parameter)
        yield model
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled
        for name, parameter in tuned.items():
            parameter.data = values[name]
        state.off -= 1


def merge(model: nn.Module, *, keep: bool = False) -> nn.Module:
    """Fold the adapters into plain layers: W' and b' in fp32 or better, rounded once to the weight's own precision.

    All or nothing: every merged weight is computed and checked before the first layer changes. Where an adapted
    weight was shared (tied embeddings), every use gets a weight of its own and the model's configuration says that
    they are no longer tied.

    Args:
        model: a model with adapters attached.
        keep: keep the pristine weights and the adapters, so that `unmerge` can put them back; otherwise they go.

    Raises:
        StateError: nothing is attached or it is merged already; or a merged weight is not finite, naming every one.
    """
    state = require(model, "merge")
    layers = adapted(model)
    problems = []
    for name, layer in layers.items():
        W, b = _rounded(layer)
        if not W.is_meta and not (W.isfinite().all() and (b is None or b.isfinite().all())):
            problems.append(Problem(name, f"merged, the weight is not finite in {W.dtype}"))
    if problems:
        raise StateError("cannot merge:", problems)
    shared, untied, state.merged = _shared(model), False, {}
    for name, layer in layers.items():
        weight, bias = cast(nn.Parameter, layer.base.weight), cast("nn.Parameter | None", layer.bias)
        W, b = _rounded(layer)
        layer.base.weight = nn.Parameter(W, requires_grad=False)
        if b is not None:
            layer.base.bias = nn.Parameter(b, requires_grad=False)
        for path in state.paths[name]:
            _set(model, path, layer.base)
        untied |= id(weight) in shared
        if keep:
            state.merged[name] = (weight, bias, layer)
    state.tied = _untie(model) if untied else None
    if not keep:
        object.__delattr__(model, STATE)
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Undo `merge(model, keep=True)`: the kept weights and adapters go back, bit for bit.

    Raises:
        StateError: nothing was merged, or it was not kept.
    """
    state = attached(model)
    if state is None or state.merged is None:
        what = "nothing is merged here, or the merge did not keep what it replaced"
        raise StateError("cannot unmerge:", [Problem("model", what, "merge with keep=True")])
    for name, (weight, bias, layer) in state.merged.items():
        layer.base.weight = weight
        if bias is not None:
            layer.base.bias = bias
        elif getattr(layer.base, "bias", None) is not None:
            layer.base.bias = cast(Any, None)
        for path in state.paths[name]:
            _set(model, path, layer)
    if state.tied is not None:
        _config(model).tie_word_embeddings = True
        for module, name, parameter in state.tied:
            setattr(module, name, parameter)
    state.merged, state.tied = None, None
    return model


def _rounded(layer: Adapted) -> tuple[Tensor, Tensor | None]:
    """(W', b') in the layout and precision of the layer's own weight."""
    W, b = layer.merged()
    dtype = layer.weight.dtype
    return layer.kind.weight(layer.base, W).to(dtype), None if b is None else b.to(dtype)


def _shared(model: nn.Module) -> set[int]:
    """The parameters that more than one layer holds."""
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    return {key for key, count in holders.items() if count > 1}


def _config(model: nn.Module) -> Any:
    return getattr(model, "config", None)


def _untie(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]] | None:
    """Say in the model's configuration that nothing is tied, and make it true: whoever shared now has its own copy.

    A checkpoint of the model is read by what its configuration says; BERT's ties its output bias, too.
    """
    config = _config(model)
    if not getattr(config, "tie_word_embeddings", False):
        return None
    config.tie_word_embeddings = False
    seen: set[int] = set()
    shared: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                shared.append((module, name, parameter))
            seen.add(id(parameter))
    for module, name, parameter in shared:
        setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad))
    return shared
