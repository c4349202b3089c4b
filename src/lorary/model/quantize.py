"""quantize, dequantize: the layers of a model in another storage and back."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from lorary.errors import Diagnostic, StateError, caller_stacklevel
from lorary.layers.experts import ExpertMatrix
from lorary.layers.kinds import kind_of, was_transposed
from lorary.layers.nf4 import NF4, NF4Experts, NF4Linear
from lorary.layers.quantized_weight import is_foreign, is_quantized, take_place_of, weight
from lorary.layers.transformers_internals import exact_modules
from lorary.layers.wrappers import named_modules, set_submodule, submodule
from lorary.model.ambient import mode_independent
from lorary.model.checks import changeable, not_quantizable, not_ready
from lorary.model.fingerprint import STATE, Fingerprint
from lorary.model.scan import Scan, scan
from lorary.model.undo import all_or_nothing
from lorary.spec.fields import field_errors
from lorary.spec.interfaces import Init, Storage

T = TypeVar("T")


@mode_independent
def quantize(model: nn.Module, storage: Storage | None = None) -> nn.Module:
    """Quantise every linear layer and fused expert of a model except its output head, in place.

    All or nothing: after any exception the model is as it was before. So the dense weights are freed at the end, all at
    once; `lorary.load_quantized` quantises a checkpoint without ever holding all of them. Adapters of the plain model
    still fit.

    Args:
        model: a model without adapters. Attaching a method that quantises (`qlora`) does the same by itself.
        storage: how; by default NF4 with double quantisation.

    Returns:
        The same model.

    Raises:
        StateError: adapters are attached, a weight is not finite, or there is nothing to quantise. Every reason.
    """
    storage = NF4() if storage is None else storage
    inner = changeable(model, "quantise")
    paths = _paths_to_quantize(inner, storage)
    with all_or_nothing(inner):
        Fingerprint.of(inner).remember(inner)  # quantising changes parameters
        quantize_layers(inner, paths, storage)
    return model


def quantize_layers(model: nn.Module, paths: Sequence[str], storage: Storage) -> None:
    """Quantise the layers at these paths, one at a time."""
    for path in with_progress(paths, "quantising"):
        replace_layer(model, path, storage.quantize(submodule(model, path)))


def _paths_to_quantize(model: nn.Module, storage: Storage) -> list[str]:
    """The paths of the layers to quantise.

    Raises:
        StateError: every reason why the model cannot be quantised.
    """
    scanned = scan(model)
    problems = [*not_ready(scanned), *bad_storage(storage)]
    if not problems and hasattr(model, STATE):
        problems.append(Diagnostic("model", "has adapters attached", "detach them first"))
    paths: list[str] = []
    if not problems:
        paths = quantizable_layers(scanned, storage)
        problems += not_quantizable(scanned, paths)
        if not paths:
            problems.append(Diagnostic("model", "has no plain linear layer to quantise besides its output head"))
    if problems:
        raise StateError("cannot quantise:", problems)
    return paths


def bad_storage(storage: Any) -> list[Diagnostic]:
    """The errors of a storage: it does not quantise, or has invalid fields."""
    if isinstance(storage, type) or not isinstance(storage, Storage) or storage.writable:
        return [Diagnostic("storage", f"{storage!r} does not quantise", "pass NF4()")]
    return [Diagnostic("storage", what) for what in field_errors(storage)]


@mode_independent
def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Make every quantised layer a plain one with the same function, in place: W = Dq(Wq). All or nothing.

    Args:
        model: a model without adapters.
        dtype: of the plain weights; None for the precision before quantisation or, for a layer that another library
            quantised, that of the model's plain weights.

    Raises:
        StateError: adapters are attached, or the precision cannot hold weights.
    """
    inner = changeable(model, "dequantise")
    problems = []
    if hasattr(inner, STATE):
        problems.append(Diagnostic("model", "has adapters attached", "merge or detach them first"))
    if dtype is not None and not holds_weights(dtype):
        problems.append(Diagnostic("dtype", f"is {dtype!r}", "use torch.bfloat16 or torch.float32"))
    if problems:
        raise StateError("cannot dequantise:", problems)
    paths = [path for path, module in named_modules(inner) if path and is_quantized(module)]
    with all_or_nothing(inner):
        for path in with_progress(paths, "dequantising"):
            layer = submodule(inner, path)
            W = weight(layer)
            W = W.to(dtype or dequantized_dtype(inner, layer) or W.dtype)
            replace_layer(inner, path, dequantized_layer(layer, W))
        remove_quantization_config(inner)
    return model


def holds_weights(dtype: Any) -> bool:
    """Whether plain weights can have this dtype: floating-point numbers of at least 16 bits."""
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1


