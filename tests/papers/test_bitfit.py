"""BitFit and full fine-tuning: base parameters that train where they are."""

from __future__ import annotations

import pytest
import torch

import lorary
from lorary.errors import PlanError

from .. import tiny


def step(model: torch.nn.Module) -> None:
    optimizer = torch.optim.SGD(lorary.param_groups(model, lr=0.1))
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=tiny.ids(), labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()


def test_only_biases_and_the_new_head_move() -> None:
    model = tiny.model("BertForSequenceClassification")
    before = tiny.frozen_copy(model)
    lorary.attach(model, lorary.plan(model, lorary.method("bitfit")))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name in before if name.endswith("bias")} | {"classifier.weight"}
    step(model)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved <= trained
    # the bias of the keys adds the same to every score of a query, which softmax does not see
    assert {name for name in trained - moved if ".key." not in name} == set()


def test_a_model_without_biases_is_refused() -> None:
    with pytest.raises(PlanError) as refusal:
        lorary.plan(tiny.llama(), lorary.method("bitfit"))
    assert str(refusal.value) == (
        "invalid plan:\n"
        "  - full: this model has no biases to train (Llama-like models have none)\n"
        "      hint: use another method"
    )


def test_biases_train_beside_lora() -> None:
    model = tiny.model("Qwen2ForCausalLM")  # biases on q, k, v only
    plan = lorary.plan(model, lorary.method("lora", "bitfit", r=2))
    assert {f.name.split(".", 3)[-1] for f in plan.full} == {f"self_attn.{p}_proj.bias" for p in "qkv"}
    lora = lorary.plan(model, lorary.method("lora", r=2)).trainable
    assert plan.trainable == lora + 2 * (16 + 8 + 8)


def test_everything_moves_under_full_fine_tuning() -> None:
    model = tiny.model("BertForSequenceClassification")
    before = tiny.frozen_copy(model)
    lorary.attach(model, lorary.plan(model, lorary.method("full")))
    assert all(p.requires_grad for p in model.parameters())
    step(model)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert "bert.embeddings.word_embeddings.weight" in moved
    assert {name for name in before if name not in moved} <= {n for n in before if ".key.bias" in n}
