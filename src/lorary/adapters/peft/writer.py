"""The contents of PEFT's two files for an adapter, and the reasons why it has none.

PEFT matches module names by their ends and patterns by regular expressions; the names and patterns written here match
exactly the adapted sites, in any model that has them. All lists and keys are sorted, so the same adapter gives the same
bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lorary.adapters.adapter import Adapter
from lorary.adapters.peft import attention, keys
from lorary.adapters.peft.config import target_modules
from lorary.adapters.peft.experts import to_file
from lorary.adapters.peft.joins import is_added, is_dora
from lorary.adapters.peft.modules_to_save import modules_and_biases, tied_copies
from lorary.adapters.peft.replay import misread_sites, taken_for_experts
from lorary.adapters.peft.tasks import task_fields
from lorary.adapters.peft.token_rows import row_problems
from lorary.adapters.peft.types import PeftType, peft_type_of
from lorary.adapters.shared_tensors import SharedTensors
from lorary.errors import Diagnostic
from lorary.layers.adapted import unwrapped_modules
from lorary.spec.attention_projections import PROJECTIONS
from lorary.spec.placement import replaces_rows

INSIDE = {"experts": "fused experts", **dict.fromkeys(PROJECTIONS, "nn.MultiheadAttention")}
BASE_README = "BASE.md"  # explains how to load the base of an adapter with RoPE scaling
_README_TEXT = """# A PEFT adapter for a base with RoPE scaling

It was trained on {base!r} with positions divided by {factor:g}. PEFT's files cannot say so: load the base like this.

```python
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.from_pretrained({base!r})
rope = config.rope_parameters
rope.get("full_attention", rope).update({rope})
base = AutoModelForCausalLM.from_pretrained({base!r}, config=config)
model = PeftModel.from_pretrained(base, "this folder")
```
"""


def exact_type(
    adapter: Adapter, model: nn.Module | None, shared: SharedTensors, *, copies: bool = True
) -> PeftType | None:
    """The PEFT type that computes an adapter's function from exactly its tensors; None if no type does.

    Args:
        adapter: any adapter.
        model: the base, if at hand: only it tells whether a module is trained in full, and a convolution's dilation and
            padding.
        shared: the tensors that its sites share.
        copies: whether the files may hold one trained parameter under every name that is tied to it.
    """
    found = None if not copies and tied_copies(adapter, model) else peft_type_of(adapter.sites)
    if found is None or any(a.starts or a.site.one_adapter for a in adapter.sites):
        return None
    if found.peft_incompatibilities(adapter, shared):
        return None
    return None if base_incompatibilities(adapter, model, found) else found


def base_incompatibilities(adapter: Adapter, model: nn.Module | None, peft_type: PeftType) -> list[Diagnostic]:
    """Why a PEFT type cannot adapt some of an adapter's sites, or save its base parameters."""
    problems = []
    if not adapter.sites:
        what = "it trains base parameters only, and PEFT's adapters adapt at least one layer"
        problems.append(Diagnostic("sites", what))
    modules = unwrapped_modules(model) if model is not None else {}
    for adapted in adapter.sites:
        if what := peft_type.why_not_adaptable(adapted.site, modules.get(adapted.site.name)):
            problems.append(Diagnostic(adapted.site.name, what))
        elif (inside := INSIDE.get(adapted.site.kind)) and is_dora(adapted):
            what = f"is of {inside} with DoRA's magnitudes, which PEFT does not have there"
            problems.append(Diagnostic(adapted.site.name, what))
    problems += attention.unpaired(adapter.sites)
    *_, unsaved = modules_and_biases(adapter, model)
    shared = _shared_fields(adapter, model, peft_type)
    lacking = [
        Diagnostic(key, f"PEFT's {peft_type.title} has no such field")
        for key, value in shared.items()
        if key not in peft_type.fields and value not in (None, False, "none")
    ]
    problems += unsaved + lacking
    if any(map(replaces_rows, adapter.sites)):
        problems += row_problems(adapter, model)
    return problems + misread(adapter, model, peft_type)


def misread(adapter: Adapter, model: nn.Module | None, peft_type: PeftType) -> list[Diagnostic]:
    """The sites that PEFT or Transformers would not read as the sites that they are."""
    fields = _shared_fields(adapter, model, peft_type)
    by_parameter = set(fields.get("target_parameters", ()))
    problems = [
        Diagnostic(
            adapted.site.name,
            "PEFT takes its name for fused experts, and adapts it as a parameter only as a linear layer by plain LoRA",
            "merge the adapter, and save the model",
        )
        for adapted in adapter.sites
        if adapted.site.weight_name.endswith(".weight")
        and adapted.site.weight_name in by_parameter
        and (adapted.site.kind != "linear" or not is_added(adapted))
    ]
    return problems or misread_sites(adapter, model, peft_type, fields)


