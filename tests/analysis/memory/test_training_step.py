"""The memory of a training step is predicted without weights, and the prediction is what the allocator then sees."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import lorary
from lorary.analysis.memory.memory import Memory
from lorary.analysis.memory.predict import predict
from lorary.analysis.memory.workload import Workload
from lorary.errors import PlanError, StateError
from lorary.model.labelled_head import LabelledHead
from lorary.model.plan import Plan

BATCH, LENGTH = 2, 96


def _llama(**changes: Any) -> LlamaForCausalLM:
    settings = {
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 500,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes)))


def _on_meta(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    with torch.device("meta"):
        return make()


def _plan(model: nn.Module, *presets: str, targets: Any = "all-linear", **settings: Any) -> Plan:
    return lorary.plan(model, lorary.method(*presets, **settings), targets)


def estimate(model: nn.Module, plan: Plan, *, inputs: Any = None, **sizes: Any) -> Memory:
    return predict(model, plan, Workload(**sizes), inputs=inputs)


def _measured(run: Callable[[], None]) -> int:
    """The most bytes that a function holds at once beyond what was there, by the allocator's own account."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


def _second_step(
    model: Any, plan: Plan, batch: int, checkpointing: bool = False, padding: int = 0, autocast: bool = False
) -> int:
    """Bytes at the fullest moment of a real step, beyond weights, adapters, gradients and optimizer state."""
    lorary.attach(model.train(), plan)
    LabelledHead(model).install()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(lorary.param_groups(model, lr=1e-4))
    ids = torch.randint(500, (batch, LENGTH))
    mask = torch.ones_like(ids)
    mask[0, LENGTH - padding :] = 0

    def step() -> None:
        inputs = {"input_ids": ids, "labels": ids} | ({"attention_mask": mask} if padding else {})
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**inputs, fused_lm_head=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    step()
    return _measured(step)


# --- the prediction and what is then measured -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("presets", "dropout", "dtype", "checkpointing", "tolerance"),
    [
        (("lora",), 0.0, torch.float32, False, 0.001),
        (("lora",), 0.1, torch.bfloat16, False, 0.001),
        (("lora-fa",), 0.1, torch.float32, False, 0.001),
        (("full",), 0.0, torch.float32, False, 0.001),
        (("dora",), 0.0, torch.float32, False, 0.01),
        (("dora",), 0.1, torch.bfloat16, False, 0.01),
        (("pissa", "rslora", "lora+", "dora"), 0.0, torch.float32, False, 0.01),
        (("olora",), 0.0, torch.bfloat16, False, 0.01),
        (("vera",), 0.0, torch.float32, False, 0.01),
        (("vera",), 0.1, torch.bfloat16, False, 0.01),
        (("melora",), 0.1, torch.float32, False, 0.01),
        (("multilora",), 0.0, torch.float32, False, 0.01),
        (("glora",), 0.0, torch.float32, False, 0.01),
        (("adalora",), 0.1, torch.float32, False, 0.01),
        (("delta-lora",), 0.0, torch.float32, False, 0.01),
        (("o-lora",), 0.0, torch.bfloat16, False, 0.01),
        # a checkpoint keeps the state of the random numbers, 5 kB, and a comparison its result of one byte each:
        # both outside the count, and seen because the blocks here are as small as that
        (("lora",), 0.0, torch.float32, True, 0.01),
        (("lora",), 0.1, torch.float32, True, 0.04),
    ],
)
def test_prediction_is_what_the_allocator_sees(
    presets: tuple[str, ...], dropout: float, dtype: torch.dtype, checkpointing: bool, tolerance: float
) -> None:
    model = _llama().to(dtype)
    plan = _plan(model, *presets, **({} if presets == ("full",) else {"r": 8, "dropout": dropout}))
    found = estimate(model, plan, batch=BATCH, length=LENGTH, checkpointing=checkpointing)
    measured = _second_step(model, plan, BATCH, checkpointing)
    assert found.total - found.fixed == pytest.approx(measured, rel=tolerance)


def test_padding_costs_what_is_predicted_for_it() -> None:
    model = _llama()
    plan = _plan(model, "lora", r=8)
    plain = estimate(model, plan, batch=BATCH, length=LENGTH)
    padded = estimate(model, plan, batch=BATCH, length=LENGTH, padding=True)
    assert padded.activations > 1.05 * plain.activations  # type: ignore[operator]
    assert padded.total - padded.fixed == pytest.approx(_second_step(model, plan, BATCH, padding=5), rel=0.001)


