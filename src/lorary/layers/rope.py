"""RoPE scaling: a model's context extended by a factor in its configuration, reversibly.

    linear    every position divided by the factor (position interpolation, Chen et al. 2023, arXiv:2306.15595)
    yarn      slow angles divided, fast ones kept (Peng et al. 2023, arXiv:2309.00071)
    dynamic   the base of the angles grows with the length of the input

Transformers computes the angles of all three, and the configuration is the one that any inference engine reads.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from lorary.layers.wrappers import named_modules, set_submodule, submodule


class PositionsWarning(UserWarning):
    """An exported file that does not record the RoPE scaling of its base."""


FORMS = ("linear", "yarn", "dynamic")
_FULL = "full_attention"  # the key for full-attention layers in configurations with several RoPEs


def text_config(model: nn.Module) -> Any:
    """The configuration of a model's language part, or None."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def own_config_copy(model: nn.Module) -> None:
    """Give a model its own copy of its configuration, which other models may share."""
    copies: dict[int, Any] = {}
    copy.deepcopy(getattr(model, "config", None), copies)
    for _, module in named_modules(model):
        copied = copies.get(id(getattr(module, "config", None)))
        if copied is not None:
            module.config = copied


def rope_parameters(config: Any) -> Mapping[str, Any] | None:
    """The RoPE parameters of a configuration's full-attention layers; None without RoPE.

    Args:
        config: of Transformers, or the content of a `config.json` of a model with RoPE, as a SimpleNamespace.
    """
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(parameters, Mapping) or not parameters:
        return {"rope_type": "default"} if isinstance(config, SimpleNamespace) else None
    inner = parameters.get(_FULL, parameters)
    return inner if isinstance(inner, Mapping) else None


def rope_type(config: Any) -> str:
    """The RoPE type of a configuration: `default` if it is not scaled."""
    parameters = rope_parameters(config) or {}
    return str(parameters.get("rope_type") or parameters.get("type") or "default")


def max_context(config: Any) -> int | None:
    """The context length of a configuration with its RoPE scaling; None if unknown."""
    known, parameters = original_context(config), rope_parameters(config) or {}
    if known is None or rope_type(config) not in FORMS:
        return known
    factor = parameters.get("factor")
    return int(known * factor) if isinstance(factor, int | float) and 0 < factor < math.inf else known


def original_context(config: Any) -> int | None:
    """The context length before RoPE scaling; None if unknown."""
    length = getattr(config, "max_position_embeddings", None)
    if rope_type(config) == "yarn":
        length = (rope_parameters(config) or {}).get("original_max_position_embeddings") or length
    return int(length) if isinstance(length, int | float) and 0 < length < math.inf else None


def rope_overrides(form: str, factor: float, known: int) -> dict[str, Any]:
    """The entries of a configuration's `rope_parameters` for this scaling; `known` is the original context length."""
    if factor == 1:
        return {}
    yarn = {"original_max_position_embeddings": known} if form == "yarn" else {}
    return {"rope_type": form, "factor": factor} | yarn


def scaling_factor(config: Any, length: int) -> float:
    """The scaling factor that `length` tokens need: an integer; 1 if the context is long enough."""
    known = original_context(config)
    return 1.0 if known is None or length <= (max_context(config) or 0) else float(math.ceil(length / known))


def scaling_problems(model: nn.Module, form: str, length: int) -> list[str]:
    """The reasons why a model's RoPE cannot be scaled to this length in this form."""
    config = text_config(model)
    if rope_parameters(config) is None:
        return [f"{type(model).__name__} has no rotary position embeddings to scale"]
    known = max_context(config)
    if known is None:
        return ["its configuration lacks its context length (max_position_embeddings)"]
    now = rope_type(config)
    if length > known and now not in ("default", form):
        return [f"its {known:,} tokens of context already use RoPE scaling ({now}), which {form} would replace"]
    if not isinstance(config, SimpleNamespace) and length > known and not _rotary(model, config):
        return [f"{type(model).__name__} computes its rotary angles by code of its own"]
    return []


def _rotary(model: nn.Module, config: Any) -> dict[str, nn.Module]:
    """path -> module that computes rotary angles."""
    return {
        name: module
        for name, module in named_modules(model)
        if hasattr(module, "rope_type") and getattr(module, "config", None) is config
    }


def _scaled_settings(config: Any, form: str, factor: float) -> dict[str, Any]:
    """The settings of a configuration with this scaling, where they differ from its own."""
    known = original_context(config) or 0
    parameters: dict[str, Any] = copy.deepcopy(dict(config.rope_parameters))
    parameters.get(_FULL, parameters).update(rope_overrides(form, factor, known))
    settings: dict[str, Any] = {"rope_parameters": parameters}
    if form == "yarn":  # Transformers checks the factor against both context lengths
        settings["max_position_embeddings"] = int(factor * known)
    return settings


def scaled_modules(model: nn.Module, form: str, factor: float) -> dict[str, nn.Module]:
    """path -> the module of rotary angles with this scaling; the model is not changed, and may be running.

    Args:
        model: a model of Transformers.
        form: one of `FORMS`.
        factor: the scaling factor.
    """
    config = text_config(model)
    # Every forward pass of continuous batching adds `is_causal` to the configuration and removes it again. A shallow
    # copy takes all attributes in one step; a deep copy iterates over them, and fails when another thread adds one.
    scaled = copy.deepcopy(copy.copy(config))
    for name, value in _scaled_settings(config, form, factor).items():
        setattr(scaled, name, value)
    rotary = _rotary(model, config)
    return {name: _rebuilt(module, scaled).train(module.training) for name, module in rotary.items()}


class ScaledRope:
    """RoPE scaling applied to a model, with its previous configuration and modules for an exact way back.

    Args:
        model: a model of Transformers.
        form: one of `FORMS`.
        factor: the scaling factor.
    """

    def __init__(self, model: nn.Module, form: str, factor: float) -> None:
        self.model, self.config = model, text_config(model)
        self.other = _scaled_settings(self.config, form, factor)
        self._swap_config()
        try:
            rotary = _rotary(model, self.config)
            self.modules = {name: _rebuilt(module, self.config) for name, module in rotary.items()}
        except BaseException:
            self._swap_config()
            raise
        self._swap_modules()

    def swap(self) -> None:
        """Undo the scaling; called again, reapply it."""
        self._swap_config()
        self._swap_modules()

    def _swap_config(self) -> None:
        for name, value in self.other.items():
            self.other[name] = getattr(self.config, name)
            setattr(self.config, name, value)

    def _swap_modules(self) -> None:
        for name, module in self.modules.items():
            current = submodule(self.model, name)
            for old, new in zip(current.buffers(), module.buffers(), strict=False):
                new.data = new.data.to(old.device)
            module.train(current.training)
            set_submodule(self.model, name, module)
            self.modules[name] = current


def _rebuilt(module: Any, config: Any) -> nn.Module:
    """A module of rotary angles rebuilt from a configuration, on the same device."""
    buffer = next(module.buffers(), None)
    with torch.device("cpu" if buffer is None else buffer.device):
        rebuilt: nn.Module = type(module)(config=config)
    if rope_type(config) == "dynamic":
        rebuilt.register_forward_pre_hook(_reset_cached_length)
    return rebuilt


def _reset_cached_length(module: nn.Module, args: Any) -> None:
    """A forward hook that makes dynamic angles depend on the current input only.

    Transformers keeps the angles of the longest input so far, so that outputs, and a resumed run, would depend on
    earlier inputs.
    """
    for name in vars(module):
        if name.endswith("max_seq_len_cached"):
            setattr(module, name, 0)
