"""Transformers' private names and undocumented functions: the only file that uses them, apart from overrides.

`CONTRIBUTING.md` lists all. Nothing is imported before it is used. A name without a fallback that the installed release
lacks raises an error that names the release.

    from lorary.layers.transformers_internals import sdpa_mask    # any name of UNDOCUMENTED
"""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorary.errors import changed_release

UNDOCUMENTED = {
    "ConversionOps": "transformers.core_model_loading",
    "WeightConverter": "transformers.core_model_loading",
    "WeightRenaming": "transformers.core_model_loading",
    "dot_natural_key": "transformers.core_model_loading",
    "rename_source_key": "transformers.core_model_loading",
    "revert_weight_conversion": "transformers.core_model_loading",
    "get_model_conversion_mapping": "transformers.conversion_mapping",
    "is_optimizer_factory": "transformers.trainer_optimizer",
    "modeling_auto": "transformers.models.auto",
    "render_jinja_template": "transformers.utils.chat_template_utils",
    "sdpa_attention_forward": "transformers.integrations.sdpa_attention",
    "sdpa_mask": "transformers.masking_utils",
    "should_convert_module": "transformers.quantizers.quantizers_utils",
}
"""Name -> the module of Transformers that holds it."""

OVERRIDDEN = {
    "_process_model_before_weight_loading": ("model",),
    "_process_model_after_weight_loading": ("model",),
}
"""Method of Transformers' quantiser that lorary's overrides -> its first arguments."""


def __getattr__(name: str) -> Any:
    if name not in UNDOCUMENTED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(UNDOCUMENTED[name])
        if name not in vars(module):  # a module in it
            return importlib.import_module(f"{UNDOCUMENTED[name]}.{name}")
        return vars(module)[name]
    except ModuleNotFoundError as error:
        raise changed_release("transformers", f"{UNDOCUMENTED[name]} has no {name}") from error


# --- configurations ---------------------------------------------------------------------------------------------------

ATTENTION_KEYS = ("attn_implementation", "_attn_implementation")
"""The key of the attention function in a `config.json`, of newer and of older releases."""


def attention_of(config: object) -> str | None:
    """The name of the attention function that a configuration chooses; None if it says nothing of attention."""
    found = getattr(config, "_attn_implementation", None)
    return None if found is None else str(found)


def set_attention(config: Any, name: str | None) -> None:
    """Choose the attention function of the models of a configuration."""
    config._attn_implementation = name


def forget_quantizer(config: object) -> None:
    """Remove the mark of a quantiser that has removed itself."""
    vars(config).pop("_is_quantized", None)


# --- models -----------------------------------------------------------------------------------------------------------


def uses_attention_interface(model: nn.Module) -> bool:
    """Whether a model takes its attention function from Transformers' table; True for models of other libraries."""
    return bool(getattr(model, "_supports_attention_backend", True))


def exact_modules(model: nn.Module) -> set[str]:
    """The components of module paths that an architecture keeps in 32 bits."""
    keys = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    return {name for key in keys for name in getattr(model, key, None) or ()}


def without_device_hooks(module: nn.Module) -> None:
    """Give a module its own forward again, without accelerate's hooks that move inputs between devices."""
    if "_old_forward" in vars(module):
        vars(module)["forward"] = vars(module)["_old_forward"]


# --- experts ----------------------------------------------------------------------------------------------------------

EXPERTS_FUNCTION = "lorary"
"""The name of lorary's function in Transformers' table of experts functions."""

_EXPERT_SETTINGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
_CONFIG_BEFORE = "_lorary_config"


def expert_settings(module: nn.Module) -> dict[str, bool] | None:
    """What Transformers' decorator says of a class of experts modules; None for another class."""
    if not hasattr(type(module), "_apply_gate") or getattr(module, "_is_expert_parallel", False):
        return None
    found = {name: value for name in _EXPERT_SETTINGS if isinstance(value := getattr(module, name, None), bool)}
    return found if len(found) == len(_EXPERT_SETTINGS) else None


def apply_gate(module: Any, gate_up: Tensor) -> Tensor:
    """[T, width] of an experts module's gate and up [T, 2 width]."""
    output: Tensor = module._apply_gate(gate_up)
    return output


def register_experts_function(function: Any) -> None:
    """Put a function into Transformers' table of experts functions."""
    moe = importlib.import_module("transformers.integrations.moe")
    moe.ALL_EXPERTS_FUNCTIONS[EXPERTS_FUNCTION] = function


