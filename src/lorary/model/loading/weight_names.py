"""The names of a checkpoint's tensors and of the model's parameters: Transformers' own rules, applied group by group.

Most tensors have the parameter's name, or an older one. Some architectures hold in one parameter what their checkpoints
hold in several tensors (the experts of a layer), or the other way round: these are converted together.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorary.layers import transformers_internals as internals


class Group(NamedTuple):
    """Tensors of a checkpoint that become parameters or buffers of a model together.

    Args:
        keys: the tensors' names in the checkpoint.
        names: the names in the model.
        patterns: of Transformers' conversion that each key matches; empty for one tensor that is renamed at most.
        conversion: that conversion.
    """

    keys: tuple[str, ...]
    names: tuple[str, ...]
    patterns: tuple[str, ...] = ()
    conversion: Any = None


def groups(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> list[Group]:
    """The groups of a checkpoint's tensors, as `from_pretrained` would load them; without those that it would ignore.

    The rules that matched are remembered on the model, whose `save_pretrained` would apply them backwards too.

    Args:
        model: of Transformers, on the meta device.
        shapes: of the checkpoint's tensors by name.
    """
    rules = internals.get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, internals.WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, internals.WeightConverter)]
    there, prefix = model.state_dict(), model.base_model_prefix
    single: dict[str, Group] = {}
    collected: dict[str, list[tuple[str, str]]] = {}
    for key in sorted(shapes, key=internals.dot_natural_key):
        name, pattern = internals.rename_source_key(key, renamings, converters, prefix, there)
        if name not in there and key in there:
            name, pattern = internals.rename_source_key(key, [], [], prefix, there)
        if name in there and pattern is None:
            single.setdefault(name, Group((key,), (name,)))
        elif name in there:
            collected.setdefault(name, []).append((key, str(pattern)))
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    found = list(single.values())
    for name, matched in collected.items():
        keys, patterns = zip(*matched, strict=True)
        group = Group(keys, (name,), patterns, by_pattern[patterns[0]])
        empty = {key: torch.empty(shapes[key], device="meta") for key in keys}
        found.append(group._replace(names=tuple(values(model, group, empty))))
    internals.set_weight_conversions(model, [rule for rule in rules if internals.was_used(rule)])
    return found


def values(model: Any, group: Group, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's tensors by name, from those of a group in the checkpoint."""
    if group.conversion is None:
        return {group.names[0]: tensors[group.keys[0]]}
    conversion = copy.deepcopy(group.conversion)
    for key, pattern in zip(group.keys, group.patterns, strict=True):
        conversion.add_tensor(group.names[0], key, pattern, tensors[key])
    converted = conversion.convert(group.names[0], model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


def as_saved(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, from the model's: the way back, as `save_pretrained` takes it.

    Args:
        model: the one of `groups`.
        tensors: by their names in the model; those of one group together.
    """
    saved: dict[str, Tensor] = internals.revert_weight_conversion(model, dict(tensors))
    return saved
