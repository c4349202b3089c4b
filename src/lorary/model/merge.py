"""merge, unmerge: adapters folded into plain layers, and the way back, bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorary.errors import Diagnostic, StateError, caller_stacklevel, deduplicated
from lorary.layers.adapted import Adapted, adapted_layers
from lorary.layers.quantized_weight import is_quantized, swap_hooks
from lorary.model.ambient import mode_independent
from lorary.model.bias_flags import BiasFlags, BiasWarning, enable_bias_flags, restore_bias_flags, unserialisable_biases
from lorary.model.checks import changeable
from lorary.model.fingerprint import STATE, Fingerprint
from lorary.model.in_transformers import adopt, release
from lorary.model.quantize import dequantized_dtype, dequantized_layer, holds_weights, remove_quantization_config
from lorary.model.state import AttachedState, Merged, TiedParameter, require_attached, set_submodules, state_of
from lorary.model.tied_config import tie_config, untie_config
from lorary.model.undo import all_or_nothing
from lorary.spec.join import not_mergeable

LOSSY = "the steps between 4-bit or 8-bit numbers are coarser than what an adapter changes, and rounding would undo it"


@mode_independent
def merge(model: nn.Module, *, keep: bool = False, dtype: torch.dtype | None = None) -> nn.Module:
    """Fold the adapters into plain layers: W' and b' in fp32 or better, rounded once to the weight's own precision.

    All or nothing: every merged weight is computed and checked before the first layer changes, and any later exception,
    an interrupt or lack of memory included, leaves the model as it was. So the merged weights need memory beside the
    original ones. If an adapted weight was shared (tied embeddings), every use gets a weight of its own and the model's
    configuration says that they are no longer tied; unless all uses have the same update (`rows`): those stay tied.
    A layer without a bias gets one if the method changes it (GLoRA), and the configuration says so if it can;
    otherwise a warning names the biases that a checkpoint would lose.

    Training-only changes are removed (LongLoRA's shifted attention); RoPE scaling stays, in the configuration too.

    A quantised layer becomes a plain one, Dq(Wq) + s B A, the function that was trained: quantising the sum would lose
    most of the adapter. Layers without an adapter stay quantised; `lorary.dequantize` makes them plain as well.

    Args:
        model: a model with adapters attached.
        keep: keep the original weights and the adapters, so that `unmerge` can put them back.
        dtype: of the merged weights; None for each weight's own. For a quantised one that is the precision before it
            was quantised or, if another library did it, that of the model's plain weights.

    Raises:
        StateError: nothing is attached or it is merged already; no plain layer has the function of an adapted one; the
            dtype cannot hold the adapter's update; or a merged weight is not finite, naming every one.
    """
    inner = changeable(model, "merge")
    require_attached(inner, "merge")
    with all_or_nothing(inner):
        fold(inner, keep=keep, dtype=dtype)
    return model


def fold(model: nn.Module, *, keep: bool = False, dtype: torch.dtype | None = None) -> None:
    """`merge` of a model that is not needed if it fails: each weight is freed as soon as it is merged.

    Args:
        model: without wrappers around it.
        keep: as for `merge`.
        dtype: as for `merge`.

    Raises:
        StateError: as `merge`; nothing has changed then.
    """
    state = require_attached(model, "merge")
    layers = adapted_layers(model)
    _check(model, layers, dtype)
    if state.holder is not None:
        state.holder.keep(model, state)
    release(model)
    if state.context_patch:
        state.context_patch.make_permanent()
    shared = {id(parameter) for *_, parameter in _tied_parameters(model)}
    together = _tied_together(model, layers)
    tables: dict[int, nn.Parameter] = {}  # tied layers' tensors -> their merged weight
    untied, state.merged, created = False, {}, set()
    for name, layer in layers.items():
        merged = _merge_layer(model, layer, dtype)
        if name in together:
            merged.plain.weight = tables.setdefault(id(layer.params), cast(nn.Parameter, merged.plain.weight))
        swap_hooks(layer, merged.plain)
        layer.merge_into(merged.plain)  # its own base may have the delta now
        set_submodules(model, state.paths[name], merged.plain)
        if merged.bias is None and getattr(merged.plain, "bias", None) is not None:
            created |= {f"{path}.bias" for path in state.paths[name]}
        alone = id(merged.weight) in shared and name not in together
        untied |= alone or isinstance(state.replaced_weights.get(name), nn.Parameter)
        if keep:
            state.merged[name] = merged
    state.tied = untie_parameters(model, bool(state.untied)) if untied else None
    state.bias_flags = enable_bias_flags(model, created)
    for problem in deduplicated(unserialisable_biases(model)) if created else ():
        warnings.warn(f"{problem.where}: {problem.what}", BiasWarning, stacklevel=caller_stacklevel())
    if not keep:
        for mode in state.evaluating:
            mode.revert(model.training)
        object.__delattr__(model, STATE)
        Fingerprint.forget(model)  # it was of the weights before
        remove_quantization_config(model)


def _check(model: nn.Module, layers: Mapping[str, Adapted], dtype: torch.dtype | None) -> None:
    """Refuse a precision that cannot hold weights, and merged weights that are not finite.

    Raises:
        StateError: every reason.
    """
    if dtype is not None and not holds_weights(dtype):
        fix = "use torch.bfloat16 or torch.float32"
        raise StateError("cannot merge:", [Diagnostic("dtype", f"is {dtype}: {LOSSY}", fix)])
    problems = not_mergeable((name, layer.join) for name, layer in layers.items())
    for name, layer in {} if problems else layers.items():
        W, b = _rounded(model, layer, dtype)
        if not W.is_meta and not (W.isfinite().all() and (b is None or b.isfinite().all())):
            problems.append(Diagnostic(name, f"merged, the weight is not finite in {W.dtype}"))
    if problems:
        raise StateError("cannot merge:", problems)


def _merge_layer(model: nn.Module, layer: Adapted, dtype: torch.dtype | None) -> Merged:
    """The plain layer with the function of an adapted one, and what it replaces."""
    weight, bias = cast(nn.Parameter, layer.weight), cast("nn.Parameter | None", layer.bias)
    W, b = _rounded(model, layer, dtype)
    plain = layer.base
    if is_quantized(plain):
        plain = dequantized_layer(plain, W, b)
    else:
        plain.weight = nn.Parameter(W, requires_grad=False)
        if b is not None:
            plain.bias = nn.Parameter(b, requires_grad=False)
    return Merged(weight, bias, layer, plain, W.dtype)


@mode_independent
def unmerge(model: nn.Module) -> nn.Module:
    """Undo `merge(model, keep=True)`: the kept weights and adapters go back, bit for bit. All or nothing.

    Raises:
        StateError: nothing was merged, or the merge kept nothing.
    """
    inner = changeable(model, "unmerge")
    state = state_of(inner)
    if state is None or state.merged is None:
        what = "nothing is merged here, or the merge did not keep what it replaced"
        raise StateError("cannot unmerge:", [Diagnostic("model", what, "merge with keep=True")])
    with all_or_nothing(inner):
        _unmerge(inner, state, state.merged)
    return model


def _unmerge(model: nn.Module, state: AttachedState, sites: Mapping[str, Merged]) -> None:
    for name, merged in sites.items():
        _unmerge_layer(merged)
        merged.layer.merge_into(None)
        swap_hooks(merged.plain, merged.layer)
        set_submodules(model, state.paths[name], merged.layer)
    if state.tied is not None:
        tied, configs = state.tied
        tie_config(configs)
        for module, name, parameter in tied:
            parameter.data = parameter.data.to(getattr(module, name))
            setattr(module, name, parameter)
    restore_bias_flags(model, state.bias_flags)
    if state.context_patch:
        state.context_patch.reapply()
    state.merged, state.tied, state.bias_flags = None, None, BiasFlags()
    adopt(model)


def _unmerge_layer(merged: Merged) -> None:
    """Give an adapted layer its weight and bias back, in the mode, device and precision that the model has now."""
    weight, bias, layer, plain, dtype = merged
    here = cast(Tensor, plain.weight)
    target: Any = here.device if here.dtype == dtype else here  # the precision of the merge itself is undone
    layer.train(plain.training)
    layer.params.to(here.device)
    if layer.shared is not None:
        layer.shared.to(here.device)
    if plain is not layer.base:  # the base is quantised
        layer.base.to(target)
        return
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            parameter.data = parameter.data.to(target)
        if parameter is not None or getattr(layer.base, name, None) is not None:
            setattr(layer.base, name, parameter)


def _rounded(model: nn.Module, layer: Adapted, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    """(W', b') in the layout of the plain layer, in this precision or the weight's own, in memory of their own."""
    W, b = layer.merged()
    dtype = (dequantized_dtype(model, layer.base) or layer.dtype) if dtype is None else dtype
    return layer.kind.weight(layer.base, W).to(dtype), None if b is None else b.to(dtype, copy=True)


def _tied_parameters(model: nn.Module) -> list[TiedParameter]:
    """The parameters that an earlier module of the model holds too."""
    seen: set[int] = set()
    tied = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                tied.append((module, name, parameter))
            seen.add(id(parameter))
    return tied


def _tied_together(model: nn.Module, layers: Mapping[str, Adapted]) -> set[str]:
    """The sites whose merged weights are equal, and stay tied: every layer with that weight has the same update."""
    holders: dict[int, set[int]] = {}  # id of a weight -> the layers that hold it
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), set()).add(id(module))
    updated: dict[tuple[int, int], dict[int, str]] = {}  # (weight, tensors) -> layers
    for name, layer in layers.items():
        if layer.join.keeps_ties and not is_quantized(layer.base):
            updated.setdefault((id(layer.weight), id(layer.params)), {})[id(layer.base)] = name
    return {name for (weight, _), own in updated.items() if own.keys() == holders[weight] for name in own.values()}


def untie_parameters(model: nn.Module, already: bool) -> tuple[list[TiedParameter], list[Any]] | None:
    """Give every holder of a tied parameter its own copy, and say so in the model's configuration.

    A checkpoint of the model is read by its configuration, and BERT's ties its output bias too. With `already` the
    configuration has been changed at attach, because an adapter moved one of the weights.

    Returns:
        The replaced parameters and the changed configurations; None if these tie nothing.
    """
    configs = untie_config(model)
    if not (already or configs):
        return None
    tied = _tied_parameters(model)
    for module, name, parameter in tied:
        setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad))
    return tied, configs
