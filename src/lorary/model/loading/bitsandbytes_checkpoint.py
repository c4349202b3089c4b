"""bitsandbytes' 4-bit checkpoints as Transformers saves them, read and written without bitsandbytes.

The weights are in the usual safetensors files, their format in `quantization_config` of config.json. lorary adds the
fingerprint of the base before quantisation, so that adapters of either fit.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lorary.errors import Diagnostic, FileError, StateError
from lorary.files.atomic import atomic_directory
from lorary.files.safe_open import checked_path
from lorary.layers.bitsandbytes_state import STATE as QUANT_STATE
from lorary.layers.bitsandbytes_state import read_state
from lorary.layers.kinds import kind_of
from lorary.layers.nf4 import NF4Embedding, NF4Experts, NF4Linear
from lorary.layers.quantized_weight import is_quantized
from lorary.layers.transformers_internals import should_convert_module
from lorary.layers.wrappers import is_wrapper, unwrapped
from lorary.model.ambient import mode_independent
from lorary.model.fingerprint import STATE, Fingerprint

KEYS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", QUANT_STATE, QUANT_STATE.replace("nf4", "fp4"))
_BASE = "lorary_base"  # in config.json: the fingerprint of the plain base
_DTYPES = ("float32", "bfloat16", "float16")


# --- reading ----------------------------------------------------------------------------------------------------------


def _quantization_settings(config: PretrainedConfig) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint as a mapping."""
    found = getattr(config, "quantization_config", None) or {}
    return found if isinstance(found, dict) else dict(found.to_dict())


def unreadable(config: PretrainedConfig) -> list[Diagnostic]:
    """Why a quantised checkpoint cannot be read here: every reason."""
    settings = _quantization_settings(config)
    method, where = settings.get("quant_method"), "config.json: quantization_config"
    fix = "load it with Transformers and the library that wrote it; lorary adapts those layers"
    four, eight = (settings.get(f"load_in_{n}bit", settings.get(f"_load_in_{n}bit", False)) for n in (4, 8))
    if str(getattr(method, "value", method)) != "bitsandbytes" and not four and not eight:
        return [Diagnostic(where, f"quantised with {method}, but only bitsandbytes' NF4 is read here", fix)]
    if eight or not four:
        return [Diagnostic(where, "quantised by bitsandbytes to 8 bits, but only its NF4 is read here", fix)]
    problems = []
    kind, compute = settings.get("bnb_4bit_quant_type", "fp4"), settings.get("bnb_4bit_compute_dtype", "float32")
    if kind != "nf4":
        problems.append(Diagnostic(where, f"bnb_4bit_quant_type is {kind!r}, but only 'nf4' is read here", fix))
    if compute not in _DTYPES:
        what = f"bnb_4bit_compute_dtype is {compute!r}, expected one of {', '.join(_DTYPES)}"
        problems.append(Diagnostic(where, what))
    return problems


def compute_of(config: PretrainedConfig) -> str:
    """The compute precision of a quantised checkpoint's layers."""
    return str(_quantization_settings(config).get("bnb_4bit_compute_dtype") or "float32")


def quantized_layer(
    layer: nn.Module, tensors: Mapping[str, Tensor], compute: str | None
) -> tuple[NF4Linear | None, list[str]]:
    """The quantised layer in place of a plain one.

    Args:
        layer: the plain one; its weight may have no values.
        tensors: bitsandbytes' tensors: `weight`, `weight.absmax` and so on.
        compute: the precision of the products.

    Returns:
        (the quantised layer or None, every reason against it).
    """
    kind, plain = kind_of(layer), cast(Tensor, layer.weight)
    if kind not in ("linear", "transposed"):
        return None, [f"a {type(layer).__name__} cannot be quantised to 4 bits"]
    if "weight" not in tensors:
        return None, ["the codes are missing"]
    codes = tensors["weight"].contiguous()
    state = {key.removeprefix("weight."): value for key, value in tensors.items() if key != "weight"}
    quantized, _, problems = read_state(codes.view(-1).view(torch.uint8), state)
    expected = tuple(plain.shape) if kind == "linear" else tuple(reversed(plain.shape))
    if quantized is not None and quantized.shape != expected:
        problems.append(f"holds a weight of {quantized.shape}, but the model has one of {expected}")
    if quantized is None or problems:
        return None, problems
    bias = cast("nn.Parameter | None", getattr(layer, "bias", None))
    return NF4Linear(quantized, plain.dtype, bias, compute, type(layer)).train(layer.training), []


