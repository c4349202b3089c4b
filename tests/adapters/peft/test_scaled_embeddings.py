"""Embeddings that a model scales after the look-up, of three generations of Gemma: live, merged, and by PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import lorary
from tests import tiny

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]
_SMALL = {
    **{"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "layer_types": ["sliding_attention", "full_attention"],
}
_PER_LAYER = {"vocab_size_per_layer_input": 40, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
KINDS: dict[str, dict[str, Any]] = {
    "Gemma3": _SMALL,
    "Gemma3n": _SMALL
    | _PER_LAYER
    | {
        "intermediate_size": [24, 24],
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "Gemma4": _SMALL | _PER_LAYER | {"global_head_dim": 4},
}


def base(kind: str) -> Any:
    """The same numbers at every call."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}TextConfig")(**KINDS[kind])
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def close(a: Tensor, b: Tensor) -> None:
    assert (a - b).abs().max() <= 2e-6 * b.abs().max()


@pytest.mark.parametrize("name", ["lora", "dora"])
@pytest.mark.parametrize("kind", KINDS)
def test_live_merged_and_peft_agree(kind: str, name: str, tmp_path: Path) -> None:
    model = tiny.trained(base(kind), lorary.method(name, r=2), "embedding")
    expected = tiny.logits(model)
    assert (tiny.logits(base(kind)) - expected).abs().max() > 0.1 * expected.abs().max()
    lorary.save(model, tmp_path / "ours")
    close(tiny.logits(peft.PeftModel.from_pretrained(base(kind), tmp_path / "ours")), expected)
    close(tiny.logits(lorary.merge(model)), expected)

    config = peft.LoraConfig(r=2, target_modules=["embed_tokens"], use_dora=name == "dora", init_lora_weights=False)
    theirs = tiny.shaken(peft.get_peft_model(base(kind), config))
    theirs.save_pretrained(tmp_path / "theirs")
    close(tiny.logits(lorary.load(base(kind), tmp_path / "theirs")), tiny.logits(theirs))
