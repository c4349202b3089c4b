"""Mixture-of-experts models of every layout: PEFT's `all-linear` here, ours there, and the files of Transformers 4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lorary
from tests.adapters.peft.test_experts import close, saved_by_peft
from tests.experts import MODELS, MORE, logits, moe, shake

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")

EXPERTS = ["experts.gate_up_proj", "experts.up_proj", "experts.down_proj"]
# Llama 4's router returns two tensors, which PEFT's layers do not
FIELDS: dict[str, dict[str, Any]] = {"Llama4ForCausalLM": {"exclude_modules": r".*\.router"}}


@pytest.mark.parametrize("name", MODELS | MORE)
def test_all_linear_of_peft_beside_its_experts(name: str, tmp_path: Path) -> None:
    """Read, merged, and saved again for both clients: routers, dense layers and shared experts among the rest."""
    fields = {"target_modules": "all-linear", "target_parameters": list(EXPERTS)} | FIELDS.get(name, {})
    expected = saved_by_peft(name, tmp_path / "theirs", **fields)
    assert (logits(moe(name)) - expected).abs().max() > 0.1 * expected.abs().max()
    model = lorary.load(moe(name), tmp_path / "theirs")
    close(logits(model), expected)
    sites = {a.site.name for a in lorary.Adapter.of(model).sites if a.site.experts}
    assert sites == {n for n, p in moe(name).named_parameters() if ".experts." in n and p.dim() == 3}
    lorary.save(model, tmp_path / "ours")
    if name.startswith("Deepseek"):  # its router holds a buffer too, and PEFT saves whole modules
        assert {file.name for file in (tmp_path / "ours").iterdir()} == {"lorary.json", "adapter.safetensors"}
        close(logits(lorary.load(moe(name), tmp_path / "ours")), expected)
    else:
        close(logits(peft.PeftModel.from_pretrained(moe(name), tmp_path / "ours")), expected)
        (by_transformers := moe(name)).load_adapter(str(tmp_path / "ours"))
        close(logits(by_transformers), expected)
    lorary.merge(model)
    close(logits(model), expected)


@pytest.mark.parametrize("name", MODELS | MORE)
def test_all_linear_of_peft(name: str, tmp_path: Path) -> None:
    """PEFT turns it into target parameters for some architectures, and leaves the experts out for others."""
    fields = {"target_modules": "all-linear"} | FIELDS.get(name, {})
    expected = saved_by_peft(name, tmp_path / "theirs", **fields)
    close(logits(lorary.load(moe(name), tmp_path / "theirs")), expected)


@pytest.mark.parametrize("name", MODELS)
def test_all_linear_reaches_the_weights_of_the_experts(name: str) -> None:
    """At least 99 % of them, with the shared experts, in numbers that its sites cover; routers are left alone."""
    model = moe(name)
    covered = {p.site.weight_name: p.site.numbers for p in lorary.plan(model, lorary.method("lora", r=2)).sites}
    other = ("bias", "gate.weight")  # vectors of each expert, and routers
    weights = {n: p.numel() for n, p in model.named_parameters() if "expert" in n and p.dim() > 1}
    there = {name: count for name, count in weights.items() if not name.endswith(other)}
    reached = sum(min(covered.get(name, 0), count) for name, count in there.items())
    assert there
    assert reached >= 0.99 * sum(there.values())


PATTERNS: dict[str, dict[str, Any]] = {
    "rsLoRA": {
        "use_rslora": True,
        "rank_pattern": {"experts.down_proj": 3, "q_proj": 5},
        "alpha_pattern": {"experts.down_proj": 7, "o_proj": 11},
    },
    "patterns": {"rank_pattern": {r".*\.experts\.down_proj": 3}, "alpha_pattern": {"^.*o_proj": 3}},
    "one layer": {"layers_to_transform": [1]},
}


@pytest.mark.parametrize("case", PATTERNS)
@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM", "Llama4ForCausalLM"])
def test_ranks_and_alphas_of_peft(name: str, case: str, tmp_path: Path) -> None:
    fields = {"target_modules": ["q_proj", "o_proj"], "target_parameters": list(EXPERTS), "lora_alpha": 6}
    expected = saved_by_peft(name, tmp_path / "theirs", **fields, **PATTERNS[case])
    close(logits(lorary.load(moe(name), tmp_path / "theirs")), expected)


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM", "Llama4ForCausalLM"])
def test_our_ranks_and_alphas_in_both_clients(name: str, tmp_path: Path) -> None:
    model = moe(name)
    ranks, alphas = {"*experts.down_proj": 3, "*o_proj": 4}, {"*experts.*": 9, "*o_proj": 3}
    lorary.attach(model, lorary.plan(model, lorary.method("rslora", r=2, alpha=5), ranks=ranks, alphas=alphas))
    shake(model)
    lorary.save(model, tmp_path / "a")
    close(logits(peft.PeftModel.from_pretrained(moe(name), tmp_path / "a")), logits(model))
    (by_transformers := moe(name)).load_adapter(str(tmp_path / "a"))
    close(logits(by_transformers), logits(model))


# --- files of Transformers 4 ------------------------------------------------------------------------------------------

GATED, NUMBERED = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")
# Class -> the old path of its experts within a layer, the old names of their projections, the old name of the body.
OLD = {
    "DeepseekV3ForCausalLM": ("mlp.experts", GATED, "model."),
    "NemotronHForCausalLM": ("mixer.experts", GATED[1:], "backbone."),
    "Lfm2MoeForCausalLM": ("feed_forward.experts", NUMBERED, "model."),
    "Qwen3NextForCausalLM": ("mlp.experts", GATED, "model."),
    "Qwen2MoeForCausalLM": ("mlp.experts", GATED, "model."),
}


@pytest.mark.parametrize("name", OLD)
def test_single_experts_beside_dense_layers_and_shared_experts(name: str, tmp_path: Path) -> None:
    """Every linear layer of the old model with such a name, of which PEFT drops those that are no routed experts."""
    where, projections, body = OLD[name]
    plain, tensors = moe(name), {}

    def drawn(path: str, out: int, inp: int) -> Tensor:
        A, B = torch.randn(2, inp) * 0.3, torch.randn(out, 2) * 0.3
        start = f"base_model.model.{body}{path.removeprefix('model.')}"
        tensors[f"{start}.lora_A.weight"], tensors[f"{start}.lora_B.weight"] = A, B
        return 2.0 * B @ A

    torch.manual_seed(3)
    with torch.no_grad():
        for path, module in plain.named_modules():
            if isinstance(module, nn.Linear) and path.rpartition(".")[2] in projections:
                module.weight += drawn(path, *module.weight.shape)
            if not path.endswith(".experts"):
                continue
            block = ".".join(path.split(".")[:3])
            first = module.up_proj if len(projections) == 2 else module.gate_up_proj
            hidden, width = module.down_proj.shape[1:]
            for e in range(len(first)):
                old = [f"{block}.{where}.{e}.{leaf}" for leaf in projections]
                first[e] += torch.cat([drawn(one, width, hidden) for one in old[:-1]])
                module.down_proj[e] += drawn(old[-1], hidden, width)
    (tmp_path / "v4").mkdir()
    save_file(tensors, tmp_path / "v4" / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": list(projections)}
    (tmp_path / "v4" / "adapter_config.json").write_text(json.dumps(fields))
    model = lorary.load(moe(name), tmp_path / "v4")
    close(logits(model), logits(plain))
    live = logits(model)
    lorary.merge(model).save_pretrained(tmp_path / "merged")
    close(logits(type(model).from_pretrained(tmp_path / "merged")), live)
