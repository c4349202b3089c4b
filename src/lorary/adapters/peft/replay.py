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
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from lorary.adapters.adapter import Adapter
from lorary.adapters.peft.types import PeftType
from lorary.errors import Diagnostic
from lorary.layers.adapted import unwrapped_modules
from lorary.layers.transformers_internals import shared_conversion

# The names of the experts' projections by the architecture whose conversion rules a model type shares.
_EXPERTS = {"mixtral": ("gate", "w1", "w2", "w3"), "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj")}


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
    sites = [adapted.site.name for adapted in adapter.sites]
    modules = [path for path in unwrapped_modules(model) if path] if model is not None else sites
    lora = peft_type.name == "LORA"  # the only type whose targets are converted
    experts = taken_for_experts(modules, adapter.base.architecture, model) if lora else []
    read = _sites_read(fields, modules, {_leaf(path) for path in experts})
    lost, added = "PEFT takes it for fused experts of this architecture, and leaves it out", "PEFT would adapt it too"
    problems = [Diagnostic(name, lost) for name in sites if name not in read]
    problems += [Diagnostic(name, added) for name in sorted(read - set(sites))]
    return problems + _renamed(sites, model)


def _sites_read(fields: Mapping[str, Any], modules: Collection[str], experts: Collection[str]) -> set[str]:
    """The modules among these that PEFT adapts.

    Args:
        fields: the fields of the configuration that select sites.
        modules: paths of modules.
        experts: the last components that PEFT takes for fused experts.
    """
    targets, parameters = fields["target_modules"], fields.get("target_parameters", ())
    named = {path for path in modules if _matches(targets, path)}
    if experts and isinstance(targets, str):  # PEFT replaces a pattern by the last components of its matches
        endings = {_leaf(path) for path in named}
        named = {path for path in modules if _leaf(path) in endings}
    named = {path for path in named if _leaf(path) not in experts}
    return named | {path for path in modules if _matches(parameters, f"{path}.weight")}


def _matches(targets: str | Iterable[str], path: str) -> bool:
    """PEFT's rule: a pattern for the whole path, or ends of it by whole components."""
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(f".{path}".endswith(f".{target}") for target in targets)


def _renamed(sites: Iterable[str], model: nn.Module | None) -> list[Diagnostic]:
    """The sites whose tensors Transformers' rules for old checkpoints rename."""
    root = unwrapped_modules(model)[""] if model is not None else None
    if not hasattr(root, "base_model_prefix"):
        return []
    from lorary.layers.transformers_internals import WeightRenaming, get_model_conversion_mapping, rename_source_key

    rules = [rule for rule in get_model_conversion_mapping(root) if isinstance(rule, WeightRenaming)]
    end, problems = ".lora_A.default.weight", []
    for name in sites:
        renamed = rename_source_key(name + end, rules, [])[0]
        if renamed != name + end:
            what = f"Transformers' rules for old checkpoints rename its tensors to those of {renamed.removesuffix(end)}"
            problems.append(Diagnostic(name, what))
    return problems
