"""quantize, dequantize: the layers of a model in another storage and back, one at a time."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar, cast

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from lorary.errors import Diagnostic, StateError
from lorary.layers.kinds import kind_of, was_transposed
from lorary.layers.nf4 import NF4, NF4Linear
from lorary.layers.quantized_weight import in_place_of, is_foreign, is_quantized, weight
from lorary.model.checks import not_a_module, not_quantizable, not_ready
from lorary.model.fingerprint import STATE, Fingerprint
from lorary.model.scan import Scan, scan
from lorary.spec.fields import field_errors
from lorary.spec.interfaces import Init, Storage

T = TypeVar("T")


def quantize(model: nn.Module, storage: Storage | None = None) -> nn.Module:
    """Pack every linear layer of a model but its output head, in place, one at a time.

    What it was is given up: that is what saves the memory. Adapters of the plain model still fit.

    Args:
        model: a model without adapters. Attaching a method that packs (`qlora`) does the same by itself.
        storage: how; NF4 with double quantisation where nothing is said.

    Returns:
        The same model.

    Raises:
        StateError: adapters are attached, a weight is not finite, or there is nothing to pack. Every reason.
    """
    storage = NF4() if storage is None else storage
    names = _names_to_pack(model, storage)
    with mode(model):
        remember(model)
        for name in shown(names, "packing"):
            replace(model, name, storage.quantize(model.get_submodule(name)))
    return model


def _names_to_pack(model: nn.Module, storage: Storage) -> list[str]:
    """The layers to pack, by name: a scan kept meanwhile would keep every dense weight.

    Raises:
        StateError: every reason why the model cannot be packed.
    """
    problems = not_a_module(model)
    found = None if problems else scan(model)
    problems += [*(not_ready(found) if found else ()), *not_quantizing(storage)]
    if not problems and hasattr(model, STATE):
        problems.append(Diagnostic("model", "has adapters attached", "detach them first"))
    names: list[str] = []
    if found and not problems:
        names = quantizable_layers(found, storage)
        problems += not_quantizable(found, names)
        if not names:
            problems.append(Diagnostic("model", "has no layer to pack: plain linear ones, without the output head"))
    if problems:
        raise StateError("cannot quantise:", problems)
    return names


def not_quantizing(storage: Any) -> list[Diagnostic]:
    """Why this is no storage to pack into."""
    if isinstance(storage, type) or not isinstance(storage, Storage) or storage.writable:
        return [Diagnostic("storage", f"{storage!r} packs nothing", "say NF4()")]
    return [Diagnostic("storage", what) for what in field_errors(storage)]


def mode(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """In inference mode new tensors could never be trained, and so they are made outside of it; unless the base's
    own weights come from there, which can be used nowhere else."""
    inside = torch.is_inference_mode_enabled() and any(t.is_inference() for t in model.parameters())
    return cast("contextlib.AbstractContextManager[None]", torch.inference_mode(inside))


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Make every packed layer a plain one that computes the same, in place: W = Dq(Wq).

    Args:
        model: a model without adapters.
        dtype: of the plain weights; None for the precision that each was packed from, or where another library has
            packed it, for that of the model's plain weights.

    Raises:
        StateError: adapters are attached, or the precision is none that holds a weight.
    """
    problems = [] if isinstance(model, nn.Module) else [Diagnostic("model", f"is a {type(model).__name__}")]
    if hasattr(model, STATE):
        problems.append(Diagnostic("model", "has adapters attached", "merge or detach them first"))
    if dtype is not None and not holds_weights(dtype):
        problems.append(Diagnostic("dtype", f"is {dtype!r}", "use torch.bfloat16 or torch.float32"))
    if problems:
        raise StateError("cannot dequantise:", problems)
    names = [name for name, module in model.named_modules() if name and is_quantized(module)]
    with mode(model):
        for name in shown(names, "unpacking"):
            layer = model.get_submodule(name)
            W = weight(layer)
            replace(model, name, dequantized_layer(layer, W.to(dtype or precision(model, layer) or W.dtype)))
    settle_config(model)
    return model


def holds_weights(dtype: Any) -> bool:
    """Whether this is a precision of plain weights: of at least 16 bits."""
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1