def base_of(config: PretrainedConfig) -> Fingerprint | None:
    """The fingerprint of the plain base in a checkpoint written by lorary, removed from the config; or None.

    Raises:
        FileError: it is damaged.
    """
    found = vars(config).pop(_BASE, None)
    if found is None:
        return None
    fingerprint = Fingerprint.from_record(found)
    if fingerprint is None:
        what = "expected architecture, name, structure, weights, each a string"
        raise FileError("cannot read the base:", [Diagnostic(f"config.json: {_BASE}", what)])
    return fingerprint


# --- writing ----------------------------------------------------------------------------------------------------------


@mode_independent
def save_quantized(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write a quantised base in the format of Transformers and bitsandbytes, which `load_quantized` reads too.

    Args:
        model: a quantised Transformers model without adapters.
        folder: for `model.safetensors`, or several, and `config.json`; must be empty or not exist.

    Returns:
        The folder.

    Raises:
        StateError: another model; every reason.
        FileError: the folder cannot be written.

    Example:
        >>> lorary.save_quantized(lorary.load_quantized("org/model"), "model-nf4")
    """
    checked_path(folder, "cannot save the base:")
    model = unwrapped(model)
    problems = _unsavable(model)
    if problems:
        raise StateError("cannot save the base:", problems)
    pretrained = cast(PreTrainedModel, model)
    config = pretrained.config
    with atomic_directory(folder) as target:
        pretrained.config = copy.deepcopy(config)
        pretrained.config.quantization_config = _quantization_config(pretrained)
        setattr(pretrained.config, _BASE, Fingerprint.of(model).record())
        try:
            pretrained.save_pretrained(target)
        finally:
            pretrained.config = config
    return Path(folder)


def _unsavable(model: nn.Module) -> list[Diagnostic]:
    """Why a model cannot be saved as a quantised checkpoint: every reason."""
    if not isinstance(model, PreTrainedModel):
        return [Diagnostic("model", f"is a {type(model).__name__}, not a Transformers model")]
    problems = []
    if hasattr(model, STATE):
        problems.append(Diagnostic("model", "has adapters attached", "save these with lorary.save, then detach them"))
    wrapped = [name for name, module in model.named_modules() if is_wrapper(module)]
    if wrapped:
        what = f"is a {type(model.get_submodule(wrapped[0])).__name__}, whose name would be in the checkpoint"
        problems.append(Diagnostic(wrapped[0], what, "unwrap it"))
    quantized = {name: module for name, module in model.named_modules() if is_quantized(module)}
    if not any(isinstance(module, NF4Linear | NF4Experts) for module in quantized.values()):
        problems.append(Diagnostic("model", "has no layer in NF4", "quantise it with lorary.quantize(model)"))
    if any(t.is_meta for t in model.parameters()):
        problems.append(Diagnostic("model", "has parameters without values, on the meta device"))
    for name, module in quantized.items():
        if isinstance(module, NF4Embedding):
            what = "is a quantised embedding, which the format does not support"
            problems.append(Diagnostic(name, what, "leave it plain"))
        elif isinstance(module, NF4Experts):
            what = "holds quantised experts, which bitsandbytes' format of matrices does not support"
            fix = "leave them plain with NF4(experts=False), or let load_quantized quantise the plain checkpoint"
            problems.append(Diagnostic(name, what, fix))
        elif not isinstance(module, NF4Linear):
            problems.append(Diagnostic(name, f"is a {type(module).__name__}, quantised by another library"))
    return problems


def _quantization_config(model: PreTrainedModel) -> dict[str, Any]:
    """The fields of Transformers' `BitsAndBytesConfig`."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    first = next(iter(layers.values()))
    computes = {layer.compute or str(layer.dtype).removeprefix("torch.") for layer in layers.values()}
    if len(computes) > 1:
        what = f"its layers compute in {' and '.join(sorted(computes))}, but the format has one precision for all"
        raise StateError("cannot save the base:", [Diagnostic("model", what)])
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": first.nested_absmax is not None,
        "bnb_4bit_compute_dtype": computes.pop(),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": _plain_layers(model, list(layers)),
    }


def _plain_layers(model: PreTrainedModel, quantized: list[str]) -> list[str]:
    """Patterns for the plain layers; to Transformers a name also matches paths that end in it."""
    plain = [n for n, m in model.named_modules() if kind_of(m) in ("linear", "transposed") and n not in quantized]
    return [n if all(should_convert_module(q, [n]) for q in quantized) else f"^{re.escape(n)}$" for n in plain]
