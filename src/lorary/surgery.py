"""attach, detach, disabled: what a plan does to a model, and the way back, bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from lorary.adapted import Adapted, Shared, adapted
from lorary.biases import Room
from lorary.errors import PlanError, Problem, StateError
from lorary.fingerprint import STATE, Fingerprint
from lorary.placed import Placed
from lorary.planning import Plan
from lorary.record import Method
from lorary.sites import Site, kind_of, site
from lorary.words import Init, Join

MASTERS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # what adapters may be learnt in


@dataclass
class Attached:
    """What a model remembers while adapters are attached, so that everything can be put back.

    Args:
        method: the method.
        placed: the adapted sites.
        full: base parameters that train in full -> their values before training.
        trained: the names of parameters that required gradients before.
        paths: site -> every path of its layer, more than one for a shared layer.
        moved: site -> what its weight was before the base gave up a part of it: the values, on the CPU, or the
            parameter itself where others hold it too and the layer got one of its own.
        fingerprint: of the base, taken before anything changed or was sharded.
        merged: once merged, site -> what the merge replaced: weight, bias and the adapted layer.
        tied: the parameters that a merge untied from each other: module, name, and what it held there before.
        room: what a merge did to the model so that it may have biases which it had not.
        off: how many `disabled` blocks the model is in.
    """

    method: Method
    placed: tuple[Placed, ...]
    full: dict[str, Tensor]
    trained: frozenset[str]
    paths: dict[str, list[str]]
    fingerprint: Fingerprint
    moved: dict[str, Tensor] = field(default_factory=dict)
    merged: dict[str, tuple[nn.Parameter, nn.Parameter | None, Adapted]] | None = None
    tied: list[tuple[nn.Module, str, nn.Parameter]] | None = None
    room: Room = field(default_factory=Room)
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
        PlanError: the plan was made for another model; every mismatch. Or it is no plan, or the dtype cannot learn.
    """
    problems = []
    if not isinstance(plan, Plan):
        problems.append(
            Problem("plan", f"is a {type(plan).__name__}, not a Plan", "make one: lorary.plan(model, method)")
        )
    if dtype not in MASTERS:
        known = ", ".join(str(d) for d in MASTERS)
        problems.append(Problem("dtype", f"{dtype!r} is no precision to learn in", f"known: {known}"))
    if problems:
        raise PlanError("cannot attach:", problems)
    place(model, plan.method, plan.placed, {f.name: f.shape for f in plan.full}, dtype=dtype)
    try:
        layers = list(adapted(model).values())
        if layers and layers[0].shared is not None:
            cast(Init, plan.method.init).share(layers[0].shared.tensors)
        for layer in layers:
            layer.initialise(seed)
            _give_up(model, layer)
            with torch.no_grad():
                cast(Join, layer.method.join).setup(layer)
    except BaseException:
        detach(model)  # all or nothing
        raise
    return model


def place(
    model: nn.Module,
    method: Method,
    placed: tuple[Placed, ...],
    full: Mapping[str, tuple[int, ...]],
    *,
    dtype: torch.dtype = torch.float32,
    tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
    base: Fingerprint | None = None,
) -> None:
    """Put adapters at the sites, zero or with the given tensors, freeze the rest, and remember the way back.

    Whoever has the base's fingerprint already gives it along: taking it reads a little of every parameter.
    """
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
    paths, fingerprint = _paths(model, placed), base or Fingerprint.of(model)
    trained = frozenset(name for name, t in parameters.items() if t.requires_grad)
    layers, kept = {}, {}  # all of them before the model changes: memory may run out on the way
    shared = _shared(model, placed, dtype)
    for p in placed:
        layer = layers[p.site.name] = Adapted(modules[p.site.name], p, dtype, shared)
        layer.train(modules[p.site.name].training)
        if tensors is not None:
            layer.load(tensors[p.site.name])
        if tensors is not None and shared is not None:
            shared.load({role: tensors[p.site.name][role] for role in p.delta.shared})
    for name in full:
        kept[name] = parameters[name].detach().to("cpu" if not parameters[name].is_meta else "meta", copy=True)
    model.requires_grad_(False)
    for name, layer in layers.items():
        for path in paths[name]:
            set_layer(model, path, layer)
    for name in full:
        parameters[name].requires_grad_(True)
    object.__setattr__(model, STATE, Attached(method, placed, kept, trained, paths, fingerprint))
    if tensors is not None:
        for layer in layers.values():
            _give_up(model, layer)


def _shared(model: nn.Module, placed: tuple[Placed, ...], dtype: torch.dtype) -> Shared | None:
    """The bank of what all sites share, or None where they share nothing."""
    if not any(p.delta.shared for p in placed):
        return None
    first = base_parameter(model, f"{placed[0].site.name}.weight")
    return Shared(placed, dtype, first.device)


def _give_up(model: nn.Module, layer: Adapted) -> None:
    """Where the delta does not start at zero, the base becomes W - s B A of its start; what it was is kept.

    A weight that other layers hold as well stays theirs, and this one gets its own.
    """
    factors = layer.start_factors()
    weight = cast(nn.Parameter, layer.weight)
    if factors is None or weight.is_meta:
        return
    state, kind = cast(Attached, attached(model)), layer.kind
    exact = torch.promote_types(weight.dtype, torch.float32)
    with torch.no_grad():
        B, A = (factor.to(weight.device, exact) for factor in factors)
        rest = torch.addmm(kind.matrix(layer.base).to(exact), B, A, alpha=-layer.scale)
        rest = kind.weight(layer.base, rest).to(weight.dtype)
        if sum(held is weight for m in model.modules() for held in m._parameters.values()) > 1:
            state.moved[layer.site.name] = weight
            layer.base.weight = nn.Parameter(rest, requires_grad=False)
        else:
            state.moved[layer.site.name] = weight.detach().to("cpu", copy=True)
            weight.copy_(rest)


def take_back(layer: Adapted, before: Tensor) -> None:
    """Give a layer the weight that it had before it gave up a part of it."""
    if isinstance(before, nn.Parameter):
        layer.base.weight = before
    else:
        with torch.no_grad():
            cast(nn.Parameter, layer.weight).copy_(before)


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


def set_layer(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path of the model."""
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
        if name in state.moved:
            take_back(layer, state.moved[name])
        for path in state.paths[name]:
            set_layer(model, path, layer.base)
    object.__delattr__(model, STATE)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in state.trained)
    return model


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within, the model is its base: adapters do nothing, and parameters that were changed have their old values."""
    state = require(model, "disable")
    layers = list(adapted(model).values())
    enabled = [layer.enabled for layer in layers]
    tuned = [(base_parameter(model, name), before) for name, before in state.full.items()]
    # weights that others hold come last: they may have moved for these, and have their values back by then
    moved = sorted(state.moved.items(), key=lambda item: isinstance(item[1], nn.Parameter))
    tuned += [(base_parameter(model, f"{site}.weight"), before) for site, before in moved]
    values = [parameter.data for parameter, _ in tuned]
    state.off += 1
    try:
        for layer in layers:
            layer.enabled = False
        for parameter, before in tuned:
            parameter.data = before.data.to(parameter)
        yield model
    finally:
        for layer, was in zip(layers, enabled, strict=True):
            layer.enabled = was
        for (parameter, _), value in zip(tuned, values, strict=True):
            parameter.data = value
        state.off -= 1
