"""Biases that a merge creates: what a model's configuration must say, so that its checkpoint is read back with them.

Architectures without biases have, at most, a flag that gives some of their layers one (Llama: `attention_bias` for q,
k, v and o, `mlp_bias` for the rest). Which flag that is, the model's own class tells: it is built once for every flag,
without memory.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorary.errors import Diagnostic


class BiasWarning(UserWarning):
    """A checkpoint of the merged model could not be read back."""


@dataclass(frozen=True)
class BiasFlags:
    """What was done so that a model's configuration allows for the biases that it has.

    Args:
        flags: of its configuration, set to True.
        added: modules that got a bias of zeros, because a flag that another one needs gives them one.
    """

    flags: tuple[str, ...] = ()
    added: tuple[nn.Module, ...] = ()


def enable_bias_flags(model: nn.Module, created: AbstractSet[str]) -> BiasFlags:
    """Make a Transformers model's configuration allow for biases that its layers have been given.

    Args:
        model: the model; one without a configuration is left as it is.
        created: the new biases by their paths.

    Returns:
        What was done: nothing where the flags do not cover all of them (`homeless` names those).
    """
    config = getattr(model, "config", None)
    without = _biases(model, {}) if created else None
    if without is None or created <= without.keys():
        return BiasFlags()
    names = [name for name, value in vars(config).items() if "bias" in name and value is False]
    flags = tuple(name for name in names if created & ((_biases(model, {name: True}) or {}).keys() - without.keys()))
    together = _biases(model, dict.fromkeys(flags, True)) or {}
    if not created <= together.keys():
        return BiasFlags()
    added = []
    for name in sorted(together.keys() - without.keys() - created):
        module = model.get_submodule(name.removesuffix(".bias"))
        zeros = torch.zeros(together[name].shape).to(cast(Tensor, module.weight))
        module.bias = nn.Parameter(zeros, requires_grad=False)
        added.append(module)
    for name in flags:
        setattr(config, name, True)
    return BiasFlags(flags, tuple(added))


def restore_bias_flags(model: nn.Module, room: BiasFlags) -> None:
    """Undo `make_room`."""
    for module in room.added:
        module.bias = cast(Any, None)
    for name in room.flags:
        setattr(model.config, name, False)


def unserialisable_biases(model: nn.Module) -> list[Diagnostic]:
    """The biases that a checkpoint of this model would lose: its architecture, as configured, has no place for them."""
    kept = _biases(model, {})
    if kept is None:
        return []
    mine = {name for name, _ in model.named_parameters(remove_duplicate=False) if name.rpartition(".")[2] == "bias"}
    what = f"{type(model).__name__} has no bias there: read back, the merged model would be another"
    fix = "keep the adapter beside its base; or train it with C, D and E 'none'"
    return [Diagnostic(name, what, fix) for name in sorted(mine - kept.keys())]


def _biases(model: nn.Module, changes: Mapping[str, bool]) -> dict[str, Tensor] | None:
    """The biases that the model's class has under its configuration, as shapes; None where it cannot be built."""
    config = copy.deepcopy(getattr(model, "config", None))
    if config is None:
        return None
    for name, value in changes.items():
        setattr(config, name, value)
    try:
        with torch.device("meta"):
            built = type(model)(config)
    except Exception:  # a class of one's own, made in a way of its own: nothing is known about its checkpoints
        return None
    parameters = built.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in parameters if name.rpartition(".")[2] == "bias"}
