"""Fused projections: the rows that the library calls q, k and v are what the model makes of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorary.layers.fused_qkv import fused_parts
from tests import tiny

FUSED: list[tuple[str, dict[str, Any]]] = [
    ("GPT2LMHeadModel", {}),
    ("OpenAIGPTLMHeadModel", {}),
    ("GPTNeoXForCausalLM", {}),
    ("GPTNeoXJapaneseForCausalLM", {}),
    ("BloomForCausalLM", {}),
    ("PersimmonForCausalLM", {}),
    ("Phi3ForCausalLM", {}),
    ("CodeGenForCausalLM", {}),
    ("FalconForCausalLM", {"multi_query": True}),
    ("FalconForCausalLM", {"multi_query": False}),
    ("FalconForCausalLM", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("GPTBigCodeForCausalLM", {"multi_query": True}),
    ("GPTBigCodeForCausalLM", {"multi_query": False}),
    ("MptForCausalLM", {}),
    ("DbrxForCausalLM", {}),
    ("ModernBertForMaskedLM", {}),
]


@pytest.mark.parametrize(("name", "changes"), FUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_the_parts_are_what_the_model_makes_of_them(name: str, changes: dict[str, Any]) -> None:
    """In a model of one block the last answer needs no query of an earlier token, and with one token softmax is
    constant: only values matter. So gradients of the fused layer's output tell q, k and v apart."""
    layers = next(key for key in ("n_layer", "n_layers", "num_hidden_layers") if key in tiny.settings(name))
    model = tiny.model(name, **{layers: 1}, **changes).double()
    path, layer = next((n, m) for n, m in model.named_modules() if n.rpartition(".")[2] in tiny.FUSED)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
    outputs: list[torch.Tensor] = []
    layer.register_forward_hook(lambda module, x, y: (y.retain_grad(), outputs.append(y))[1])

    def gradients(tokens: list[int]) -> torch.Tensor:
        outputs.clear()
        y = model(input_ids=torch.tensor([tokens])).logits[:, -1]
        (y * torch.randn_like(y)).sum().backward()
        return outputs[0].grad.reshape(len(tokens), -1).abs()

    earlier, alone = gradients([3, 5])[0], gradients([3])[0]
    rows = set(range(len(alone)))
    q = set((earlier == 0).nonzero().flatten().tolist())
    v = set((alone > 1e-9 * alone.max()).nonzero().flatten().tolist())
    parts = fused_parts(path, layer, model.config)
    assert {name: set(part.rows().tolist()) for name, part in parts.items()} == {"q": q, "k": rows - q - v, "v": v}


def test_gate_and_up() -> None:
    model = tiny.model("Phi3ForCausalLM")
    mlp = model.model.layers[0].mlp
    x = torch.randn(1, 3, 16)
    with torch.no_grad():
        rows = fused_parts("gate_up_proj", mlp.gate_up_proj, model.config)["up"].rows()
        mlp.gate_up_proj.weight[rows] *= 2  # the product of act(gate) and up is linear in up
        twice = mlp(x)
        mlp.gate_up_proj.weight[rows] /= 2
        torch.testing.assert_close(twice, 2 * mlp(x))
