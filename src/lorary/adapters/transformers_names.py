"""Transformers' own renaming of old checkpoints' names, applied to the paths of an adapter's layers.

Transformers 5 renamed the modules of many models, vision-language models above all, and keeps the mapping from the old
names beside its model loading. An adapter's file has the names of its time.
"""

from __future__ import annotations

import sys
from collections.abc import Container
from functools import cached_property
from typing import Any

from torch import nn

_WEIGHT = ".weight"


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
        found = self._renamed(path)
        prefix = f"{getattr(self._model, 'base_model_prefix', '')}."  # of the model in a model with a head
        candidates = (found, prefix + found, found.removeprefix(prefix))
        return next((name for name in candidates if name in self._paths), path)

    def whole(self, path: str) -> str:
        """The parameter in which Transformers stores the weight at an old path with others (experts, fused q, k, v)."""
        renamings, conversions = self._transforms
        if not conversions:
            return ""
        from lorary.layers.transformers_internals import rename_source_key

        renamed, pattern = rename_source_key(path + _WEIGHT, renamings, conversions)
        return "" if pattern is None else renamed

    def _renamed(self, path: str) -> str:
        renamings, _ = self._transforms
        if not renamings:
            return path
        from lorary.layers.transformers_internals import rename_source_key

        renamed, _ = rename_source_key(path + _WEIGHT, renamings, [])
        return str(renamed).removesuffix(_WEIGHT)
