"""Adapters trained together are those trained apart: every method, schedules, clipping, ends, quantised bases."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.train.shared_base.shared_base import SharedBase
from lorary.train.shared_base.training import Settings, SharedTraining

from ... import tiny
from .apart import METHODS, STEPS, batches, distance, llama, movement, train_alone

CLOSE = 1e-5


def settings_of(i: int, steps: int = STEPS) -> Settings:
    """Settings that differ from adapter to adapter."""
    return Settings(
        lr=(1e-3, 3e-3, 5e-4)[i % 3],
        steps=steps,
        weight_decay=0.01 * (i % 2),
        max_grad_norm=(1.0, 0.1)[i % 2],
        schedule=("linear", "cosine")[i % 2],
        warmup=float(i % 4),
    )


class Sweep:
    """All methods in one sweep, with targets, seeds, batch sizes and orders of their own."""

    def __init__(self) -> None:
        self.base = llama()
        targets: dict[str, Any] = {"rslora": "attention", "dora": ["q_proj", "down_proj"], "vera": "mlp"}
        self.plans = {name: lorary.plan(self.base, method, targets.get(name)) for name, method in METHODS.items()}
        self.settings = {name: settings_of(i, STEPS - (name == "lora-fa") * 7) for i, name in enumerate(METHODS)}
        self.seeds = {name: i % 3 for i, name in enumerate(METHODS)}
        self.rows = {name: batches(i % 4, rows=1 + i % 3) for i, name in enumerate(METHODS)}
        self.before = tiny.everything(self.base), tiny.frozen_copy(self.base)
        shared = SharedBase(self.base, self.plans, seeds=self.seeds)
        self.training = SharedTraining(shared, self.settings)
        self.sizes: list[int] = []
        self.together = self.training.run({n: iter(rows) for n, rows in self.rows.items()}, self._after)
        self.after = tiny.everything(self.base), tiny.frozen_copy(self.base)

    def _after(self, training: SharedTraining, losses: Any) -> None:
        self.sizes.append(len(losses))


@pytest.fixture(scope="module")
def sweep() -> Sweep:
    return Sweep()


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_the_same_together_and_apart(sweep: Sweep, name: str) -> None:
    plan, seed = sweep.plans[name], sweep.seeds[name]
    alone = train_alone(sweep.base, plan, sweep.settings[name], sweep.rows[name], seed)
    assert movement(sweep.base, plan, alone, seed) > 100 * CLOSE
    assert distance(sweep.together[name], alone) < CLOSE


def test_the_base_that_was_given_has_not_changed(sweep: Sweep) -> None:
    assert sweep.before[0] == sweep.after[0]
    assert tiny.same(sweep.before[1], sweep.after[1])


def test_an_adapter_that_has_done_its_steps_leaves_the_batch(sweep: Sweep) -> None:
    count = len(METHODS)
    assert sweep.sizes == [count] * (STEPS - 7) + [count - 1] * 7
    assert set(sweep.together) == set(METHODS)
    assert sweep.training.steps == {}


def test_a_finished_adapter_is_an_ordinary_one(sweep: Sweep, tmp_path: Any) -> None:
    model = copy.deepcopy(sweep.base)
    lorary.save_adapter(sweep.together["dora"], tmp_path / "dora")
    lorary.load(model, tmp_path / "dora")
    assert distance(lorary.Adapter.of(model), sweep.together["dora"]) == 0


def test_adapters_of_one_method_differ_in_rate_and_seed_alone() -> None:
    """The sweep of a learning rate: equal plans, and of equal seeds equal batches."""
    base = llama()
    plan = lorary.plan(base, METHODS["lora"])
    rates = {f"{lr:g}": Settings(lr, 5, schedule="constant") for lr in (1e-4, 1e-3, 1e-2)}
    shared = SharedBase(base, dict.fromkeys(rates, plan), seeds=3)
    rows = batches(0, count=5)
    found = SharedTraining(shared, rates).run({name: iter(rows) for name in rates})
    for name, settings in rates.items():
        assert distance(found[name], train_alone(base, plan, settings, rows, 3)) < CLOSE
    assert distance(found["0.0001"], found["0.01"]) > 1e-3


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "Gemma2ForCausalLM", "Qwen3ForCausalLM"])
def test_other_architectures(kind: str) -> None:
    """Transposed and fused layers; capped logits; norms between the projections and attention."""
    changes = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0) if kind.startswith("GPT2") else {}
    base = tiny.seeded(kind, **changes)
    targets: Any = ["c_attn[q,v]", "c_fc"] if changes else "all-linear"
    plans = {name: lorary.plan(base, METHODS[name], targets) for name in ("lora", "dora", "multilora")}
    _assert_equal(base, plans)


def test_adapted_embeddings_and_head() -> None:
    """The head then computes the logits of all tokens, not of labelled ones alone."""
    base = llama()
    plans = {"lora": lorary.plan(base, METHODS["lora"], ["embed_tokens", "lm_head", "q_proj"])}
    plans["dora"] = lorary.plan(base, METHODS["dora"], ["lm_head", "v_proj"])
    _assert_equal(base, plans)


def test_micro_batches_are_one_step() -> None:
    """Their loss is the mean over all labels, however many each of them has; adapters may have different numbers."""
    base = llama()
    plan = lorary.plan(base, METHODS["dora"])
    rows = [batch for batch in batches(0, count=12) if batch["input_ids"].shape[1] == 7]
    rows[0]["labels"][0] = -100
    pairs = [(rows[i], rows[i + 1]) for i in (0, 2)]
    whole = [{key: torch.cat([one[key], two[key]]) for key in one} for one, two in pairs]
    shared = SharedBase(base, dict.fromkeys(("parts", "whole"), plan))
    training = SharedTraining(shared, Settings(1e-3, 2))
    losses = [training.step({"parts": list(p), "whole": w}) for p, w in zip(pairs, whole, strict=True)]
    for found in losses:
        assert found["parts"] == pytest.approx(found["whole"], rel=1e-5)
    assert distance(training.finished["parts"], training.finished["whole"]) < CLOSE


@pytest.mark.parametrize("autocast", [False, True])
def test_sixteen_bits(autocast: bool) -> None:
    """The proof of the first step takes their rounding for what it is."""
    base = llama() if autocast else llama().to(torch.bfloat16)
    plans = {name: lorary.plan(base, METHODS[name]) for name in ("lora", "dora", "vera")}
    training = SharedTraining(SharedBase(base, plans, seeds={"lora": 0, "dora": 1, "vera": 2}), Settings(1e-3, 3))
    for batch in batches(0, count=3):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses = training.step(dict.fromkeys(plans, batch))
    assert all(0 < loss < 10 for loss in losses.values())
    assert set(training.finished) == set(plans)


def test_names_mean_nothing() -> None:
    base = llama()
    methods = {"own": "dora", "base": "vera", "factors": "lora", "None": "dora", "model.layers.0": "lora"}
    _assert_equal(base, {name: lorary.plan(base, METHODS[preset], "attention") for name, preset in methods.items()})


def test_a_quantised_base() -> None:
    base = lorary.quantize(llama())
    plans = {name: lorary.plan(base, METHODS[name]) for name in ("lora", "dora", "vera")}
    plans["qlora"] = lorary.plan(base, lorary.method("qlora", r=2))
    _assert_equal(base, plans)


def test_a_classifier_with_a_new_head() -> None:
    """Each adapter trains a head of its own, in full."""
    base = tiny.seeded("LlamaForSequenceClassification", num_labels=3, pad_token_id=0)
    base.config.problem_type = "single_label_classification"
    plans = {name: lorary.plan(base, METHODS[name]) for name in ("lora", "dora")}
    assert all(plan.full for plan in plans.values())
    rows = [{**batch, "labels": batch["input_ids"][:, 0] % 3} for batch in batches(0, rows=3)]
    _assert_equal(base, plans, rows)


def test_gradient_checkpointing() -> None:
    base = llama()
    base.activation_checkpointing_enable({"use_reentrant": False})
    _assert_equal(base, {name: lorary.plan(base, METHODS[name]) for name in ("lora", "vera", "dora")})


def _assert_equal(base: Any, plans: dict[str, lorary.Plan], rows: list[dict[str, Tensor]] | None = None) -> None:
    rows = batches(0, count=6) if rows is None else rows[:6]
    settings = Settings(1e-3, 6)
    found = SharedTraining(SharedBase(base, plans), settings).run({name: iter(rows) for name in plans})
    for name, plan in plans.items():
        assert distance(found[name], train_alone(base, plan, settings, rows)) < CLOSE, name


def test_a_model_of_ones_own_takes_a_loss() -> None:
    """Convolutions and a plain output."""
    torch.manual_seed(0)
    base = tiny.ConvNet()
    plan = lorary.plan(base, lorary.method("lora", r=2), ["conv", "head"])
    x, target = torch.randn(4, 3, 9, 9), torch.tensor([0, 1, 2, 3])

    def loss(output: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(output, batch["labels"])

    shared = SharedBase(base, {"a": plan, "b": plan}, seeds={"a": 0, "b": 1}, loss=loss)
    rows = {"a": {"x": x, "labels": target}, "b": {"x": x[:2] * 2, "labels": target[:2]}}
    training = SharedTraining(shared, Settings(1e-2, 3, schedule="constant"))
    found = training.run({name: iter([batch] * 3) for name, batch in rows.items()})
    for name, batch in rows.items():
        model = lorary.attach(copy.deepcopy(base), plan, seed=int(name == "b")).train()
        optimizer = lorary.optimizer(model, 1e-2)
        for _ in range(3):
            loss(model(batch["x"]), batch).backward()
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
            optimizer.step()
            optimizer.zero_grad()
        assert distance(found[name], lorary.Adapter.of(model)) < CLOSE


# --- ends and resumes -------------------------------------------------------------------------------------------------


def test_numbers_that_are_not_finite_end_one_adapter_alone() -> None:
    base = llama()
    plan = lorary.plan(base, METHODS["lora"])
    settings = {"sound": Settings(1e-3, 6), "wild": Settings(1e30, 6, schedule="constant")}
    rows = batches(0, count=6)
    training = SharedTraining(SharedBase(base, dict.fromkeys(settings, plan)), settings)
    found = training.run({name: iter(rows) for name in settings})
    assert set(found) == {"sound"}
    assert 0 < training.diverged["wild"] < 6
    assert distance(found["sound"], train_alone(base, plan, settings["sound"], rows)) < CLOSE


def test_an_adapter_may_leave_at_any_step() -> None:
    base = llama()
    plan = lorary.plan(base, METHODS["lora"])
    rows = batches(0, count=6)
    training = SharedTraining(SharedBase(base, {"a": plan, "b": plan}), Settings(1e-3, 6))
    left: list[lorary.Adapter] = []

    def after(training: SharedTraining, losses: Any) -> None:
        if training.steps.get("a") == 2:
            left.append(training.leave("a"))

    found = training.run({"a": iter(rows), "b": iter(rows)}, after)
    assert set(found) == {"b"}
    assert distance(left[0], found["b"]) > 1e-4
    assert distance(found["b"], train_alone(base, plan, Settings(1e-3, 6), rows)) < CLOSE


@pytest.mark.parametrize("stop", [1, 4])
def test_a_resumed_sweep_goes_on_bit_for_bit(stop: int, tmp_path: Any) -> None:
    base = llama()
    plans = {name: lorary.plan(base, METHODS[name]) for name in ("lora", "adalora", "pissa", "dora", "delta-lora")}
    settings, rows = Settings(1e-3, 12, warmup=2), batches(0, count=12)

    def start() -> SharedTraining:
        return SharedTraining(SharedBase(base, plans), settings)

    def rest(done: int) -> dict[str, Iterator[dict[str, Tensor]]]:
        return {name: iter(rows[done:]) for name in plans}

    whole = start().run(rest(0))
    first = start()
    for batch in rows[:stop]:
        first.step(dict.fromkeys(plans, batch))
    for name in plans:
        first.save(name, tmp_path / name)
    second = start()
    assert {second.resume(name, tmp_path / name) for name in plans} == {stop}
    resumed = second.run(rest(stop))
    assert {name: distance(resumed[name], whole[name]) for name in plans} == dict.fromkeys(plans, 0.0)


def test_the_model_of_an_adapter_can_be_evaluated_between_steps() -> None:
    base = llama()
    plan = lorary.plan(base, METHODS["lora"])
    rows = batches(0, count=4)
    shared = SharedBase(base, {"a": plan, "b": plan}, seeds={"a": 0, "b": 1})
    training = SharedTraining(shared, Settings(1e-2, 4))
    for batch in rows[:3]:
        training.step({"a": batch, "b": batch})
    with torch.no_grad():
        alone = {name: shared.model(name)(**rows[3]).loss for name in shared.names}
        together = shared.losses({"a": rows[3], "b": rows[3]})
    for name in shared.names:
        torch.testing.assert_close(together[name], alone[name])
    assert abs(alone["a"] - alone["b"]) > 1e-6