def quantizable_layers(scan: Scan, storage: Storage, full: Collection[str] = ()) -> list[str]:
    """The paths of the layers that a storage quantises, in the model's order.

    Left out: the output head, weights that other modules hold or read too, weights that train in full, and modules that
    the architecture keeps in 32 bits.

    Args:
        scan: of the model.
        storage: the storage.
        full: the names of the base parameters that train in full.
    """
    exact = exact_modules(scan.model)
    return [
        path
        for path, m in scan.modules.items()
        if path
        and m.why_not_adaptable is None
        and not m.tied_to
        and path not in scan.heads
        and storage.quantizes(m.module)
        and m.weight_name not in full
        and not exact & set(path.split("."))
    ]


def already_quantized(name: str, init: Init) -> Diagnostic:
    """Why an init that decomposes the weight cannot start at a quantised one."""
    what = f"is quantised already, and {type(init).__name__} has to subtract its start from the weight"
    return Diagnostic(name, what, "load the base in full precision: qlora quantises the residual")


class QuantizationWarning(UserWarning):
    """An adapter is attached to a base quantised in another way than the one it was trained on."""


def warn_of_quantization(modules: Mapping[str, nn.Module], storage: Storage) -> None:
    """Warn about a base that is quantised in other blocks than an adapter's own, with another quantisation error.

    Args:
        modules: of the base.
        storage: of the adapter's method.
    """
    trained = [getattr(storage, name, None) for name in ("block", "double")]
    if None in trained:
        return
    layers = [m for m in modules.values() if isinstance(m, NF4Linear | NF4Experts)]
    others = [m for m in layers if [m.block, m.nested_absmax is not None] != trained]
    if others:
        text = (
            f"the adapter was trained on a base in {storage}; {len(others):,} of {len(layers):,} quantised layers here "
            f"are in blocks of {others[0].block} with double={others[0].nested_absmax is not None}, and have another "
            "quantisation error. Quantise the base as the adapter says"
        )
        warnings.warn(text, QuantizationWarning, stacklevel=caller_stacklevel())


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in place of the one at this path, at every path that it has; a fused parameter is in one place."""
    old = submodule(model, name)
    paths = [path for path, module in named_modules(model, remove_duplicate=False) if module is old] or [name]
    for path in paths:
        set_submodule(model, path, layer)


def dequantized_dtype(model: nn.Module, layer: nn.Module) -> torch.dtype | None:
    """The dtype for the dense weight of a layer that another library quantised: that of the model's plain weights.

    Some libraries do not keep the dtype before quantisation, and some compute in another one. None for a plain layer,
    a layer quantised by lorary, and a model without plain weights.
    """
    if not is_foreign(layer):
        return None
    plain = (m for m in model.modules() if not is_quantized(m))
    return next((p.dtype for m in plain for p in m.parameters(recurse=False) if holds_weights(p.dtype)), None)


def remove_quantization_config(model: nn.Module) -> None:
    """Remove the quantisation config of a Transformers model without quantised layers: it would be loaded by it."""
    quantiser: Any = getattr(model, "hf_quantizer", None)
    if quantiser is None or any(map(is_quantized, model.modules())):
        return
    quantiser.remove_quantization_config(model)
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        vars(model).pop(flag, None)


def dequantized_layer(layer: nn.Module, W: Tensor, b: Tensor | None = None) -> nn.Module:
    """A plain frozen layer in place of a quantised one, of the class from before quantisation.

    Args:
        layer: the quantised layer.
        W: the weight, in the layout of `weight(layer)`.
        b: the bias; None for the layer's own.
    """
    plain = _plain_without_values(layer)
    if kind_of(layer) == "linear":
        W = W.T.contiguous() if was_transposed(layer) else W
        b = getattr(layer, "bias", None) if b is None else b
        plain.bias = None if b is None else nn.Parameter(b.detach().to(W.dtype), requires_grad=False)
    elif isinstance(layer, NF4Experts) and layer.layout.transposed:
        W = W.mT.contiguous()
    plain.weight = nn.Parameter(W.detach(), requires_grad=False)
    return take_place_of(layer, plain)


def _plain_without_values(layer: Any) -> Any:
    """The plain form of a quantised layer on the meta device; GPT-2's keeps its class, whose files are transposed."""
    with torch.device("meta"):
        if isinstance(layer, NF4Experts):
            return ExpertMatrix(nn.Parameter(torch.empty(layer.shape)), layer.layout, layer.order)
        if kind_of(layer) == "embedding":
            return nn.Embedding(layer.num_embeddings, layer.embedding_dim, layer.padding_idx)
        if was_transposed(layer):
            return layer.source_cls(layer.out_features, layer.in_features)
        return nn.Linear(layer.in_features, layer.out_features, bias=False)


def with_progress(items: Sequence[T], label: str) -> Iterable[T]:
    """The items, with a progress bar on a terminal; without items there is none."""
    if not items or not sys.stderr.isatty():
        return items
    return track(items, label, console=Console(stderr=True), transient=True)
