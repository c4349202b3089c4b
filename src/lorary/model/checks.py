"""Reasons against planning, attaching or quantising, all found before anything changes."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import nn

from lorary.errors import Diagnostic, StateError, not_a
from lorary.layers.kinds import kind_of, site
from lorary.layers.quantized_weight import is_foreign, stored_tensors, weight
from lorary.layers.wrappers import is_sharded_model, named_modules, unwrapped
from lorary.model.scan import Scan
from lorary.spec.interfaces import Rule
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite, inconsistent_ties
from lorary.spec.site import Site


def not_ready(scan: Scan) -> list[Diagnostic]:
    """Why a model cannot be planned for yet."""
    model = scan.model
    if problems := peft_layers((path, m.module) for path, m in scan.modules.items()):
        return problems
    if any(type(m.module).__name__ == "Adapted" for m in scan.modules.values()):
        return [Diagnostic("model", "has adapters attached", "detach them first")]
    if scan.modules[""].kind is not None:
        what = f"is a single {type(model).__name__}"
        return [Diagnostic("model", what, "put it into a module: nn.Sequential(layer)")]
    return [
        Diagnostic(name, "has no shape before the model has seen its first input", "run the model once")
        for name, parameter in scan.parameters.items()
        if isinstance(parameter, nn.parameter.UninitializedParameter)
    ]


def changeable(model: Any, verb: str, *, trains: bool = False) -> Any:
    """The model inside its wrappers, if it can be changed.

    Args:
        model: the argument of a public function.
        verb: the refused action, for the error.
        trains: whether parameters are added that will train.

    Raises:
        StateError: it is not a module; PEFT's layers are in it; FSDP holds its parameters; or DDP would not see
            parameters that are added.
    """
    problems = not_a_module(model) or peft_layers(named_modules(model))
    if not problems and is_sharded_model(model):
        what = "is sharded by FSDP, which puts its own parameters back into the layers in every forward pass"
        problems.append(Diagnostic("model", what, f"{verb} first and shard then, or use a copy that is not sharded"))
    if not problems and trains and isinstance(model, nn.parallel.DistributedDataParallel):
        what = "is wrapped in DistributedDataParallel, which averages the gradients of the parameters it was made with"
        problems.append(Diagnostic("model", what, f"{verb} first, and wrap the model then"))
    if problems:
        raise StateError(f"cannot {verb}:", problems)
    return unwrapped(model)


def peft_layers(modules: Iterable[tuple[str, nn.Module]]) -> list[Diagnostic]:
    """The error of a model that PEFT has adapted, recognised by the modules of its classes, without importing it."""
    found = {}
    for path, module in modules:
        if _is_pefts(cast(Any, type(module))):
            found[path] = type(module)
    if not found:
        return []
    if "" in found:
        what = f"is a {found[''].__name__} of PEFT, with PEFT's adapter inside its layers"
        fix = "use model.merge_and_unload(), or model.unload() for the base without the adapter"
    else:
        name, cls = next(iter(found.items()))
        what = f"has PEFT's layers inside, such as the {cls.__name__} at {name}"
        fix = "load the base without PEFT's adapter"
    return [Diagnostic("model", what, f"{fix}; an adapter that PEFT has saved is read by lorary.load(base, folder)")]


@functools.cache
def _is_pefts(cls: type) -> bool:
    packages = {above.__module__.partition(".")[0] for above in cls.__mro__}
    return "peft" in packages and "lorary" not in packages  # `in_transformers` is both for `isinstance`


def not_a_module(model: Any) -> list[Diagnostic]:
    """The error of an argument that is not a module."""
    return not_a(nn.Module, "a torch.nn.Module", model=model)


def bad_arguments(method: Any, ranks: Any, alphas: Any) -> list[Diagnostic]:
    """The arguments of `plan` with a wrong type."""
    problems = []
    if not isinstance(method, Method):
        what = f"is a {type(method).__name__}, not a Method"
        problems.append(Diagnostic("method", what, 'make one: lorary.method("lora", r=16)'))
    for field, value in (("ranks", ranks), ("alphas", alphas)):
        if value is not None and not isinstance(value, Mapping):
            what = f"is {value!r}, not a mapping from site patterns to numbers"
            problems.append(Diagnostic(field, what, f'write {field}={{"*.down_proj": 4}}'))
    return problems


def unwritable_weights(scan: Scan, rules: Iterable[Rule], names: Iterable[str]) -> list[Diagnostic]:
    """Why one of the rules cannot write these weights: it needs at least 32 bits, and a weight that is not tied."""
    writer = next((type(rule).__name__ for rule in rules if rule.writes_base), "a rule")
    holders = Counter(scan.names.values())
    problems = []
    for name in sorted(set(names)):
        if scan.is_quantised(name.rpartition(".")[0]):
            problems.append(Diagnostic(name, f"is quantised, and {writer} writes it", "load the base in float32"))
            continue
        if name not in scan.names:
            continue
        W = scan.parameter(name)
        if W.dtype.itemsize < 4:
            what = f"is {str(W.dtype).removeprefix('torch.')}, and {writer} adds small changes to it"
            problems.append(Diagnostic(name, f"{what}: rounding would lose most of them", "load the base in float32"))
        if holders[scan.names[name]] > 1:
            what = f"is shared with another layer, and {writer} writes it"
            problems.append(Diagnostic(name, what, "exclude the site, or untie the weights"))
    return problems


def blocks_gradient(scan: Scan, names: Iterable[str]) -> list[Diagnostic]:
    """Layers quantised by other libraries whose kernels silently block gradients.

    Probes a copy of one layer per class: some kernels repack their weight on first use.
    """
    problems, probed = [], set()
    for name in names:
        layer = scan.module(name)
        classes = (type(layer), type(getattr(layer, "weight", None)))
        if layer is None or classes in probed or not is_foreign(layer) or scan.modules[name].kind != "linear":
            continue
        if stored_tensors(layer)[0].is_meta:
            continue
        probed.add(classes)
        try:
            blocked = _blocks_gradient(layer)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # a layer that cannot run here fails when it is used
            continue
        if blocked:
            kind = getattr(layer, "weight", layer) if type(layer) is nn.Linear else layer
            what = f"{type(kind).__name__} lets no gradient through: the layers before it could not be trained"
            problems.append(Diagnostic(name, what, "load the base in a trainable format"))
    return problems


@torch.enable_grad()
def _blocks_gradient(layer: nn.Module) -> bool:
    """Whether a copy of a linear layer gives an output without a gradient."""
    probe: Any = copy.deepcopy(layer).train()
    W = weight(layer)
    y = probe(torch.zeros(1, probe.in_features, dtype=W.dtype, device=W.device, requires_grad=True))
    return not y.requires_grad


def not_quantizable(scan: Scan, names: Iterable[str]) -> list[Diagnostic]:
    """Why layers cannot be quantised: a weight that is not finite, or a replaced forward that would be lost."""
    problems = []
    for name in names:
        layer = scan.module(name)
        if layer is None:
            continue
        if "forward" in vars(layer):
            what = "its forward was replaced, by Accelerate or by hand, and the quantised layer would not use it"
            problems.append(Diagnostic(name, what, "quantise the base before that, as lorary.load_quantized does"))
        W = weight(layer)
        double = W.dtype == torch.float64
        bad = 0 if W.is_meta else int((~(W.float() if double else W).isfinite()).sum())
        if bad:
            where = "NaN or infinite in 32 bits" if double else "NaN or infinite"
            what = f"{bad:,} of {W.numel():,} numbers of its weight are {where}, and cannot be quantised"
            problems.append(Diagnostic(name, what, "repair the base, or leave the layer out"))
    return problems


def model_mismatches(
    scan: Scan, sites: tuple[AdaptedSite, ...], full: Mapping[str, tuple[int, ...]], quantized: Iterable[str]
) -> list[Diagnostic]:
    """The differences between a model and the one that a plan was made for."""
    problems = [problem for p in sites for problem in layer_mismatches(p.site, scan.module(p.site.name))]
    for name, shape in full.items():
        if name not in scan.names and name not in scan.buffers:
            problems.append(Diagnostic(name, "the model has no such parameter"))
        elif (found := tuple(scan.tensor(name).shape)) != tuple(shape):
            problems.append(Diagnostic(name, f"is {found}, expected {tuple(shape)}"))
    if not torch.is_inference_mode_enabled() and any(t.is_inference() for t in scan.parameters.values()):
        what = "its weights were created in torch.inference_mode() and cannot be trained or changed outside of it"
        problems.append(Diagnostic("model", what, "create the model outside inference mode"))
    problems += inconsistent_ties(sites)
    problems += [] if problems else _several_devices(scan, sites)
    problems += [Diagnostic(path, "the model has no such module") for path in quantized if path not in scan.modules]
    return problems


def _several_devices(scan: Scan, sites: tuple[AdaptedSite, ...]) -> list[Diagnostic]:
    """Sites that share tensors and lie on several devices."""
    devices: dict[str, set[str]] = {}
    for p in sites:
        if p.share or p.delta.shared:
            devices.setdefault(p.share, set()).add(str(stored_tensors(scan.modules[p.site.name].module)[0].device))
    fix = "adapt the layers of one device, or use another method"
    return [
        Diagnostic("model", f"its layers lie on {', '.join(sorted(several))}, and share tensors of one device", fix)
        for several in devices.values()
        if len(several) > 1
    ]


def layer_mismatches(expected: Site, layer: nn.Module | None) -> list[Diagnostic]:
    """How a model's layer differs from a planned or saved site."""
    if layer is None:
        return [Diagnostic(expected.name, "the model has no such module")]
    if kind_of(layer) is None:
        what = f"is of class {type(layer).__name__}, expected a layer of kind {expected.kind}"
        return [Diagnostic(expected.name, what)]
    return site_mismatches(expected, site(expected.name, layer))


# GPT-2's transposed layer, and the output projection of nn.MultiheadAttention, are linear layers of the same matrix
_SAME_MATRIX = {"linear", "transposed", "out_projection"}


def site_mismatches(expected: Site, found: Site) -> list[Diagnostic]:
    """How the site of a model's layer differs from a planned or saved one."""
    if found == expected:
        return []
    differences = []
    if found.kind != expected.kind and not {found.kind, expected.kind} <= _SAME_MATRIX:
        differences.append(f"is {found.kind}, expected {expected.kind}")
    for field, name in (
        ("out_features", "output features"),
        ("in_features", "input features"),
        ("groups", "groups"),
        ("experts", "experts"),
    ):
        if (here := getattr(found, field)) != (there := getattr(expected, field)):
            differences.append(f"has {here} {name}, expected {there}")
    if expected.kernel_size and found.kernel_size and expected.kernel_size != found.kernel_size:
        differences.append(f"has a kernel of {found.kernel_size}, expected {expected.kernel_size}")
    return [Diagnostic(expected.name, what) for what in differences]
