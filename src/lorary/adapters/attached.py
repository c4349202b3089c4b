"""The files of the adapter attached to a model: written where Transformers saves a model, read back in place."""

from __future__ import annotations

import math
import os
import tempfile
import warnings
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from torch import Tensor, nn

from lorary.adapters.adapter import Adapter
from lorary.adapters.peft.types import peft_type_of
from lorary.adapters.save_load import ADAPTER_FILES, load_adapter, save_adapter
from lorary.errors import Diagnostic, FileError, not_a
from lorary.files.atomic import write_error
from lorary.files.findings import AdapterWarning
from lorary.layers.adapted import adapted_layers
from lorary.layers.dtensor import copy_into
from lorary.model.ambient import mode_independent
from lorary.model.fingerprint import Fingerprint
from lorary.model.in_transformers import DEFAULT
from lorary.model.optim.watch import warn_of_idle_rules
from lorary.model.rank_pruning import resize_adapters
from lorary.model.residual_base import load_start
from lorary.model.state import base_parameter, require_attached
from lorary.spec.placement import AdaptedSite


@mode_independent
def save_attached(model: nn.Module, folder: str | os.PathLike[str], *, write: bool = True) -> None:
    """Write the adapter attached to a model where a trainer looks for it: as `lorary.save`, with PEFT's file name.

    Other files and folders there stay. A killed process may leave a folder that its reader refuses as incomplete.

    Args:
        model: with a method attached.
        folder: where to.
        write: whether this rank writes; every rank takes part, because shards are gathered.

    Raises:
        StateError: nothing is attached.
        FileError: the folder cannot be written.
    """
    adapter = Adapter.of(model)
    warn_of_idle_rules(model)
    if not write:
        return
    if problems := not_a((str, os.PathLike), "a path", folder=folder):
        raise FileError("cannot save:", problems)
    try:
        _write_beside_others(adapter, model, Path(folder))
    except OSError as error:
        raise write_error(Path(folder), error) from error


def _write_beside_others(adapter: Adapter, model: nn.Module, folder: Path) -> None:
    """Write file by file: a trainer's folder has checkpoints, too, and that of sentence-transformers modules."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".lorary-", dir=folder) as temporary:
        save_adapter(adapter, inside := Path(temporary, "adapter"), model=model, for_trainer=True)
        for name in ADAPTER_FILES:
            (folder / name).unlink(missing_ok=True)
        for file in sorted(inside.iterdir(), key=lambda file: file.name == ADAPTER_FILES[0]):  # `lorary.json` last
            file.replace(folder / file.name)


@mode_independent
def restore_attached(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Give the adapter attached to a model the values of a saved one, at its ranks, in place.

    Raises:
        FileError: the folder holds another adapter, or one of another base.
        StateError: nothing is attached.
    """
    state = require_attached(model, "restore")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdapterWarning)  # it may be zero, as after the first step of a warmup
        adapter = load_adapter(folder)
    if problems := adapter.base.disagreements(Fingerprint.of(model)):
        raise FileError(f"the adapter in {folder} does not fit this model:", problems)
    resize_adapters(model, adapter.sites)
    load_into(model, adapter)
    state.restored_from = Path(folder)


def load_into(model: nn.Module, adapter: Adapter) -> None:
    """Copy an adapter's tensors into the parameters of a model, which an optimizer may hold.

    Raises:
        FileError: its sites, roles or shapes differ from the model's; every difference.
    """
    state, layers = require_attached(model, "load"), adapted_layers(model)
    here = {site.site.name: site.stored for site in state.sites}
    there = {name: {role: tuple(t.shape) for role, t in roles.items()} for name, roles in adapter.tensors.items()}
    problems = [
        Diagnostic(name, f"{there.get(name, 'nothing')} in the checkpoint, {here.get(name, 'nothing')} here")
        for name in sorted(here.keys() | there.keys())
        if here.get(name) != there.get(name)
    ]
    there_by_name = {site.site.name: site for site in adapter.sites}
    if not problems:
        problems += [p for site in state.sites for p in _other_function(site, there_by_name[site.site.name])]
    only = sorted(set(adapter.full) ^ set(state.full))
    problems += [Diagnostic(name, f"trains only {'here' if name in state.full else 'there'}") for name in only]
    if problems:
        raise FileError("the checkpoint holds another adapter:", problems)
    for name, layer in layers.items():
        for role, parameter in layer.params.items():
            copy_into(parameter, adapter.tensors[name][role])
        load_start(model, layer, adapter.tensors[name])
    for name, tensor in adapter.full.items():
        copy_into(base_parameter(model, name), tensor)


def _other_function(here: AdaptedSite, there: AdaptedSite) -> Iterator[Diagnostic]:
    """What makes another function of the same tensors at a site."""
    if not math.isclose(there.scale, here.scale, rel_tol=1e-6):
        yield Diagnostic(here.site.name, f"the scale is {there.scale:g} in the checkpoint, {here.scale:g} here")
    for axis in ("join", "delta"):
        mine, its = type(getattr(here, axis)).__name__, type(getattr(there, axis)).__name__
        if mine != its:
            yield Diagnostic(here.site.name, f"the {axis} is {its} in the checkpoint, {mine} here")


def rename_peft_tensors(model: nn.Module, state_dict: MutableMapping[str, Tensor], prefix: str) -> None:
    """Give the tensors of the same model with the same adapter, but in PEFT's layers, the names of lorary's.

    sentence-transformers reads a checkpoint so: it makes a second model with PEFT, and loads its state dict into the
    first one. Of other methods than LoRA, Transformers' reader loses tensors (DoRA's magnitudes): these names stay as
    they are, and PyTorch refuses them.

    Args:
        model: with a method attached.
        state_dict: changed in place.
        prefix: of the model's names in it.
    """
    state = require_attached(model, "load")
    peft_type = peft_type_of(state.sites)
    if peft_type is None or any(set(adapted.stored) != {"A", "B"} for adapted in state.sites):
        return
    keys = {key.removeprefix(prefix).replace(f".{DEFAULT}", ""): key for key in state_dict if key.startswith(prefix)}
    for adapted in state.sites:
        names = [name for name, _ in peft_type.layout(adapted).values()]
        found = {name: next((k for k in (name, f"{name}.weight") if k in keys), name) for name in names}
        if not keys.keys() >= set(found.values()):
            continue
        own = {name: state_dict.pop(keys[key]) for name, key in found.items()}
        site = adapted.site.name
        for role, tensor in peft_type.decode(adapted, own).items():
            state_dict[f"{prefix}{site}.params.{role}"] = tensor
        for last in ("weight", "bias"):
            if (key := f"{prefix}{site}.base_layer.{last}") in state_dict:
                state_dict[f"{prefix}{site}.base.{last}"] = state_dict.pop(key)
