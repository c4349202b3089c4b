"""bitsandbytes' 4-bit checkpoints, as Transformers saves them: read and written without bitsandbytes.

The weights lie in the usual safetensors files; `quantization_config` in config.json says how they are packed. lorary
adds the fingerprint of the base before it was packed, so that adapters of either fit.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from lorary.errors import Diagnostic, FileError, StateError
from lorary.files.atomic import atomic_directory
from lorary.layers.bitsandbytes_state import STATE as SAID
from lorary.layers.bitsandbytes_state import read_state
from lorary.layers.kinds import kind_of
from lorary.layers.nf4 import NF4Embedding, NF4Linear
from lorary.layers.quantized_weight import is_quantized
from lorary.model.fingerprint import STATE, Fingerprint

KEYS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", SAID, SAID.replace("nf4", "fp4"))
_BASE = "lorary_base"  # in config.json: the fingerprint of the plain base
_DTYPES = ("float32", "bfloat16", "float16")


# --- reading ----------------------------------------------------------------------------------------------------------


def said(config: PretrainedConfig) -> dict[str, Any] | None:
    """The `quantization_config` of a checkpoint as a mapping; None of a plain one."""
    found = getattr(config, "quantization_config", None)
    return found if found is None or isinstance(found, dict) else dict(found.to_dict())


def unreadable(config: PretrainedConfig) -> list[Diagnostic]:
    """Why a checkpoint with a `quantization_config` cannot be read here: every reason."""
    words = said(config) or {}
    method, where = words.get("quant_method"), "config.json: quantization_config"
    fix = "load it with Transformers and the library that wrote it; lorary adapts those layers"
    four, eight = (words.get(f"load_in_{n}bit", words.get(f"_load_in_{n}bit", False)) for n in (4, 8))
    if str(getattr(method, "value", method)) != "bitsandbytes" and not four and not eight:
        return [Diagnostic(where, f"packed with {method}, and only bitsandbytes' NF4 is read here", fix)]
    if eight or not four:
        return [Diagnostic(where, "packed by bitsandbytes to 8 bits, and only its NF4 is read here", fix)]
    problems = []
    kind, compute = words.get("bnb_4bit_quant_type", "fp4"), words.get("bnb_4bit_compute_dtype", "float32")
    if kind != "nf4":
        problems.append(Diagnostic(where, f"bnb_4bit_quant_type is {kind!r}, and only 'nf4' is read here", fix))
    if compute not in _DTYPES:
        what = f"bnb_4bit_compute_dtype is {compute!r}, expected one of {', '.join(_DTYPES)}"
        problems.append(Diagnostic(where, what))
    return problems


def compute_of(config: PretrainedConfig) -> str:
    """The precision in which the layers of such a checkpoint compute."""
    return str((said(config) or {}).get("bnb_4bit_compute_dtype") or "float32")


def layer_of(
    layer: nn.Module, tensors: Mapping[str, Tensor], compute: str | None
) -> tuple[NF4Linear | None, list[str]]:
    """The packed layer in the place of a plain one.

    Args:
        layer: the plain one; its weight may have no values.
        tensors: `weight` and what bitsandbytes keeps beside it, `weight.absmax` and so on.
        compute: the precision of the products.

    Returns:
        (the packed layer or None, every reason why there is none).
    """
    kind, own = kind_of(layer), cast(Tensor, layer.weight)
    if kind not in ("linear", "transposed"):
        return None, [f"a {type(layer).__name__} cannot be packed in 4 bits"]
    if "weight" not in tensors:
        return None, ["the codes are missing"]
    codes = tensors["weight"].contiguous()
    beside = {key.removeprefix("weight."): value for key, value in tensors.items() if key != "weight"}
    packed, _, problems = read_state(codes.view(-1).view(torch.uint8), beside)
    expected = tuple(own.shape) if kind == "linear" else tuple(reversed(own.shape))
    if packed is not None and packed.shape != expected:
        problems.append(f"holds a weight of {packed.shape}, and the model has one of {expected}")
    if packed is None or problems:
        return None, problems
    bias = cast("nn.Parameter | None", getattr(layer, "bias", None))
    return NF4Linear(packed, own.dtype, bias, compute, type(layer)).train(layer.training), []


def base_of(config: PretrainedConfig) -> Fingerprint | None:
    """The fingerprint of the plain base, where the checkpoint was written by lorary; takes it out of the config.

    Raises:
        FileError: it is damaged.
    """
    found = vars(config).pop(_BASE, None)
    fields = {field.name for field in dataclasses.fields(Fingerprint)}
    if found is None:
        return None
    if not isinstance(found, dict) or set(found) != fields or not all(isinstance(v, str) for v in found.values()):
        what = f"expected {', '.join(sorted(fields))}, each a text"
        raise FileError("cannot read the base:", [Diagnostic(f"config.json: {_BASE}", what)])
    return Fingerprint(**found)


# --- writing ----------------------------------------------------------------------------------------------------------


def save_quantized(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write a base with packed layers as Transformers and bitsandbytes read it, and `load_quantized`.

    Args:
        model: a model of Transformers, packed, without adapters.
        folder: for `model.safetensors`, or several, and `config.json`; must not hold anything.

    Returns:
        The folder.

    Raises:
        StateError: the model is no such; every reason.
        FileError: the folder cannot be written.

    Example:
        >>> lorary.save_quantized(lorary.load_quantized("org/model"), "model-nf4")
    """
    problems = _unsavable(model)
    if problems:
        raise StateError("cannot save the base:", problems)
    whole = cast(PreTrainedModel, model)
    config = whole.config
    with atomic_directory(folder) as target:
        whole.config = copy.deepcopy(config)
        whole.config.quantization_config = _quantization_config(whole)
        setattr(whole.config, _BASE, dataclasses.asdict(Fingerprint.of(model)))
        try:
            whole.save_pretrained(target)
        finally:
            whole.config = config
    return Path(folder)