@pytest.mark.parametrize(("presets", "tolerance"), [(("lora",), 0.01), (("dora",), 0.04), (("qlora",), 0.02)])
@pytest.mark.parametrize("checkpointing", [False, True])  # 0.04: one hidden state, in blocks as small as these
def test_autocast_holds_what_is_predicted_for_it(
    presets: tuple[str, ...], tolerance: float, checkpointing: bool
) -> None:
    model = _llama()
    plan = _plan(model, *presets, r=8)
    found = estimate(model, plan, batch=BATCH, length=LENGTH, autocast=True, checkpointing=checkpointing)
    measured = _second_step(model, plan, BATCH, checkpointing, autocast=True)
    assert found.total - found.fixed == pytest.approx(measured, rel=tolerance)


def test_eager_attention_holds_what_is_predicted_for_it() -> None:
    model = _llama(attn_implementation="eager")
    plan = _plan(model, "lora", r=8)
    found = estimate(model, plan, batch=BATCH, length=LENGTH)
    assert found.total - found.fixed == pytest.approx(_second_step(model, plan, BATCH), rel=0.01)


def test_the_comparison_can_fail() -> None:
    model = _llama()
    plan = _plan(model, "lora", r=8)
    found = estimate(model, plan, batch=BATCH, length=LENGTH)
    measured = _second_step(model, plan, BATCH + 1)
    assert found.total - found.fixed < 0.9 * measured


def test_what_rules_keep_is_counted() -> None:
    model = _llama()
    plan = _plan(model, "adalora", r=8, target=4)
    found = estimate(model, plan, batch=BATCH, length=LENGTH)
    lorary.attach(model, plan)
    state = lorary.rules(model, 100).state_dict()
    scores = sum(t.nbytes for name, t in state.items() if t.dtype == torch.float32)
    assert found.rules == scores == 8 * plan.trainable
    assert "rules" in str(found)


def test_weights_that_a_rule_writes_have_no_gradient_and_sets_in_common_count_once() -> None:
    model = _llama()
    plain = estimate(model, _plan(model, "lora", r=8), batch=BATCH, length=LENGTH)
    plan = _plan(model, "delta-lora", r=8, start=-1, mode="paper")
    found = estimate(model, plan, batch=BATCH, length=LENGTH)
    assert (found.gradients, found.optimizer) == (plain.gradients, plain.optimizer)
    assert found.rules == 4 * plan.trainable
    shared = tuple(dataclasses.replace(p, share=p.site.name.rpartition(".")[2]) for p in plan.sites)
    halved = estimate(model, dataclasses.replace(_plan(model, "lora", r=8), sites=shared), batch=BATCH, length=LENGTH)
    layers = model.config.num_hidden_layers
    assert halved.gradients * layers == plain.gradients


def test_fixed_costs_are_those_of_the_tensors() -> None:
    model = _llama()
    plan = _plan(model, "lora-fa", r=8)
    found = estimate(model, plan, batch=BATCH, length=LENGTH)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    lorary.attach(model, plan)
    trained = [p for p in model.parameters() if p.requires_grad]
    adapters = [p for m in model.modules() if isinstance(m, lorary.Adapted) for p in m.params.values()]
    assert found.adapters == sum(4 * p.numel() for p in adapters)
    assert found.weights == sum(4 * p.numel() for p in model.parameters()) - found.adapters + buffers
    assert found.gradients == sum(4 * p.numel() for p in trained)
    assert found.optimizer == 8 * sum(p.numel() for p in trained)


# --- large models without weights -------------------------------------------------------------------------------


@pytest.mark.slow
def test_llama_2_7b_on_the_meta_device_in_five_seconds() -> None:
    model = _on_meta(lambda: LlamaForCausalLM(LlamaConfig(torch_dtype=None)))
    plan = _plan(model, "lora", r=16)
    start = time.process_time()
    found = estimate(model, plan, batch=1, length=2048, dtype=torch.bfloat16)
    assert time.process_time() - start < 5
    hidden, mlp, rank = 4096, 11008, 16
    assert found.weights == pytest.approx(2 * 6_738_415_616, abs=1000)  # and the rotary frequencies
    assert found.activations == pytest.approx(32 * 2048 * (20 * hidden + 8 * mlp + 14 * rank), rel=0.005)


def test_checkpointing_labels_and_length_move_what_they_should() -> None:
    model = _on_meta(lambda: _llama(vocab_size=20_000))
    plan = _plan(model, "lora", r=8)
    plain = estimate(model, plan, batch=4, length=256)
    assert None not in (plain.activations, plain.logits)
    checkpointed = estimate(model, plan, batch=4, length=256, checkpointing=True)
    assert checkpointed.activations < plain.activations / 5  # type: ignore[operator]
    labelled = estimate(model, plan, batch=4, length=256, labelled=0.1)
    assert labelled.activations == plain.activations
    assert labelled.logits < plain.logits / 2  # type: ignore[operator]
    longer = estimate(model, plan, batch=4, length=512)
    assert longer.activations == pytest.approx(2 * plain.activations, rel=0.01)  # type: ignore[operator]


