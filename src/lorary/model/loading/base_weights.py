"""The weights of a base by the names of its model's parameters, read from the checkpoint when they are asked for."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from lorary.layers.transformers_internals import loaded_dtype, may_be_missing, may_be_unused
from lorary.model.fingerprint import Fingerprint, Sample
from lorary.model.loading.weight_files import WeightFiles
from lorary.model.loading.weight_names import Group, groups, values
from lorary.model.scan import scan
from lorary.model.vocabulary import vocabulary_of, vocabulary_paths, with_mean_rows


class BaseWeights:
    """The tensors of a checkpoint as the model's parameters and buffers, one group at a time.

    Args:
        model: of Transformers, on the meta device, in the precision of loading.
        files: of the checkpoint.

    Attributes:
        groups: name in the model -> the tensors of the checkpoint that it comes from.
        names: every name of a parameter -> the first name of the same parameter.
        own: the names of a module's tensors at its further paths -> those at its first path.
    """

    def __init__(self, model: Any, files: WeightFiles) -> None:
        self.model, self.files = model, files
        scanned = scan(model)
        self.names = scanned.names
        self.own = {
            f"{path}.{name}": f"{m.path}.{name}"
            for m in scanned.modules.values()
            for path in m.paths[1:]
            for name, _ in (*m.module.named_parameters(recurse=False), *m.module.named_buffers(recurse=False))
        }
        shapes = {key: files.shape(key) for keys in files.files.values() for key in keys}
        self.groups = {name: group for group in groups(model, shapes) for name in group.names}
        self._sharing: dict[str, list[str]] = {}
        for name, first in self.names.items():
            self._sharing.setdefault(first, []).append(name)
        tables = vocabulary_paths(model)
        self._rows = {f"{path}.{last}": vocabulary_of(model) for path in tables for last in ("weight", "bias")}
        self._loaded: tuple[Group, dict[str, Tensor]] | None = None
        self._samples: dict[str, Sample] = {}

    def sharing(self, name: str) -> list[str]:
        """The names of the same parameter, this one first."""
        return [name, *(n for n in self._sharing.get(self.names.get(name, name), ()) if n != name)]

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds a parameter or buffer under one of its names."""
        return any(n in self.groups for n in self.sharing(name))

    def read(self, name: str) -> Tensor | None:
        """A parameter or buffer in the precision of loading; None if the checkpoint lacks it under all of its names."""
        known = next((n for n in self.sharing(name) if n in self.groups), None)
        return None if known is None else self.load(self.groups[known])[known]

    def unused(self) -> list[str]:
        """The tensors of the checkpoint that are no parameter or buffer of the model."""
        used = {key for group in self.groups.values() for key in group.keys}
        keys = (key for keys in self.files.files.values() for key in keys)
        return [key for key in keys if key not in used and not may_be_unused(self.model, key)]

    def missing(self, given: Collection[str]) -> list[str]:
        """The parameters that the checkpoint lacks, except these."""
        return [
            name
            for name in self.names
            if not (self.has(name) or may_be_missing(self.model, name) or set(given).intersection(self.sharing(name)))
        ]

    def load(self, group: Group) -> dict[str, Tensor]:
        """The tensors of a group by their names in the model. The last group stays in memory."""
        if self._loaded is None or self._loaded[0] is not group:
            self._loaded = None
            found = values(self.model, group, {key: self.files.tensor(key) for key in group.keys})
            loaded = {name: t.to(loaded_dtype(self.model, name)) for name, t in found.items()}
            loaded |= {name: with_mean_rows(loaded[name], self._rows[name]) for name in loaded.keys() & self._rows}
            self._loaded = group, loaded
            for name, tensor in self._loaded[1].items():
                if name in self.names and tensor.is_floating_point():
                    self._samples |= dict.fromkeys(self.sharing(name), Sample.of(tensor))
        return self._loaded[1]

    def forget(self) -> None:
        """Free the group that was loaded last."""
        self._loaded = None

    def dtype(self, name: str) -> torch.dtype:
        """The precision in which a parameter or buffer is loaded."""
        return loaded_dtype(self.model, name)

    def fingerprint(self, full: Collection[str]) -> Fingerprint:
        """The fingerprint of the base for an adapter with these parameters: of all that has been read so far."""
        found = Fingerprint.of(self.model, self._samples)
        if full:
            found.remember(self.model, self._samples)
        return found.without(self.model, full)