def _unsavable(model: nn.Module) -> list[Diagnostic]:
    """Why a model cannot be written as such a checkpoint: every reason."""
    if not isinstance(model, PreTrainedModel):
        return [Diagnostic("model", f"is a {type(model).__name__}, not a model of Transformers")]
    problems = []
    if hasattr(model, STATE):
        problems.append(Diagnostic("model", "has adapters attached", "save these with lorary.save, and detach them"))
    packed = {name: module for name, module in model.named_modules() if is_quantized(module)}
    if not any(isinstance(module, NF4Linear) for module in packed.values()):
        problems.append(Diagnostic("model", "has no layer in NF4", "quantise it with lorary.quantize(model)"))
    if any(t.is_meta for t in model.parameters()):
        problems.append(Diagnostic("model", "has parameters without values, on the meta device"))
    for name, module in packed.items():
        if isinstance(module, NF4Embedding):
            problems.append(Diagnostic(name, "is a packed embedding, which these files do not know", "leave it plain"))
        elif not isinstance(module, NF4Linear):
            problems.append(Diagnostic(name, f"is a {type(module).__name__}, packed by another library"))
    return problems


def _quantization_config(model: PreTrainedModel) -> dict[str, Any]:
    """What `BitsAndBytesConfig` reads."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    first = next(iter(layers.values()))
    computes = {layer.compute or str(layer.dtype).removeprefix("torch.") for layer in layers.values()}
    if len(computes) > 1:
        what = f"layers compute in {' and '.join(sorted(computes))}, and these files know one precision for all"
        raise StateError("cannot save the base:", [Diagnostic("model", what)])
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": first.nested_absmax is not None,
        "bnb_4bit_compute_dtype": computes.pop(),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": _plain(model, list(layers)),
    }


def _plain(model: PreTrainedModel, packed: list[str]) -> list[str]:
    """The layers that are not packed, in the words of Transformers, where a name also stands for what ends in it."""
    plain = [n for n, m in model.named_modules() if kind_of(m) in ("linear", "transposed") and n not in packed]
    return [n if all(should_convert_module(p, [n]) for p in packed) else f"^{re.escape(n)}$" for n in plain]
