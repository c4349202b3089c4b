"""Bias flags: the configuration of a model whose merge created biases, so that its checkpoint loads with them.

Some architectures without biases have a flag that adds them (Llama: `attention_bias` for q, k, v and o, `mlp_bias` for
the rest). To find the flag, the model's class is built once per flag on the meta device.
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
from lorary.kernels.torch_internals import parameters_of
from lorary.layers.wrappers import named_modules, submodule


class BiasWarning(UserWarning):
    """The merged model has biases that its checkpoint would lose."""


@dataclass(frozen=True)
class BiasFlags:
    """The bias flags that a merge set.

    Args:
        flags: the attributes of the configuration that became True.
        added: modules that got a zero bias, because the flag of another module gives them one too.
    """

    flags: tuple[str, ...] = ()
    added: tuple[nn.Module, ...] = ()


def enable_bias_flags(model: nn.Module, created: AbstractSet[str]) -> BiasFlags:
    """Set the flags of a Transformers configuration that allow for new biases.

    Args:
        model: the model; one without a configuration is left as it is.
        created: the paths of the new biases.

    Returns:
        The flags that were set; none if they would not cover all of the biases (`unserialisable_biases` names those).
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
        module = submodule(model, name.removesuffix(".bias"))
        zeros = torch.zeros(together[name].shape).to(cast(Tensor, module.weight))
        module.bias = nn.Parameter(zeros, requires_grad=False)
        added.append(module)
    for name in flags:
        setattr(config, name, True)
    return BiasFlags(flags, tuple(added))


def restore_bias_flags(model: nn.Module, changed: BiasFlags) -> None:
    """Undo `enable_bias_flags`."""
    for module in changed.added:
        module.bias = cast(Any, None)
    for name in changed.flags:
        setattr(model.config, name, False)


def unserialisable_biases(model: nn.Module) -> list[Diagnostic]:
    """The biases that a checkpoint of this model would lose: its architecture, as configured, does not have them."""
    kept = _biases(model, {})
    if kept is None:
        return []
    modules = named_modules(model, remove_duplicate=False)
    mine = {f"{path}.bias".lstrip(".") for path, m in modules if parameters_of(m).get("bias") is not None}
    what = f"{type(model).__name__} has no bias there: a checkpoint of the merged model would lose it"
    fix = "keep the adapter beside its base; or train it with C, D and E 'none'"
    return [Diagnostic(name, what, fix) for name in sorted(mine - kept.keys())]


def _biases(model: nn.Module, changes: Mapping[str, bool]) -> dict[str, Tensor] | None:
    """The biases of the model's class with a changed configuration, on the meta device; None if it cannot be built."""
    config = copy.deepcopy(getattr(model, "config", None))
    if config is None:
        return None
    for name, value in changes.items():
        setattr(config, name, value)
    try:
        with torch.device("meta"):
            built = type(model)(config)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # a class with another constructor: nothing is known about its checkpoints
        return None
    parameters = built.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in parameters if name.rpartition(".")[2] == "bias"}
