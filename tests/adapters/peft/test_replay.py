"""Folders that PEFT and Transformers would misread on models with fused experts, and the replay of their rules."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lorary
from lorary.adapters import AdapterWarning, export_peft
from lorary.adapters.peft import replay, writer
from lorary.adapters.peft.lora import LORA
from lorary.adapters.shared_tensors import collect_shared
from lorary.files.tensor_file import write_tensors
from tests.adapters.models import close, same

pytest.importorskip("peft")
# PEFT compares the patterns of target parameters with modules only
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")

_SMALL: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
}
_SETTINGS: dict[str, dict[str, Any]] = {
    "DeepseekV3": _SMALL  # a dense layer, and one with routed and shared experts
    | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
    | {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
    "Qwen3Next": _SMALL
    | {"num_experts": 4, "shared_expert_intermediate_size": 12, "head_dim": 8}
    | {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4}
    | {"layer_types": ["linear_attention", "full_attention"]},
    "Qwen3Moe": _SMALL | {"num_experts": 4, "head_dim": 8, "mlp_only_layers": [0]},
    "Mixtral": _SMALL | {"num_local_experts": 4},
    "Laguna": _SMALL | {"num_experts": 4, "shared_expert_intermediate_size": 12, "head_dim": 8},
    "Llama": _SMALL,
    "GPT2": {"vocab_size": 30, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
}
FUSED = ("DeepseekV3", "Qwen3Next", "Qwen3Moe", "Mixtral")


def base(kind: str) -> nn.Module:
    """The same tiny language model at every call."""
    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(**_SETTINGS[kind])
    return getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config).eval()


def adapted(kind: str, *names: str, **options: Any) -> nn.Module:
    """The base with a filled adapter at every linear layer."""
    model = base(kind)
    plan_options = {k: options.pop(k) for k in ("ranks", "alphas", "exclude") if k in options}
    method = lorary.method(*(names or ("lora",)), **({"r": 4, "alpha": 6} | options))
    lorary.attach(model, lorary.plan(model, method, **plan_options))
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".params." in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(torch.arange(24).reshape(2, 12) * 7 % 30).logits
    return out


def by_peft(kind: str, folder: Path) -> Tensor:
    from peft import PeftModel

    return logits(PeftModel.from_pretrained(base(kind), str(folder)).eval())


def by_transformers(kind: str, folder: Path) -> Tensor:
    model: Any = base(kind)
    model.load_adapter(str(folder))
    return logits(model.eval())


READERS = (by_peft, by_transformers)


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*FUSED, "Llama", "GPT2"])
@pytest.mark.parametrize("ranks", [False, True])
def test_peft_and_transformers_read_every_site(kind: str, ranks: bool, tmp_path: Path) -> None:
    own = {"GPT2": {"c_fc": 3}, "Mixtral": {"o_proj": 3}}.get(kind, {"*down_proj": 3, "*up_proj": 2})
    model = adapted(kind, **({"ranks": own, "dropout": 0.1} if ranks else {}))
    lorary.save(model, tmp_path / "a")
    assert (tmp_path / "a" / "adapter_config.json").exists()
    for read in READERS:
        close(read(kind, tmp_path / "a"), logits(model))


@pytest.mark.parametrize("kind", ["DeepseekV3", "Qwen3Next"])
@pytest.mark.parametrize("with_model", [True, False])
def test_an_export_is_read_by_peft_and_read_back(kind: str, with_model: bool, tmp_path: Path) -> None:
    model = adapted(kind, "lora", "rslora", ranks={"*.0.*gate_proj": 3, "*shared_expert*.up_proj": 2})
    adapter = lorary.Adapter.of(model)
    export_with_note(kind, adapter, tmp_path / "a", base(kind) if with_model else None)
    for read in READERS:
        close(read(kind, tmp_path / "a"), logits(model))
    again = lorary.load_adapter(tmp_path / "a", model=base(kind))
    assert {a.site: a.r for a in again.sites} == {a.site: a.r for a in adapter.sites}
    close(logits(lorary.load(base(kind), tmp_path / "a")), logits(model))


def export_with_note(kind: str, adapter: lorary.Adapter, folder: Path, model: nn.Module | None) -> None:
    """Export, with the warning about vLLM where DeepSeek's attention is adapted."""
    if kind != "DeepseekV3":
        return export_peft(adapter, folder, model=model)
    with pytest.warns(AdapterWarning, match=r"vLLM folds kv_b_proj into its attention .* \(2 sites here\): to serve"):
        return export_peft(adapter, folder, model=model)