# --- every model ------------------------------------------------------------------------------------------------


def test_gpt2_bert_and_a_convolution_are_counted() -> None:
    size = {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 300}
    gpt2 = _on_meta(lambda: GPT2LMHeadModel(GPT2Config(**size)))
    assert estimate(gpt2, _plan(gpt2, "lora", r=4)).activations
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    bert = _on_meta(lambda: BertForSequenceClassification(BertConfig(**size)))
    assert estimate(bert, _plan(bert, "lora", r=4)).activations
    images = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    wrapped = _FirstOfTuple(images)
    plan = _plan(wrapped, "lora", r=2, targets=["conv", "all-linear"])
    found = estimate(wrapped, plan, inputs={"x": torch.empty(16, 3, 8, 8)})
    assert found.activations is not None
    assert found.activations >= 16 * 8 * 36 * 4


class _FirstOfTuple(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.inner(x),)


def test_a_model_that_caps_its_logits_is_charged_for_all_of_them() -> None:
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    size |= {"num_key_value_heads": 2, "head_dim": 32, "vocab_size": 5000}
    capped = _on_meta(lambda: Gemma2ForCausalLM(Gemma2Config(**size)))
    free = _on_meta(lambda: Gemma2ForCausalLM(Gemma2Config(**size, final_logit_softcapping=None)))
    whole, chunked = (estimate(model, _plan(model, "lora", r=4), batch=8, length=1024) for model in (capped, free))
    assert whole.total - chunked.total > 8 * 1024 * 5000 * 4


class _ReadsValues(nn.Module):
    """Routes tokens by their values, as some mixtures of experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=10)
        self.embed = nn.Embedding(10, 8)
        self.linear = nn.Linear(8, 8)

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        rows = self.embed(input_ids).flatten(0, 1)
        return (self.linear(rows[input_ids.flatten() > 3]),)


def test_what_cannot_be_known_is_said_to_be_unknown() -> None:
    model = _ReadsValues()
    found = estimate(model, _plan(model, "lora", r=2))
    assert found.activations is None
    assert found.fixed > 0
    assert "activations unknown" in str(found)
    assert "total       more than" in str(found)
    assert "the activations are unknown" in found.notes[1]


# --- nothing else moves -----------------------------------------------------------------------------------------


def test_model_and_attention_are_left_as_they_were() -> None:
    model = _llama()
    config, before = copy.deepcopy(model.config.to_dict()), {k: v.clone() for k, v in model.state_dict().items()}
    estimate(model, _plan(model, "lora", r=8), dtype=torch.bfloat16, checkpointing=True)
    assert model.config.to_dict() == config
    assert not any(isinstance(m, lorary.Adapted) for m in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.device.type == "cpu" and p.grad is None and p.requires_grad for p in model.parameters())
    q = torch.zeros(1, 1, 4, 8)
    assert torch.equal(F.scaled_dot_product_attention(q, q, q), q)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape), lambda t: t):  # type: ignore[func-returns-value]
        shapes: list[Any] = []
        meta = torch.zeros(1, 1, 4, 8, device="meta", requires_grad=True)
        F.scaled_dot_product_attention(meta, meta, meta)
    assert torch.Size([1, 1, 4, 4]) in shapes  # the meta device keeps all scores again


def test_two_estimates_are_equal() -> None:
    model = _llama()
    plan = _plan(model, "lora", r=8, dropout=0.1)
    assert estimate(model, plan) == estimate(model, plan)


def test_what_cannot_be_estimated_is_refused() -> None:
    model = _llama()
    with pytest.raises(PlanError) as caught:
        estimate(model, _plan(model, "lora"), batch=0, length=-1)
    assert str(caught.value) == (
        "cannot predict the memory of this training:\n"
        "  - Workload has batch = 0; it takes a whole number of at least 1\n"
        "  - Workload has length = -1; it takes a whole number of at least 1"
    )
    plan = _plan(model, "lora")
    lorary.attach(model, plan)
    with pytest.raises(StateError, match="something is attached already"):
        estimate(model, plan)
    linear = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(PlanError, match="inputs: a Sequential is not a language model with token input"):
        estimate(linear, _plan(linear, "lora", r=1))


def test_the_table_adds_up() -> None:
    memory = Memory(2**30, 2**20, 2**20, 2**21, 2**29, 2**28, 2**27, ("a note",))
    assert memory.total == 2**30 + 2**22 + 2**29 + 2**28
    assert str(memory).splitlines() == [
        "weights     1.0 GiB",
        "adapters    1.0 MiB",
        "gradients   1.0 MiB",
        "optimizer   2.0 MiB",
        "activations 512.0 MiB",
        "logits      256.0 MiB",
        "working     128.0 MiB  (not at the peak)",
        "total       1.8 GiB",
        "note        a note",
    ]
