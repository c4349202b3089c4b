"""Reports from the field about adapters without effect, on tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.errors import PlanError
from lorary.layers.adapted import adapted_layers
from tests import tiny
from tests.architectures import gradients, inputs, model

from .test_architectures import without_gradient

# Architecture -> its convolution, and the linear layers that a GPU's kernels bypass.
STATE_SPACE = {
    "MambaForCausalLM": ("mixer.conv1d", ["dt_proj", "out_proj", "x_proj"]),
    "Mamba2ForCausalLM": ("mixer.conv1d", ["out_proj"]),
    "FalconH1ForCausalLM": ("mamba.conv1d", ["mamba.out_proj"]),
    "NemotronHForCausalLM": ("mixer.conv1d", ["out_proj"]),
    "Lfm2ForCausalLM": ("conv.conv", []),
    "Lfm2MoeForCausalLM": ("conv.conv", []),
    "Qwen3NextForCausalLM": ("linear_attn.conv1d", []),
}


@pytest.mark.parametrize("name", STATE_SPACE)
def test_a_convolution_whose_weight_the_model_reads_is_refused(name: str) -> None:
    """Case 15 (Falcon-H1 #13, peft #2274): nothing that it put out had a gradient."""
    base, (conv, bypassed) = model(name, "meta"), STATE_SPACE[name]
    for targets in ("conv", conv):
        with pytest.raises(PlanError, match=f"{conv}: .* reads its weight and never calls it"):
            lorary.plan(base, tiny.LORA, targets)
    plan = lorary.plan(base, tiny.LORA, "all-linear")
    assert plan.unproved == ()
    left_out = " ".join(note for note in plan.notes if "leaves out" in note)
    assert {layer for layer in bypassed if layer not in left_out} == set()
    assert not any(p.site.name.endswith(tuple(bypassed)) for p in plan.sites if bypassed)


@pytest.mark.parametrize("name", ["MambaForCausalLM", "Mamba2ForCausalLM", "FalconH1ForCausalLM"])
def test_a_mamba_adapter_is_live_and_loads_in_peft(name: str, tmp_path: Path) -> None:
    """Case 16: PEFT refuses the `out_proj` of these models, for which reason no adapter with it could be read there."""
    base = model(name)
    assert without_gradient(base, lorary.plan(base, tiny.LORA)) == []
    lorary.save(base.eval(), tmp_path)
    theirs = peft.PeftModel.from_pretrained(model(name), str(tmp_path)).eval()
    ids = inputs(base)
    assert torch.equal(tiny.logits(theirs, **ids), tiny.logits(base, **ids))


def test_the_encoder_layer_of_pytorch() -> None:
    """Case 18 (peft #761): refused by itself, and inside a model with an example."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    for example in (None, torch.randn(2, 3, 16)):
        with pytest.raises(PlanError, match="TransformerEncoderLayer also reads its weight without calling it"):
            lorary.plan(layer, tiny.LORA, targets=["linear1"], example=example)


class Clip(nn.Module):
    """A layer between two clamps, like Gemma 4's."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x.clamp(-1, 1)).clamp(-1, 1)
        return y


def clipped() -> Any:
    """A Llama whose query projections are wrapped."""
    base = tiny.seeded("LlamaForCausalLM")
    for layer in base.model.layers:
        clip = Clip(16)
        clip.linear.weight = layer.self_attn.q_proj.weight
        layer.self_attn.q_proj = clip
    return base


@pytest.mark.parametrize("targets", ["q_proj", "self_attn.q_proj", "*.q_proj", "q_proj.linear", "attention-qv"])
def test_a_wrapper_stands_for_its_layer(targets: str, tmp_path: Path) -> None:
    """Case 20 (peft #3129, unsloth #4807): the layer inside is adapted, and PEFT reads the folder."""
    base = clipped()
    plan = lorary.plan(base, tiny.LORA, targets)
    inner = [f"model.layers.{i}.self_attn.q_proj.linear" for i in range(2)]
    values = [f"model.layers.{i}.self_attn.v_proj" for i in range(2)] if targets == "attention-qv" else []
    assert sorted(p.site.name for p in plan.sites) == sorted(inner + values)
    said = f"`{targets}` wraps a layer, which is adapted: model.layers.{{0-1}}.self_attn.q_proj.linear"
    assert (said in plan.notes) == (targets not in ("q_proj.linear", "attention-qv"))
    assert without_gradient(base, plan) == []
    lorary.save(base.eval(), tmp_path)
    theirs = peft.PeftModel.from_pretrained(clipped(), str(tmp_path)).eval()
    assert torch.equal(tiny.logits(theirs), tiny.logits(base))


def test_a_block_with_a_norm_is_no_wrapper() -> None:
    with pytest.raises(PlanError, match="`output` is a BertSelfOutput, not a layer with a weight matrix"):
        lorary.plan(tiny.model("BertForSequenceClassification"), tiny.LORA, "output")


def test_excluding_a_wrapper_excludes_its_layer() -> None:
    plan = lorary.plan(clipped(), tiny.LORA, exclude="q_proj")
    assert not any("q_proj" in p.site.name for p in plan.sites)


def test_a_bypassed_layer_stays_dense() -> None:
    """A quantised weight that the model reads itself would be read as codes."""
    base = lorary.quantize(model("MambaForCausalLM"))
    assert type(base.backbone.layers[0].mixer.dt_proj) is nn.Linear
    assert tiny.logits(base, **inputs(base)).isfinite().all()
    gradients(lorary.attach(base, lorary.plan(base, tiny.LORA)))
    assert all(p.params["B"].grad is not None for p in adapted_layers(base).values())