def quantizable_layers(scan: Scan, storage: Storage, full: Collection[str] = ()) -> list[str]:
    """The layers that a storage packs, in the model's order.

    Not the output head, nothing that other modules hold or read as well, nothing that trains in full, and nothing that
    the architecture wants in 32 bits.

    Args:
        scan: of the model.
        storage: the word.
        full: the base parameters that train in full.
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
        and f"{path}.weight" not in full
        and not exact & set(path.split("."))
    ]


def exact_modules(model: nn.Module) -> set[str]:
    """The components of module paths that a Transformers architecture wants in 32 bits."""
    return {name for key in ("", "_strict") for name in getattr(model, f"_keep_in_fp32_modules{key}", None) or ()}


def already_quantized(name: str, init: Init) -> Diagnostic:
    """Why an init cannot start at a part of this layer's weight."""
    what = f"is packed already, and {type(init).__name__} would take a part of it"
    return Diagnostic(name, what, "load the base in full precision: qlora quantises the residual")


class QuantizationWarning(UserWarning):
    """An adapter meets a base that is packed in another way than the one that it was trained on."""


def warn_of_quantization(modules: Mapping[str, nn.Module], storage: Storage) -> None:
    """Say where an adapter of a packed base meets one that has been packed otherwise: its function is another one.

    Args:
        modules: of the base.
        storage: the adapter's.
    """
    trained = [getattr(storage, name, None) for name in ("block", "double")]
    if None in trained:
        return
    layers = [m for m in modules.values() if isinstance(m, NF4Linear)]
    others = [m for m in layers if [m.block, m.nested_absmax is not None] != trained]
    if others:
        text = (
            f"the adapter was trained on a base in {storage}; {len(others):,} of {len(layers):,} packed layers here "
            f"are in blocks of {others[0].block} with double={others[0].nested_absmax is not None}, and what packing "
            "has lost of them is not what it was trained on. Load the base packed as it was"
        )
        warnings.warn(text, QuantizationWarning, stacklevel=5)


def remember(model: nn.Module) -> None:
    """Let a model keep the fingerprint that it has, for packing changes every parameter that is packed."""
    Fingerprint.of(model).remember(model)


def replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer wherever the model holds the one at this path."""
    old = model.get_submodule(name)
    paths = [path for path, module in model.named_modules(remove_duplicate=False) if module is old]
    for path in paths:
        model.set_submodule(path, layer)


def precision(model: nn.Module, layer: nn.Module) -> torch.dtype | None:
    """What a layer becomes that another library has packed: the precision of the model's plain weights.

    Not all of them keep the precision that they were packed from, and those that do may compute in another one.
    None for a layer that is plain or that lorary has packed, and for a model without plain weights.
    """
    if not is_foreign(layer):
        return None
    plains = (m for m in model.modules() if not is_quantized(m))
    own = (p for m in plains for p in m.parameters(recurse=False) if p.is_floating_point())
    return next((p.dtype for p in own if p.dtype.itemsize > 1), None)


def settle_config(model: nn.Module) -> None:
    """Let a Transformers model in which nothing is packed any more not say that it is: it would be read as such."""
    quantiser: Any = getattr(model, "hf_quantizer", None)
    if quantiser is None or any(map(is_quantized, model.modules())):
        return
    quantiser.remove_quantization_config(model)
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        vars(model).pop(flag, None)


def dequantized_layer(layer: nn.Module, W: Tensor, b: Tensor | None = None) -> nn.Module:
    """A plain frozen layer of the class that a packed one took the place of.

    Args:
        layer: the packed layer.
        W: its weight from now on, as `weight(layer)` gives it.
        b: its bias; None for its own.
    """
    made = _without_values(layer)
    if kind_of(layer) == "linear":
        W = W.T.contiguous() if was_transposed(layer) else W
        b = getattr(layer, "bias", None) if b is None else b
        made.bias = None if b is None else nn.Parameter(b.detach().to(W.dtype), requires_grad=False)
    made.weight = nn.Parameter(W.detach(), requires_grad=False)
    return in_place_of(layer, made)


def _without_values(layer: Any) -> Any:
    """The plain layer that a packed one took the place of: GPT-2's own, or files would hold its weights transposed."""
    with torch.device("meta"):
        if kind_of(layer) == "embedding":
            return nn.Embedding(layer.num_embeddings, layer.embedding_dim, layer.padding_idx)
        if was_transposed(layer):
            return layer.source_cls(layer.out_features, layer.in_features)
        return nn.Linear(layer.in_features, layer.out_features, bias=False)


def shown(things: list[T], doing: str) -> Iterable[T]:
    """With a progress bar on a terminal."""
    if not sys.stderr.isatty():
        return things
    return track(things, doing, console=Console(stderr=True), transient=True)
