"""Rotary positions beyond those that a model was trained on: a factor in its configuration, and back.

    linear    every position divided by the factor (position interpolation, Chen et al. 2023, arXiv:2306.15595)
    yarn      slow angles divided, fast ones kept (Peng et al. 2023, arXiv:2309.00071)
    dynamic   a base of the angles that grows with the length of what is read

Transformers computes the angles of all three; what stands in the configuration here is what any engine reads there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn


class PositionsWarning(UserWarning):
    """A file does not say how the positions of its base are divided."""


FORMS = ("linear", "yarn", "dynamic")
_FULL = "full_attention"  # the key of the layers that see everything, where layers differ in their angles


def text_config(model: nn.Module) -> Any:
    """The configuration of a model's language part; None where there is none."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def own_config_copy(model: nn.Module) -> None:
    """Gives a model a configuration of its own: others may be made of the same object, and would change with it."""
    memo: dict[int, Any] = {}
    copy.deepcopy(getattr(model, "config", None), memo)
    for module in model.modules():
        own = memo.get(id(getattr(module, "config", None)))
        if own is not None:
            module.config = own


def rotation(config: Any) -> Mapping[str, Any] | None:
    """How a configuration turns queries and keys, of the layers that see everything; None where it does not.

    Args:
        config: of Transformers, or the content of a `config.json` of a family whose positions are rotary.
    """
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(found, Mapping) or not found:
        return {"rope_type": "default"} if isinstance(config, SimpleNamespace) else None
    inner = found.get(_FULL, found)
    return inner if isinstance(inner, Mapping) else None


def kind(config: Any) -> str:
    """The name of that form: `default` where nothing is stretched."""
    found = rotation(config) or {}
    return str(found.get("rope_type") or found.get("type") or "default")


def max_context(config: Any) -> int | None:
    """How many tokens a configuration lets its model read; None where it does not say."""
    known, found = original_context(config), rotation(config) or {}
    if known is None or kind(config) not in FORMS:
        return known
    factor = found.get("factor")
    return int(known * factor) if isinstance(factor, int | float) and 0 < factor < math.inf else known


def original_context(config: Any) -> int | None:
    """How many positions a model knew before any were divided; None where its configuration does not say."""
    known: int | None = getattr(config, "max_position_embeddings", None)
    own = (rotation(config) or {}).get("original_max_position_embeddings") if kind(config) == "yarn" else None
    found = own or known
    return int(found) if isinstance(found, int | float) and 0 < found < math.inf else None


def words(form: str, factor: float, known: int) -> dict[str, Any]:
    """What a configuration's `rope_parameters` say, beside the rest, of positions that are divided."""
    if factor == 1:
        return {}
    more = {"original_max_position_embeddings": known} if form == "yarn" else {}
    return {"rope_type": form, "factor": factor} | more


def scaling_factor(config: Any, length: int) -> float:
    """By how much positions have to be divided for `length` tokens: a whole number; 1 where the model reads as many."""
    known = original_context(config)
    return 1.0 if known is None or length <= (max_context(config) or 0) else float(math.ceil(length / known))


def problems(model: nn.Module, form: str, length: int) -> list[str]:
    """Why a model cannot be made to read so many tokens in this form."""
    config = text_config(model)
    if rotation(config) is None:
        return [f"{type(model).__name__} has no rotary positions that could be stretched"]
    known = max_context(config)
    if known is None:
        return ["its configuration does not say how many positions it knows (max_position_embeddings)"]
    now = kind(config)
    if length > known and now not in ("default", form):
        return [f"it reads {known:,} tokens by positions that are stretched already ({now}): {form} would undo that"]
    if not isinstance(config, SimpleNamespace) and length > known and not _rotary(model, config):
        return [f"{type(model).__name__} computes its angles in a way of its own"]
    return []


def _rotary(model: nn.Module, config: Any) -> dict[str, nn.Module]:
    """path -> module that computes the angles."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "rope_type") and getattr(module, "config", None) is config
    }


class Stretched:
    """A model whose positions are divided, and what it had before.

    The modules that compute its angles are made anew of the changed configuration, and the old ones kept: putting them
    back is exact.

    Args:
        model: a model of Transformers.
        form: one of `FORMS`.
        factor: by which positions are divided.
    """

    def __init__(self, model: nn.Module, form: str, factor: float) -> None:
        self.model, self.config = model, text_config(model)
        known = original_context(self.config) or 0
        made: dict[str, Any] = copy.deepcopy(dict(self.config.rope_parameters))
        made.get(_FULL, made).update(words(form, factor, known))
        self.other: dict[str, Any] = {"rope_parameters": made}
        if form == "yarn":  # whose factor is held against the two
            self.other["max_position_embeddings"] = int(factor * known)
        self._swap_words()
        try:
            self.modules = {name: _anew(module) for name, module in _rotary(model, self.config).items()}
        except BaseException:
            self._swap_words()
            raise
        self._swap_modules()

    def swap(self) -> None:
        """The model as it was; or, the second time, as it is stretched."""
        self._swap_words()
        self._swap_modules()

    def _swap_words(self) -> None:
        for name, value in self.other.items():
            self.other[name] = getattr(self.config, name)
            setattr(self.config, name, value)

    def _swap_modules(self) -> None:
        for name, module in self.modules.items():
            was = self.model.get_submodule(name)
            for theirs, mine in zip(was.buffers(), module.buffers(), strict=False):
                mine.data = mine.data.to(theirs.device)
            module.train(was.training)
            self.model.set_submodule(name, module)
            self.modules[name] = was


def _anew(module: Any) -> nn.Module:
    """The module that computes a model's angles, made of the configuration as it is now, where the old one is."""
    buffer = next(module.buffers(), None)
    with torch.device("cpu" if buffer is None else buffer.device):
        made: nn.Module = type(module)(config=module.config)
    if kind(module.config) == "dynamic":
        made.register_forward_pre_hook(_forget)
    return made


def _forget(module: nn.Module, args: Any) -> None:
    """Before every call: the angles are those of the text at hand, whatever was read before it.

    Transformers keeps those of the longest text so far: what a model says would depend on its past, and a resumed run
    would be another one.
    """
    for name in vars(module):
        if name.endswith("max_seq_len_cached"):
            setattr(module, name, 0)
