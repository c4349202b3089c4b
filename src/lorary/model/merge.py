"""merge, unmerge: adapters folded into plain layers, and the way back, bit for bit."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorary.errors import Diagnostic, StateError, deduplicated
from lorary.layers.adapted import Adapted, adapted_layers
from lorary.layers.quantized_weight import is_quantized
from lorary.model.bias_flags import BiasFlags, BiasWarning, enable_bias_flags, restore_bias_flags, unserialisable_biases
from lorary.model.fingerprint import STATE, Fingerprint
from lorary.model.quantize import dequantized_layer, holds_weights, precision, settle_config
from lorary.model.state import Merged, require, state_of

LOSSY = "the steps between 4-bit or 8-bit numbers are coarser than what an adapter changes, and rounding would undo it"


def merge(model: nn.Module, *, keep: bool = False, dtype: torch.dtype | None = None) -> nn.Module:
    """Fold the adapters into plain layers: W' and b' in fp32 or better, rounded once to the weight's own precision.

    All or nothing: every merged weight is computed and checked before the first layer changes. Where an adapted
    weight was shared (tied embeddings), every use gets a weight of its own and the model's configuration says that
    they are no longer tied. A layer that had no bias gets one where the method changes it (GLoRA), and the
    configuration says so, if it can: otherwise a warning names the biases that a checkpoint would lose.

    What was for training alone goes (LongLoRA's attention in groups); positions that are divided stay so, and the
    configuration says it.

    A packed layer becomes a plain one, Dq(Wq) + s B A, which is what was trained: packing the sum anew would lose what
    the adapter has learnt. Layers without an adapter stay packed; `lorary.dequantize` makes them plain as well.

    Args:
        model: a model with adapters attached.
        keep: keep the pristine weights and the adapters, so that `unmerge` can put them back; otherwise they go.
        dtype: of the merged weights; None for each weight's own, of a packed one the precision that it came in,
            or where another library has packed it, that of the model's plain weights.

    Raises:
        StateError: nothing is attached or it is merged already; the dtype cannot hold what was learnt; or a merged
            weight is not finite, naming every one.
    """
    state = require(model, "merge")
    if dtype is not None and not holds_weights(dtype):
        fix = "use torch.bfloat16 or torch.float32"
        raise StateError("cannot merge:", [Diagnostic("dtype", f"is {dtype}: {LOSSY}", fix)])
    layers = adapted_layers(model)
    problems = []
    for name, layer in layers.items():
        W, b = _rounded(model, layer, dtype)
        if not W.is_meta and not (W.isfinite().all() and (b is None or b.isfinite().all())):
            problems.append(Diagnostic(name, f"merged, the weight is not finite in {W.dtype}"))
    if problems:
        raise StateError("cannot merge:", problems)
    if state.context_patch:
        state.context_patch.settle()
    shared, untied, state.merged, created = _shared(model), False, {}, set()
    for name, layer in layers.items():
        weight, bias = cast(nn.Parameter, layer.weight), cast("nn.Parameter | None", layer.bias)
        W, b = _rounded(model, layer, dtype)
        merged = layer.base
        if is_quantized(layer.base):
            merged = dequantized_layer(layer.base, W, b)
        else:
            merged.weight = nn.Parameter(W, requires_grad=False)
            if b is not None:
                merged.bias = nn.Parameter(b, requires_grad=False)
        if b is not None and bias is None:
            created |= {f"{path}.bias" for path in state.paths[name]}
        for path in state.paths[name]:
            model.set_submodule(path, merged)
        untied |= id(weight) in shared or isinstance(state.replaced_weights.get(name), nn.Parameter)
        if keep:
            state.merged[name] = Merged(weight, bias, layer, merged, W.dtype)
    state.tied = _untie(model, state.untied) if untied else None
    state.bias_flags = enable_bias_flags(model, created)
    if created and (lost := unserialisable_biases(model)):
        for problem in deduplicated(lost):
            warnings.warn(f"{problem.where}: {problem.what}", BiasWarning, stacklevel=2)
    if not keep:
        object.__delattr__(model, STATE)
        Fingerprint.forget(model)  # its weights are others now
        settle_config(model)
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Undo `merge(model, keep=True)`: the kept weights and adapters go back, bit for bit.

    Raises:
        StateError: nothing was merged, or it was not kept.
    """
    state = state_of(model)
    if state is None or state.merged is None:
        what = "nothing is merged here, or the merge did not keep what it replaced"
        raise StateError("cannot unmerge:", [Diagnostic("model", what, "merge with keep=True")])
    for name, (weight, bias, layer, merged, rounded) in state.merged.items():
        here = cast(Tensor, merged.weight)
        place: Any = here.device if here.dtype == rounded else here  # a precision said to merge is not to stay
        layer.train(merged.training)  # the model may have changed its mode, device or precision meanwhile
        layer.params.to(here.device)
        if layer.shared is not None:
            layer.shared.to(here.device)
        if merged is not layer.base:
            layer.base.to(place)
        else:
            for parameter in (weight, bias):
                if parameter is not None:
                    parameter.data = parameter.data.to(place)
            layer.base.weight = weight
            if bias is not None:
                layer.base.bias = bias
            elif getattr(layer.base, "bias", None) is not None:
                layer.base.bias = cast(Any, None)
        for path in state.paths[name]:
            model.set_submodule(path, layer)
    if state.tied is not None:
        _config(model).tie_word_embeddings = not state.untied
        for module, name, parameter in state.tied:
            parameter.data = parameter.data.to(getattr(module, name))
            setattr(module, name, parameter)
    restore_bias_flags(model, state.bias_flags)
    if state.context_patch:
        state.context_patch.reapply()
    state.merged, state.tied, state.bias_flags = None, None, BiasFlags()
    return model


def _rounded(model: nn.Module, layer: Adapted, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    """(W', b') in the layout of the plain layer, in this precision or the weight's own, in memory of their own."""
    W, b = layer.merged()
    dtype = (precision(model, layer.base) or layer.dtype) if dtype is None else dtype
    return layer.kind.weight(layer.base, W).to(dtype), None if b is None else b.to(dtype, copy=True)


def _shared(model: nn.Module) -> set[int]:
    """The parameters that more than one layer holds."""
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    return {key for key, count in holders.items() if count > 1}


def _config(model: nn.Module) -> Any:
    return getattr(model, "config", None)


def _untie(model: nn.Module, already: bool) -> list[tuple[nn.Module, str, nn.Parameter]] | None:
    """Say in the model's configuration that nothing is tied, and make it true: whoever shared now has its own copy.

    A checkpoint of the model is read by what its configuration says; BERT's ties its output bias, too. An adapter
    that has moved one of the weights has said so `already`.
    """
    config = _config(model)
    if not (already or getattr(config, "tie_word_embeddings", False)):
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
