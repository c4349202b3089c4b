"""QLoRA and PEFT: the adapter is PEFT's plain LoRA, and what the base is kept in is each side's own affair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lorary
from lorary.layers.quantized_weight import is_quantized
from tests.adapters.models import Base, fill, outputs

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:bitsandbytes"),
]


def llama() -> nn.Module:
    """Rows of whole blocks: where they are not, bitsandbytes reads back on the CPU other numbers than it packed."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(num_key_value_heads=2, vocab_size=30, max_position_embeddings=32, **sizes)
    return LlamaForCausalLM(config)


LLAMA = Base("Llama", llama, (), "", "")
# without double quantisation the two pack to the same bits; with it bitsandbytes' own rounding of it differs
EXACT: dict[str, Any] = {"double": False}
METHODS = [("qlora",), ("qlora", "dora"), ("qlora", "rslora", "lora+")]
LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def bitsandbytes_base() -> nn.Module:
    """The same base, its linear layers but the head as bitsandbytes packs them."""
    import bitsandbytes as bnb

    model = LLAMA.model()
    for name, layer in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        if last in LINEAR:
            kept = {"quant_type": "nf4", "compress_statistics": False}
            packed = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float32, **kept
            )
            packed.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, **kept).to("cpu")
            packed.support_avx512bf16_for_cpu = False  # where there is such, evaluating rounds to bfloat16
            setattr(model.get_submodule(parent), last, packed)
    return model


def ours(*names: str, **options: Any) -> Any:
    model = LLAMA.model()
    method = lorary.method(*names, r=4, **({"alpha": 6} | EXACT | options))
    lorary.attach(model, lorary.plan(model, method))
    fill(p for n, p in model.named_parameters() if ".params." in n)
    return model.eval()


def close(a: Tensor, b: Tensor, share: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=share * max(1.0, b.abs().max().item()))


def test_both_pack_to_the_same_weights() -> None:
    theirs, packed = bitsandbytes_base(), lorary.quantize(LLAMA.model(), lorary.method("qlora", **EXACT).storage)
    assert sum(is_quantized(m) for m in theirs.modules()) == sum(is_quantized(m) for m in packed.modules()) == 14
    close(outputs(theirs), outputs(packed))
    assert (outputs(theirs) - outputs(LLAMA.model())).abs().max() > 1e-3


@pytest.mark.parametrize("names", METHODS)
def test_ours_is_a_peft_adapter_of_a_bitsandbytes_base_and_of_the_dense_one(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    model = ours(*names)
    expected = outputs(model)
    lorary.save(model, tmp_path)
    words = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (words["peft_type"], words["r"], words["use_dora"]) == ("LORA", 4, "dora" in names)
    close(outputs(PeftModel.from_pretrained(bitsandbytes_base(), str(tmp_path))), expected)
    dense = outputs(PeftModel.from_pretrained(LLAMA.model(), str(tmp_path)).eval())
    assert (dense - expected).abs().max() > 1e-3  # another base: the error of packing is not in it
    close(outputs(lorary.load(LLAMA.model(), tmp_path, quantize=False)), dense)
    close(outputs(PeftModel.from_pretrained(lorary.dequantize(_packed()), str(tmp_path)).eval()), expected)


def _packed() -> Any:
    return lorary.quantize(LLAMA.model(), lorary.method("qlora", **EXACT).storage)


@pytest.mark.parametrize("dora", [False, True])
def test_a_qlora_of_peft_loads_on_a_packed_base(dora: bool, tmp_path: Path) -> None:
    words = LoraConfig(r=4, lora_alpha=6, target_modules=LINEAR, use_dora=dora)
    theirs: Any = get_peft_model(bitsandbytes_base(), words)  # type: ignore[arg-type]
    fill(p for n, p in theirs.named_parameters() if "lora_" in n)
    theirs.save_pretrained(str(tmp_path))
    expected = outputs(theirs)
    close(outputs(lorary.load(_packed(), tmp_path)), expected)
    packed = lorary.load(bitsandbytes_base(), tmp_path)  # and on theirs
    close(outputs(packed), expected)
    lorary.merge(packed)
    close(outputs(packed), expected)


@pytest.mark.parametrize("names", METHODS[:2])
def test_it_loads_here_wherever_the_base_is_packed(names: tuple[str, ...], tmp_path: Path) -> None:
    model = ours(*names)
    expected = outputs(model)
    lorary.save(model, tmp_path)
    assert torch.equal(outputs(lorary.load(LLAMA.model(), tmp_path)), expected)  # packed on the way
    assert torch.equal(outputs(lorary.load(_packed(), tmp_path)), expected)  # packed before
    close(outputs(lorary.load(bitsandbytes_base(), tmp_path, force=True)), expected)
    lorary.merge(model)
    close(outputs(model), expected)


def test_exported_it_is_of_twice_the_rank_where_it_started_at_a_part_of_the_weight(tmp_path: Path) -> None:
    """On what the packed base stands for it is the same; on the dense one, what packing has lost is not in it."""
    from lorary.adapters import export_peft

    model = ours("qlora", "pissa")
    expected = outputs(model)
    export_peft(lorary.Adapter.of(model), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 8
    base: Any = lorary.detach(model)
    lorary.dequantize(base)
    close(outputs(PeftModel.from_pretrained(base, str(tmp_path)).eval()), expected, 1e-4)
