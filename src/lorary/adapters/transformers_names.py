"""Transformers' own renaming of old checkpoints' names, applied to the paths of an adapter's layers.

Transformers 5 renamed the modules of many models, vision-language models above all, and keeps the mapping from the old
names beside its model loading. An adapter's file has the names of its time.
"""

from __future__ import annotations

import sys
from collections.abc import Container
from functools import cached_property
from typing import Any, NamedTuple

from torch import nn

_WEIGHT = ".weight"


class Joined(NamedTuple):
    """A parameter that holds the weights of several old modules.

    Args:
        name: of the parameter.
        place: of one such weight among the projections that it joins.
        total: the number of these.
    """

    name: str
    place: int
    total: int


class OldNames:
    """The renaming for one model.

    Args:
        model: the base; any module, which has old names only if it is a model of Transformers.
        modules: the paths of its modules.
    """

    def __init__(self, model: nn.Module, modules: Container[str]) -> None:
        self._model, self._paths = model, modules

    @cached_property
    def _transforms(self) -> tuple[list[Any], list[Any]]:
        """Transformers' renamings of the model, and its conversions, which also change tensors."""
        if "transformers" not in sys.modules:  # then the model is none of its own
            return [], []
        from transformers import PreTrainedModel

        from lorary.layers.transformers_internals import WeightRenaming, get_model_conversion_mapping

        if not isinstance(self._model, PreTrainedModel):
            return [], []
        found = get_model_conversion_mapping(self._model)
        renamings = [t for t in found if isinstance(t, WeightRenaming)]
        return renamings, [t for t in found if not isinstance(t, WeightRenaming)]

    def new_path(self, path: str) -> str:
        """The present path of a module; the path itself if the model has no other name for it."""
        found = self._here(self._renamed(path, [])[0])
        return found.removesuffix(_WEIGHT) if found and found.endswith(_WEIGHT) else path

    def joined(self, path: str) -> Joined | None:
        """The parameter in which Transformers stores the weight at an old path with others (experts, fused q, k, v)."""
        _, conversions = self._transforms
        name, pattern = self._renamed(path, conversions)
        if pattern is None:
            return None
        sources = next(rule.source_patterns for rule in conversions if pattern in rule.source_patterns)
        return Joined(self._here(name) or name, sources.index(pattern), len(sources))

    def _here(self, name: str) -> str | None:
        """A parameter's name in this model, with the prefix of a model with a head or without; None if it has none."""
        prefix = f"{getattr(self._model, 'base_model_prefix', '')}."
        candidates = (name, prefix + name, name.removeprefix(prefix))
        return next((found for found in candidates if found.rpartition(".")[0] in self._paths), None)

    def _renamed(self, path: str, conversions: list[Any]) -> tuple[str, str | None]:
        """The present name of the weight at an old path, and the pattern of the conversion that it takes part in."""
        renamings, _ = self._transforms
        if not renamings and not conversions:
            return path + _WEIGHT, None
        from lorary.layers.transformers_internals import rename_source_key

        name, pattern = rename_source_key(path + _WEIGHT, renamings, conversions)
        return str(name), pattern
