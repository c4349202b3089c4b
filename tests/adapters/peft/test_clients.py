"""PEFT and Transformers read what is exported, on architectures of different kinds: equal outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import lorary
from lorary.adapters import export_merged, export_peft
from tests import architectures
from tests.adapters.export.bases import saved_base
from tests.tiny import shaken

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning", "ignore:vLLM folds kv_b_proj"
)
ARCHITECTURES = {
    **dict.fromkeys(("LlamaForCausalLM", "Gemma3ForCausalLM", "OPTForCausalLM"), "CAUSAL_LM"),
    **dict.fromkeys(("GPT2LMHeadModel", "FalconForCausalLM", "Phi3ForCausalLM"), "CAUSAL_LM"),
    **dict.fromkeys(("MambaForCausalLM", "GptOssForCausalLM", "Qwen3MoeForCausalLM"), "CAUSAL_LM"),
    **dict.fromkeys(("DeepseekV3ForCausalLM", "Qwen3NextForCausalLM"), "CAUSAL_LM"),  # the experts' names elsewhere
    "BertForSequenceClassification": "SEQ_CLS",
    "T5ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "WhisperForConditionalGeneration": None,  # takes no `input_ids`, which PEFT's class for the task passes
    **dict.fromkeys(("ViTForImageClassification", "ResNetForImageClassification", "CLIPModel"), None),
}


def scores(model: Any) -> Tensor:
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.no_grad():
        output = model.eval()(**architectures.inputs(plain))
    found: Tensor = output[0] if getattr(output, "logits", None) is None else output.logits
    return found


@pytest.mark.parametrize(("name", "task"), ARCHITECTURES.items(), ids=list(ARCHITECTURES))
def test_both_clients_compute_what_was_trained(name: str, task: str | None, tmp_path: Path) -> None:
    cls: Any = saved_base(name, tmp_path / "base", "1GB")

    def base() -> Any:
        return cls.from_pretrained(tmp_path / "base")

    model, plain = base(), base()
    targets = ["conv"] if name.startswith("ResNet") else "all-linear"
    lorary.attach(model, lorary.plan(model, lorary.method("rslora", r=2, alpha=8), targets))
    shaken(model, 0.1)
    expected, adapter = scores(model), lorary.Adapter.of(model)
    assert (scores(plain) - expected).abs().max() > 1e-2, "the adapter must change something"
    for folder, folded in (("plain", False), ("folded", True)):
        export_peft(adapter, tmp_path / folder, model=plain, folded=folded)
    export_merged(adapter, tmp_path / "base", tmp_path / "merged")
    by_peft = PeftModel.from_pretrained(base(), tmp_path / "plain")
    assert by_peft.peft_config["default"].task_type == task
    by_transformers = base()
    by_transformers.load_adapter(str(tmp_path / "folded"))
    room = 1e-5 * float(expected.abs().max())
    for client in (by_peft, by_transformers, cls.from_pretrained(tmp_path / "merged")):
        torch.testing.assert_close(scores(client), expected, rtol=0, atol=room)


@pytest.mark.parametrize("name", ["DeepseekV3ForCausalLM", "Qwen3NextForCausalLM"])
def test_without_the_base_the_class_says_which_names_are_experts(name: str, tmp_path: Path) -> None:
    cls: Any = saved_base(name, tmp_path / "base", "1GB")
    model = cls.from_pretrained(tmp_path / "base")
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2, alpha=8)))
    shaken(model, 0.1)
    export_peft(lorary.Adapter.of(model), tmp_path / "out", folded=True)
    client = PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base"), tmp_path / "out")
    torch.testing.assert_close(scores(client), scores(model), rtol=0, atol=1e-5)
