"""LoRA with a bias beside B: y = W x + b + s (B A x + c)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lorary
from lorary.adapters import export_peft
from lorary.errors import MethodError, PlanError
from lorary.layers.adapted import adapted_layers
from tests import tiny
from tests.adapters.models import BASES, adapted, by_peft, close, outputs

pytestmark = [
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer"),
    pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape"),  # PEFT takes a bias for an empty shard
]
LLAMA, GPT2, _, CONV = BASES
METHOD = lorary.method("lora", r=2, alpha=6, lora_bias=True)


def test_it_adds_s_times_b_a_x_and_c() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 4))
    base, x = model[0], torch.randn(3, 6)
    plan = lorary.plan(model, METHOD, targets=["0"])
    assert plan.trainable == 2 * (6 + 4) + 4
    lorary.attach(model, plan)
    assert torch.equal(model(x), base(x))
    tiny.shaken(model)
    p = model[0].params
    close(model(x), base(x) + 3 * (x @ p["A"].T @ p["B"].T + p["c"]))


def test_its_merge_creates_the_biases_that_the_base_lacks(tmp_path: Path) -> None:
    model = tiny.trained(tiny.llama(), METHOD, ["q_proj", "down_proj"])
    expected = tiny.logits(model)
    assert all(layer.bias is None for layer in adapted_layers(model).values())
    kept = lorary.Adapter.of(model)
    lorary.merge(model, keep=True)
    assert model.model.layers[0].self_attn.q_proj.bias.abs().max() > 0.1
    close(tiny.logits(model), expected)
    lorary.unmerge(model)
    close(tiny.logits(model), expected)
    assert lorary.detach(model).model.layers[0].self_attn.q_proj.bias is None
    assert all(torch.equal(kept.low_rank()[n].shift, 3 * roles["c"]) for n, roles in kept.tensors.items())


@pytest.mark.parametrize("base", [LLAMA, GPT2, CONV], ids=str)
@pytest.mark.parametrize("folded", [False, True])
def test_an_update_of_another_form_is_exported_with_its_bias(base: object, folded: bool, tmp_path: Path) -> None:
    """VeRA with biases is not PEFT's VeRA: it is written as a LoRA with biases beside B."""
    model = base.model()  # type: ignore[attr-defined]
    method = lorary.method("multilora", r=2, alpha=6, lora_bias=True)
    lorary.attach(model, lorary.plan(model, method, base.targets))  # type: ignore[attr-defined]
    expected = outputs(tiny.shaken(model.eval()))
    export_peft(lorary.Adapter.of(model), tmp_path / "a", folded=folded)
    close(by_peft(base, tmp_path / "a"), expected)  # type: ignore[arg-type]


def test_a_folded_export_scales_its_biases(tmp_path: Path) -> None:
    model = adapted(LLAMA, "rslora", lora_bias=True, alphas={LLAMA.targets[0]: 10})
    export_peft(lorary.Adapter.of(model), tmp_path / "a", folded=True)
    close(by_peft(LLAMA, tmp_path / "a"), outputs(model))


def test_refusals() -> None:
    with pytest.raises(MethodError, match=r"lora_bias: is 'all'; it takes true or false"):
        lorary.method("lora", lora_bias="all")
    with pytest.raises(MethodError, match=r"lora_bias: dora sets MagnitudeDirection.*has no bias beside B"):
        lorary.method("dora", lora_bias=True)
    with pytest.raises(MethodError, match="AddWithBias trains an update of every adapted layer's bias"):
        lorary.method("lora", "bitfit", lora_bias=True)
    with pytest.raises(MethodError, match="O-LoRA adds up the updates of its tasks, and AddWithBias is not additive"):
        lorary.method("o-lora", lora_bias=True)
    with pytest.raises(PlanError, match=r"embed_tokens: is an embedding, which has no bias: leave it out"):
        lorary.plan(tiny.llama(), METHOD, ["embed_tokens", "q_proj"])
    with pytest.raises(PlanError, match="AddWithBias has no form for fused experts yet"):
        lorary.plan(tiny.model("MixtralForCausalLM"), METHOD, ["experts.down_proj"])
    one = lorary.Adapter.of(tiny.trained(tiny.llama(), METHOD, ["q_proj"]))
    with pytest.raises(MethodError, match=r"gives its output a gain or a shift of its own \(AddWithBias\)"):
        lorary.mix({"a": one, "b": one}, [0.5, 0.5])
