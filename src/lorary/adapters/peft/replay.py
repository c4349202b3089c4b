"""The reading rules of PEFT and Transformers that lose sites, replayed on a folder before it is written.

Transformers 5 keeps the experts of a layer in fused parameters. To read adapters of older releases, PEFT (and so
`model.load_adapter`) converts every adapter of some architectures:

1. `gate_proj` and the other names of the experts' projections are taken for the fused parameters, wherever they stand in
   the model: dense layers and shared experts of that name lose their adapters. This is `_convert_peft_config_moe` in
   PEFT's `utils/transformers_weight_conversion.py`, and concerns LORA only. A linear layer escapes it as a parameter:
   `<path>.weight` in `target_parameters`, with the same tensors.
2. Tensors are renamed by the architecture's rules for old checkpoints, which may change a current name too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from lorary.adapters.adapter import Adapter
from lorary.adapters.peft.config import PeftConfig, read_config
from lorary.adapters.peft.types import PeftType
from lorary.errors import Diagnostic
from lorary.files.bounded_regex import Pattern
from lorary.files.findings import Findings
from lorary.layers.adapted import unwrapped_modules

# The names of the experts' projections by the architecture whose conversion rules a model type shares.
_EXPERTS = {"mixtral": ("gate", "w1", "w2", "w3"), "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj")}


def taken_for_experts(names: Iterable[str], architecture: str, model: nn.Module | None) -> list[str]:
    """The sites among `names` that PEFT's LoRA takes for fused experts if `target_modules` names them.

    Args:
        names: paths of sites.
        architecture: the class of the base, from which the model type follows if the base is not at hand.
        model: the base, if at hand.
    """
    endings = {ending for known in _EXPERTS.values() for ending in known}
    suspects = [name for name in names if _leaf(name) in endings]
    known = _converted_names(architecture, model) if suspects else ()  # Transformers is imported only where it matters
    return [name for name in suspects if _leaf(name) in known]


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _converted_names(architecture: str, model: nn.Module | None) -> tuple[str, ...]:
    """The names that PEFT's LoRA takes for fused experts on this base; none on most."""
    return _EXPERTS.get(_conversion(_model_type(architecture, model)), ())


def _model_type(architecture: str, model: nn.Module | None) -> str:
    """The `model_type` of a base's configuration; empty if it is not one of Transformers'."""
    if model is not None:
        return str(getattr(getattr(model, "config", None), "model_type", "") or "")
    import transformers

    config = getattr(getattr(transformers, architecture or "-", None), "config_class", None)
    return str(getattr(config, "model_type", ""))


def _conversion(model_type: str) -> str:
    """The architecture whose conversion rules a model type shares."""
    from transformers import conversion_mapping

    # PEFT reads this table too; `qwen2_moe` itself is missing in it, and so not converted
    shared = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    return "mixtral" if model_type == "mixtral" else str(shared.get(model_type, ""))


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
    if not sites:
        return []
    modules = list(unwrapped_modules(model)) if model is not None else sites
    data = {key: value for key, value in fields.items() if key in peft_type.fields}
    config = read_config({**data, "peft_type": peft_type.name}, {peft_type.name: peft_type.fields}, Findings("", False))
    if config is None:
        return []
    read = _sites_read(config, [path for path in modules if path], adapter.base.architecture, model)
    problems = [
        Diagnostic(name, "PEFT takes it for fused experts of this architecture, and leaves it out")
        for name in sites
        if name not in read
    ]
    problems += [Diagnostic(name, "PEFT would adapt it too") for name in sorted(read - set(sites))]
    return problems + _renamed(sites, model)


def _sites_read(
    config: PeftConfig, modules: Collection[str], architecture: str, model: nn.Module | None
) -> set[str]:
    """The modules among these that PEFT adapts."""
    read = {path for path in modules if config.targets_module(path)}
    if config.peft_type != "LORA":
        return read
    parameters = {path for path in read if config.targets_parameter(path)}
    if isinstance(config["target_modules"], Pattern) and _converted_names(architecture, model):
        endings = {_leaf(path) for path in read - parameters}  # all that PEFT keeps of a pattern
        read |= {path for path in modules if _leaf(path) in endings}
    return read - set(taken_for_experts(read - parameters, architecture, model))


def _renamed(sites: Iterable[str], model: nn.Module | None) -> list[Diagnostic]:
    """The sites whose tensors Transformers' rules for old checkpoints rename."""
    if not hasattr(model, "base_model_prefix"):
        return []
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    rules = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    end, problems = ".lora_A.default.weight", []
    for name in sites:
        renamed = rename_source_key(name + end, rules, [])[0]
        if renamed != name + end:
            what = f"Transformers' rules for old checkpoints rename its tensors to those of {renamed.removesuffix(end)}"
            problems.append(Diagnostic(name, what))
    return problems
