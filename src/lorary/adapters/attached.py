"""The files of the adapter attached to a model: written where Transformers saves a model, read back in place."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from torch import nn

from lorary.adapters.adapter import Adapter
from lorary.adapters.save_load import load_adapter, save_adapter
from lorary.errors import Diagnostic, FileError
from lorary.files.findings import AdapterWarning
from lorary.layers.adapted import adapted_layers
from lorary.layers.dtensor import copy_into
from lorary.model.ambient import mode_independent
from lorary.model.fingerprint import Fingerprint
from lorary.model.optim.watch import warn_of_idle_rules
from lorary.model.rank_pruning import resize_adapters
from lorary.model.residual_base import load_start
from lorary.model.state import base_parameter, require_attached


@mode_independent
def save_attached(model: nn.Module, folder: str | os.PathLike[str], *, write: bool = True) -> None:
    """Write the adapter attached to a model where a trainer looks for it: as `lorary.save`, with PEFT's file name.

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
    if write:
        save_adapter(adapter, folder, model=model, for_trainer=True)


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