def why_misread(adapter: Adapter, model: nn.Module | None) -> str:
    """Why an adapter of a PEFT type is not written as one: PEFT or Transformers would misread it; empty otherwise."""
    peft_type = peft_type_of(adapter.sites)
    if peft_type is None or any(peft_type.why_not_adaptable(adapted.site) for adapted in adapter.sites):
        return ""
    problems = misread(adapter, model, peft_type)
    more = f" (and {len(problems) - 1:,} more)" if len(problems) > 1 else ""
    return f"{problems[0].where}: {problems[0].what}{more}" if problems else ""


def peft_config(
    adapter: Adapter, model: nn.Module | None, peft_type: PeftType, own: Mapping[str, Any]
) -> dict[str, Any]:
    """The contents of `adapter_config.json`.

    Args:
        adapter: the adapter; only its sites, base parameters and base matter.
        model: the base, if at hand: it allows shorter target lists.
        peft_type: the PEFT type to write.
        own: the type-specific fields.
    """
    fields = _shared_fields(adapter, model, peft_type)
    head = {"peft_type": peft_type.name, "revision": None, "inference_mode": True}
    shared = {key: value for key, value in fields.items() if key in peft_type.fields}
    if by_parameter := fields.get("target_parameters"):
        own = _fields_by_parameter(own, by_parameter)
    return head | task_fields(adapter, model, fields["modules_to_save"]) | shared | dict(own)


def _fields_by_parameter(own: Mapping[str, Any], parameters: list[str]) -> dict[str, Any]:
    """LoRA's fields for an adapter with target parameters: PEFT matches patterns with their names, and has no dropout.

    A pattern that is about one of them is about no other site, since all sites of its name are target parameters.
    """
    endings = {name.split(".")[-2] for name in parameters if name.endswith(".weight")}
    experts = any(not name.endswith(".weight") for name in parameters)  # a layer and experts may have one name
    weight = r"(\.weight)?" if experts else r"\.weight"
    patterns = {
        field: {key + weight if key.rpartition(".")[2] in endings else key: value for key, value in own[field].items()}
        for field in ("rank_pattern", "alpha_pattern")
    }
    return {**own, **patterns, "lora_dropout": 0.0}


def _shared_fields(adapter: Adapter, model: nn.Module | None, peft_type: PeftType) -> dict[str, Any]:
    modules, bias, _ = modules_and_biases(adapter, model)
    sites = peft_type.targets(adapter)
    lora = peft_type.name == "LORA"  # the only type whose configuration PEFT converts
    by_parameter = taken_for_experts(sites, adapter.base.architecture, model) if lora else []
    parameters = [f"{name}.weight" for name in by_parameter]
    parameters += [adapted.site.name for adapted in adapter.sites if adapted.site.experts]
    return {
        "base_model_name_or_path": adapter.base.name or None,
        "target_modules": target_modules(sorted(set(sites) - set(by_parameter)), model),
        **({"target_parameters": sorted(parameters)} if parameters else {}),
        "layers_to_transform": None,
        "layers_pattern": None,
        "fan_in_fan_out": any(adapted.site.kind == "transposed" for adapted in adapter.sites),
        "modules_to_save": modules or None,
        **({"ensure_weight_tying": True} if tied_copies(adapter, model) else {}),
        "bias": bias,
    }


def exact_files(
    adapter: Adapter, model: nn.Module | None, shared: SharedTensors, peft_type: PeftType
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors) of an adapter of exactly this type."""
    config = peft_config(adapter, model, peft_type, peft_type.from_adapter(adapter, shared))
    tensors = {peft_type.shared[role]: t for role, t in shared.tensors.items()} if shared.stored else {}
    for adapted in adapter.sites:
        tensors |= peft_type.encode(adapted, adapter.tensors[adapted.site.name])
    return config, with_prefix(tensors, adapter, model)


def with_prefix(tensors: Mapping[str, Tensor], adapter: Adapter, model: nn.Module | None) -> dict[str, Tensor]:
    """The contents of `adapter_model.safetensors`: these tensors and the adapter's base parameters."""
    sites = {adapted.site.name for adapted in adapter.sites}
    full = {keys.full_name(name, sites): t for name, t in adapter.full.items()}
    full |= {name: adapter.full[one].clone() for name, one in tied_copies(adapter, model).items()}
    by_site = [adapted.site for adapted in adapter.sites]
    named = attention.to_file({**to_file(tensors, by_site), **full}, by_site)
    return {keys.full(name): t for name, t in named.items()}


def rope_overrides(adapter: Adapter) -> dict[str, Any]:
    """The `rope_parameters` that the base needs for an adapter; empty where the base's own may stay."""
    return dict(adapter.method.context.config_overrides) if adapter.method.context is not None else {}


def base_text(adapter: Adapter) -> str:
    """The text of `BASE.md`."""
    rope = rope_overrides(adapter)
    return _README_TEXT.format(base=adapter.base.name or "the base", factor=rope["factor"], rope=rope)
