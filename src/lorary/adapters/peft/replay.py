"""The reading rules of PEFT and Transformers that lose sites, replayed on a folder before it is written.

Transformers 5 keeps the experts of a layer in fused parameters. To read adapters of older releases, PEFT (and so
`model.load_adapter`) converts every adapter of some architectures:

1. `gate_proj` and the other names of the experts' projections are taken for the fused parameters, wherever they stand
   in the model: dense layers and shared experts of that name lose their adapters. This is `_convert_peft_config_moe` in
   PEFT's `utils/transformers_weight_conversion.py`, and concerns LORA only. A linear layer escapes it as a parameter:
   `<path>.weight` in `target_parameters`, with the same tensors.
2. Tensors are renamed by the architecture's rules for old checkpoints, which may change a current name too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

from torch import nn

from lorary.adapters.adapter import Adapter
from lorary.adapters.peft.config import PeftConfig
from lorary.adapters.peft.types import PeftType
from lorary.errors import Diagnostic
from lorary.files.bounded_regex import Pattern
from lorary.layers.adapted import unwrapped_modules
from lorary.layers.kinds import kind_of
from lorary.layers.parameter_layer import ParameterLayer
from lorary.layers.transformers_internals import shared_conversion

# The names of the experts' projections by the architecture whose conversion rules a model type shares.
_EXPERTS = {"mixtral": ("gate", "w1", "w2", "w3"), "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj")}
_FUSED = (("w1", "w3"), ("gate_proj", "up_proj"))  # names of one fused parameter: PEFT needs both of a pair
_TAKEN = "PEFT takes it for fused experts of this architecture, and leaves it out"


def taken_for_experts(paths: Collection[str], architecture: str, model: nn.Module | None) -> list[str]:
    """The paths that PEFT's LoRA takes for fused experts if `target_modules` names them.

    Args:
        paths: paths of modules.
        architecture: the class of the base, from which the model type follows if the base is not at hand.
        model: the base, if at hand.
    """
    suspects = [path for path in paths if any(_leaf(path) in names for names in _EXPERTS.values())]
    if not suspects:  # Transformers is imported only where it matters
        return []
    names = _EXPERTS.get(_conversion(_model_type(architecture, model)), ())
    return [path for path in suspects if _leaf(path) in names]


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _model_type(architecture: str, model: nn.Module | None) -> str:
    """The `model_type` of a base's configuration; empty if it is not one of Transformers'."""
    if model is not None:
        return str(getattr(getattr(unwrapped_modules(model)[""], "config", None), "model_type", "") or "")
    import transformers

    config = getattr(getattr(transformers, architecture or "-", None), "config_class", None)
    return str(getattr(config, "model_type", ""))


def _conversion(model_type: str) -> str:
    """The architecture whose conversion rules a model type shares; empty if it has none."""
    # PEFT reads this table too; `qwen2_moe` itself is missing in it, and so not converted
    return "mixtral" if model_type == "mixtral" else shared_conversion(model_type)


def misread_sites(
    adapter: Adapter, model: nn.Module | None, peft_type: PeftType, fields: Mapping[str, Any]
) -> list[Diagnostic]:
    """The sites that PEFT or Transformers would lose or add, given the fields that name them.

    Args:
        adapter: the adapter; only its sites and base matter.
        model: the base, if at hand: only with it can names be compared with all modules, and be renamed.
        peft_type: the PEFT type to write.
        fields: the fields of the configuration that select sites.
    """
    sites = peft_type.targets(adapter)
    modules = list(_real_modules(model)) if model is not None else sites
    lora = peft_type.name == "LORA"  # the only type whose targets are converted
    experts = taken_for_experts(modules, adapter.base.architecture, model) if lora else []
    targets, by_parameter = fields["target_modules"], fields.get("target_parameters", ())
    read = _sites_read(partial(_matches, targets), modules, {_leaf(path) for path in experts}, isinstance(targets, str))
    read |= {path for path in modules if _matches(by_parameter, f"{path}.weight")}
    problems = [Diagnostic(name, _TAKEN) for name in sites if name not in read]
    problems += [Diagnostic(name, "PEFT would adapt it too") for name in sorted(read - set(sites))]
    return problems + _renamed(sites, model)


def foreign_misreadings(config: PeftConfig, sites: Collection[str], model: nn.Module) -> list[tuple[Diagnostic, bool]]:
    """The sites of a folder's LoRA that PEFT or Transformers would lose or miss, each with whether they refuse it.

    Args:
        config: the fields that select sites.
        sites: the sites with tensors.
        model: the base.
    """
    modules = _real_modules(model)
    experts = {_leaf(path) for path in taken_for_experts(modules, "", model)}
    by_pattern = isinstance(config["target_modules"], Pattern)
    own = [name for name in sites if ".experts" not in name]  # PEFT converts those of the experts themselves
    if config["target_modules"] is None:
        read = set(modules)
    else:
        read = _sites_read(partial(_targets, config), modules, experts, by_pattern)
    read |= {path for path in modules if config.targets_parameter(f"{path}.weight")}
    endings = {_leaf(path) for path in sites if _targets(config, path)}
    problems = [
        (Diagnostic("target_modules", f"PEFT refuses {one} without {other}, its partner in the fused experts"), True)
        for pair in _FUSED
        for one, other in (pair, pair[::-1])
        if one in endings & experts and other in experts - endings
    ]
    for name, new in _new_names(own, model).items():
        if name in modules and new in modules and new != name:
            problems.append((Diagnostic(name, _moved(new)), False))
        elif new not in modules:
            problems.append((Diagnostic(name, "the base has no such module, and its tensors are left out"), False))
        elif new not in read:
            lost = "the configuration does not name it, and its tensors are left out"
            problems.append((Diagnostic(name, _TAKEN if _leaf(new) in experts else lost), False))
    left = "the configuration names it, and the folder has no tensors for it"
    missing = [p for p in modules if p in read and p not in sites and kind_of(modules[p]) is not None]
    return problems + [(Diagnostic(name, left), False) for name in missing if config["target_modules"] is not None]


def _targets(config: PeftConfig, path: str) -> bool:
    return config.targets_module(path) and not config.targets_parameter(f"{path}.weight")


def _real_modules(model: nn.Module) -> dict[str, nn.Module]:
    """path -> module, without the parameters that are layers, which `target_modules` never names."""
    modules = unwrapped_modules(model).items()
    return {path: module for path, module in modules if path and not isinstance(module, ParameterLayer)}


def _sites_read(
    named_by: Callable[[str], bool], modules: Collection[str], experts: Collection[str], by_pattern: bool
) -> set[str]:
    """The modules among these that PEFT adapts because of `target_modules`.

    Args:
        named_by: whether `target_modules` names a path.
        modules: paths of modules.
        experts: the last components that PEFT takes for fused experts.
        by_pattern: whether `target_modules` is a pattern.
    """
    named = {path for path in modules if named_by(path)}
    if experts and by_pattern:  # PEFT replaces a pattern by the last components of its matches
        endings = {_leaf(path) for path in named}
        named = {path for path in modules if _leaf(path) in endings}
    return {path for path in named if _leaf(path) not in experts}


def _matches(targets: str | Iterable[str], path: str) -> bool:
    """PEFT's rule: a pattern for the whole path, or ends of it by whole components."""
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(f".{path}".endswith(f".{target}") for target in targets)


def _renamed(sites: Iterable[str], model: nn.Module | None) -> list[Diagnostic]:
    """The sites whose tensors Transformers' rules for old checkpoints rename."""
    return [Diagnostic(name, _moved(new)) for name, new in _new_names(sites, model).items() if new != name]


def _moved(new: str) -> str:
    return f"Transformers' rules for old checkpoints rename its tensors to those of {new}"


def _new_names(sites: Iterable[str], model: nn.Module | None) -> dict[str, str]:
    """Site -> its name after Transformers' rules for old checkpoints."""
    root = unwrapped_modules(model)[""] if model is not None else None
    if not hasattr(root, "base_model_prefix"):
        return {name: name for name in sites}
    from lorary.layers.transformers_internals import WeightRenaming, get_model_conversion_mapping, rename_source_key

    rules = [rule for rule in get_model_conversion_mapping(root) if isinstance(rule, WeightRenaming)]
    end = ".lora_A.default.weight"
    return {name: str(rename_source_key(name + end, rules, [])[0]).removesuffix(end) for name in sites}