def test_other_types_of_peft_are_not_converted(tmp_path: Path) -> None:
    model = adapted("DeepseekV3", "adalora", target=2, exclude="*.experts.*")  # which PEFT's AdaLoRA cannot adapt
    lorary.save(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert "gate_proj" in config["target_modules"]
    assert "target_parameters" not in config
    close(by_peft("DeepseekV3", tmp_path / "a"), logits(model))


# --- what has no form that both read ----------------------------------------------------------------------------------


def test_a_dora_that_peft_would_misread_is_saved_in_our_own_form(tmp_path: Path) -> None:
    model = adapted("Qwen3Next", "dora")
    reason = "PEFT takes its name for fused experts, and adapts it as a parameter only as a linear layer by plain LoRA"
    with pytest.warns(AdapterWarning, match=f"in lorary's own form, not as a PEFT adapter: .*: {reason}"):
        lorary.save(model, tmp_path / "a")
    assert {f.name for f in (tmp_path / "a").iterdir()} == {"lorary.json", "adapter.safetensors"}
    same(lorary.load_adapter(tmp_path / "a"), lorary.Adapter.of(model))
    with pytest.raises(lorary.FileError, match=f"shared_expert.gate_proj: {reason}"):
        export_peft(lorary.Adapter.of(model), tmp_path / "b", model=model)
    assert not (tmp_path / "b").exists()


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize("kind", ["Laguna", *FUSED])
def test_the_folder_is_pefts_where_both_readers_find_every_tensor(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    adapter = lorary.Adapter.of(model)
    config, tensors = writer.exact_files(adapter, model, collect_shared(adapter), LORA)
    (tmp_path / "forced").mkdir()
    (tmp_path / "forced" / "adapter_config.json").write_text(json.dumps(config))
    write_tensors(tmp_path / "forced" / "adapter_model.safetensors", tensors)
    right = all(torch.allclose(read(kind, tmp_path / "forced"), logits(model), atol=1e-5) for read in READERS)
    assert right is (writer.why_misread(adapter, model) == "")


# --- the replay against PEFT ------------------------------------------------------------------------------------------


def _leaves(sites: list[str]) -> dict[str, Any]:
    return {"target_modules": sorted({name.rpartition(".")[2] for name in sites})}


def _paths(sites: list[str]) -> dict[str, Any]:
    return {"target_modules": sites}


def _pattern(sites: list[str]) -> dict[str, Any]:
    return {"target_modules": "|".join(name.replace(".", r"\.") for name in sites if ".1." in name)}


def _parameters(sites: list[str]) -> dict[str, Any]:
    return {"target_modules": [], "target_parameters": [f"{name}.weight" for name in sites]}


SPELLED = [(kind, spelling) for kind in [*FUSED, "Llama", "GPT2"] for spelling in (_leaves, _paths, _pattern)]


@pytest.mark.parametrize(("kind", "spelling"), [*SPELLED, *((kind, _parameters) for kind in [*FUSED, "Llama"])])
def test_the_replay_finds_the_sites_that_peft_adapts(
    kind: str, spelling: Callable[[list[str]], dict[str, Any]]
) -> None:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    adapter = lorary.Adapter.of(adapted(kind))
    sites = [a.site.name for a in adapter.sites if not a.site.experts and "experts.gate" not in a.site.name]
    fan = {"fan_in_fan_out": True} if kind == "GPT2" else {}
    fields = spelling(sites)
    problems = replay.misread_sites(adapter, base(kind), LORA, fields)
    try:
        model = inject_adapter_in_model(LoraConfig(**fields, **fan), base(kind))
    except ValueError:  # it needs both halves of a fused parameter, or neither
        assert problems
        return
    parts = {name.replace(".base_layer", "") for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    linear = {name for name, m in base(kind).named_modules() if isinstance(m, (nn.Linear, transformers.Conv1D))}
    lost = {p.where for p in problems if "leaves it out" in p.what}
    added = {p.where for p in problems if "adapt it too" in p.what}
    everywhere = {a.site.name for a in adapter.sites if not a.site.experts}  # test_experts.py has those of experts
    assert (everywhere - lost) | added == parts & linear