def use_experts_function(module: Any, name: str | None) -> None:
    """Let one experts module use a function of that table; None: the one that the model's configuration says."""
    before = vars(module).get(_CONFIG_BEFORE)
    if name is None and before is not None:
        module.config = vars(module).pop(_CONFIG_BEFORE)
    elif name is not None and before is None:
        vars(module)[_CONFIG_BEFORE] = module.config
        module.config = copy.copy(module.config)
        module.config._experts_implementation_internal = name  # the property would change shared sub-configurations


CACHES = ("cache", "past_key_values", "cache_params", "state")
"""What models call the cache of a forward pass, of newer releases and of older ones."""


def cache_of(outputs: Any) -> dict[str, Any]:
    """The cache that a forward pass returns, under the name of the argument that takes it; empty if there is none."""
    for name in CACHES:
        found = outputs.get(name) if isinstance(outputs, Mapping) else None
        if found is not None:
            return {name: found}
    return {}


# --- loading ----------------------------------------------------------------------------------------------------------


@contextmanager
def checkpoints_opened_with(**options: Any) -> Iterator[None]:
    """A block in which the loader opens safetensors files with further options, if it still opens them by this name."""
    modeling_utils = importlib.import_module("transformers.modeling_utils")
    safe_open = getattr(modeling_utils, "safe_open", None)
    if safe_open is None:  # the same tensors, read in the loader's own way
        yield
        return
    vars(modeling_utils)["safe_open"] = lambda *args, **given: safe_open(*args, **(given | options))
    try:
        yield
    finally:
        vars(modeling_utils)["safe_open"] = safe_open


def checkpoints_reentrantly(inner: nn.Module) -> bool:
    """Whether some layers checkpoint in PyTorch's older way, which follows only the gradients of their inputs."""
    checkpointing = (m for m in inner.modules() if getattr(m, "gradient_checkpointing", False))
    functions = (getattr(m, "_gradient_checkpointing_func", None) for m in checkpointing)
    return any(getattr(f, "keywords", {}).get("use_reentrant", False) for f in functions)


def mark_initialized(layer: nn.Module) -> None:
    """Tell the loader that a layer and its weight have their values: parents initialise children, too."""
    for thing in (layer, layer.weight):
        vars(thing)["_is_hf_initialized"] = True


def unmark_initialized(layer: nn.Module) -> None:
    """Remove the mark of the layer; that of its weight goes with the weight."""
    vars(layer).pop("_is_hf_initialized", None)


def weight_conversions(model: nn.Module) -> list[Any] | None:
    """The mapping of a checkpoint's names to the model's, under which it is saved again; None if there is none.

    Without it a model is saved under its own names, which Transformers reads as well.
    """
    found: list[Any] | None = getattr(model, "_weight_conversions", None)
    return found


def set_weight_conversions(model: nn.Module, conversions: list[Any]) -> None:
    """Replace that mapping."""
    object.__setattr__(model, "_weight_conversions", conversions)


def was_used(conversion: Any) -> bool:
    """Whether a rule of that mapping has matched a name."""
    return bool(getattr(conversion, "was_used", lambda: True)())


def loaded_dtype(model: Any, name: str) -> torch.dtype:
    """The precision in which the loader keeps a plain tensor: its own, if an architecture says nothing else."""
    own: torch.dtype = model.get_parameter_or_buffer(name).dtype
    plan: dict[str, torch.dtype] = getattr(model, "_get_dtype_plan", lambda _: {})(own)
    return next((dtype for part, dtype in plan.items() if re.search(part.replace("*", ".*"), name)), own)


def may_be_missing(model: nn.Module, name: str) -> bool:
    """Whether a class computes a parameter by itself where a checkpoint lacks it (Marian's positions)."""
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)


def may_be_unused(model: nn.Module, name: str) -> bool:
    """Whether a class knows a tensor of older checkpoints that it does not need (the frequencies of RoPE)."""
    patterns = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), r"rotary_emb\.inv_freq"]
    return any(re.search(pattern, name) for pattern in patterns)


def shared_conversion(model_type: str) -> str:
    """The architecture whose conversion rules a model type shares; empty if it has none."""
    mapping = importlib.import_module("transformers.conversion_mapping")
    return str(getattr(mapping, "_MODEL_TO_CONVERSION_PATTERN", {}).get(model_type, ""))
