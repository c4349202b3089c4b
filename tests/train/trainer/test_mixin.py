"""The mixin in TRL's trainers: what trains, when the rules are called, and what may not change a result."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from transformers import LlamaForCausalLM, TrainerCallback

import lorary
from lorary.errors import StateError, TrainingError
from lorary.train.trainer import mixin as module
from lorary.train.trainer import resume
from tests.train.runs import adapted, dpo, frozen, llama, log, losses, pairs, rows, sft, trained

TRL_ASKS_BY_AN_OLD_NAME = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"


# --- what trains ----------------------------------------------------------------------------------------------------


def test_the_loss_falls_and_only_the_adapter_moves(tmp_path: Path) -> None:
    model = adapted(targets=["all-linear", "lm_head"], r=8, model=llama(tie_word_embeddings=False))
    base, before = frozen(model), trained(model)
    t = sft(tmp_path, model, learning_rate=1e-2, num_train_epochs=5)
    t.train()
    assert losses(t)[-1] < losses(t)[0] - 0.8
    assert trained(model) != before
    assert frozen(model) == base


def test_every_group_keeps_its_multiple_of_the_learning_rate(tmp_path: Path) -> None:
    rates: list[dict[str, float]] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
            rates.append({g["name"]: g["lr"] for g in optimizer.param_groups})

    t = sft(tmp_path, adapted("lora", "lora+", ratio=16))
    t.add_callback(Watch())
    t.train()
    assert {len(step) for step in rates} == {2}
    assert rates[0] == {"A": 0.0, "B x16": 0.0}  # the warmup starts at zero
    assert rates[2] == {"A": 2e-3, "B x16": 3.2e-2}
    assert all(step["B x16"] == pytest.approx(16 * step["A"]) for step in rates)
    assert rates[-1]["A"] < 2e-4


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "rmsprop"])
def test_optimizers_of_transformers_train_the_groups(tmp_path: Path, name: str) -> None:
    t = sft(tmp_path, adapted("lora", "lora+"), optim=name, max_steps=3, learning_rate=1e-3)
    before = trained(t.model)
    t.train()
    assert trained(t.model) != before
    assert [g["name"] for g in t.optimizer.param_groups] == ["A", "B x16"]


def test_an_optimizer_that_makes_its_own_groups_is_refused(tmp_path: Path) -> None:
    t = sft(tmp_path)
    t.optimizer_cls_and_kwargs = (torch.optim.SGD, {"params": [], "lr": 1.0})
    with pytest.raises(TrainingError) as caught:
        t.train()
    assert str(caught.value) == (
        "this optimizer cannot train adapters:\n"
        "  - optim: adamw_torch_fused makes its own groups: the method's learning rates would be lost\n"
        "      hint: use adamw_torch"
    )


def test_a_model_without_a_method_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="no adapter is attached"):
        sft(tmp_path, llama())


def test_settings_that_do_not_go_with_adapters_are_refused_together(tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as caught:
        sft(tmp_path, push_to_hub=True, auto_find_batch_size=True)
    assert str(caught.value) == (
        "these settings cannot be combined with an adapter:\n"
        "  - push_to_hub: checkpoints stay on this machine\n"
        "      hint: upload the adapter folder\n"
        "  - auto_find_batch_size: would change the order of the data\n"
        "      hint: set a batch size"
    )


def test_nothing_is_reported_to_anyone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(trl.trainer.base_trainer, "send_telemetry", lambda **words: told.append(words))
    sft(tmp_path)
    assert told == []
    monkeypatch.delattr(module.AdapterTraining, "_send_telemetry")
    sft(tmp_path)
    assert len(told) == 1  # so TRL would have


# --- what may not change a result -----------------------------------------------------------------------------------


def test_accumulation_does_not_change_the_loss(tmp_path: Path) -> None:
    """Rows have 3 to 10 labels: a mean of the means of micro-batches would be another number."""
    curves = []
    for batch, many in ((4, 1), (2, 2), (1, 4)):
        t = sft(tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=many)
        t.train()
        curves.append(losses(t))
    assert curves[1] == pytest.approx(curves[0], abs=2e-6)
    assert curves[2] == pytest.approx(curves[0], abs=2e-6)


def test_the_held_out_loss_is_the_mean_over_tokens_whatever_the_batch(tmp_path: Path) -> None:
    model = adapted()
    found = []
    for size in (1, 3, 5):
        t = sft(tmp_path, model, held_out=rows(5), per_device_eval_batch_size=size)
        found.append(t.evaluate()["eval_loss"])
        t.head.remove()
    total = labels = 0.0
    for row in rows(5):
        ids, y = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        count = int((y[:, 1:] != -100).sum())
        total += float(model(input_ids=ids, labels=y).loss.detach()) * count
        labels += count
    assert found == pytest.approx([total / labels] * 3, rel=1e-6)


def test_evaluations_leave_no_trace(tmp_path: Path) -> None:
    """Also with dropout, whose random numbers a data loader would otherwise disturb."""
    ends = set()
    for settings in ({"eval_strategy": "no"}, {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}):
        t = sft(tmp_path, adapted(dropout=0.2, attention_dropout=0.2), held_out=rows(5), max_steps=5, **settings)
        t.train()
        ends.add(trained(t.model))
    assert len(ends) == 1


def test_checkpointing_activations_changes_no_gradient(tmp_path: Path) -> None:
    curves = []
    for checkpointing in (False, True):
        t = sft(tmp_path, activation_checkpointing=checkpointing, max_steps=4)
        t.train()
        curves.append([(r["loss"], r["grad_norm"]) for r in log(t) if "loss" in r])
        assert all(p.grad is None for p in t.model.model.embed_tokens.parameters())
    for one, other in zip(*curves, strict=True):
        assert one == pytest.approx(other, rel=1e-6)


def test_packed_rows_are_learnt_as_if_they_stood_alone(tmp_path: Path) -> None:
    """One step over all rows: packed into few, and row by row; and the held-out loss of both ways."""
    found = []
    for packing in (False, True):
        words: dict[str, Any] = {"packing": True, "max_length": 32, "eval_packing": False} if packing else {}
        sizes = {"per_device_train_batch_size": 23, "gradient_accumulation_steps": 1, "per_device_eval_batch_size": 3}
        t = sft(tmp_path, max_steps=1, held_out=rows(7), eval_on_start=True, **sizes, **words)
        count = len(t.train_dataset)
        t.train()
        found.append((count, losses(t)[0], next(r["eval_loss"] for r in log(t) if "eval_loss" in r)))
    (whole, *apart), (packed, *together) = found
    assert packed < whole / 2
    assert together == pytest.approx(apart, abs=1e-5)


def test_a_model_whose_packed_rows_see_each_other_is_refused(tmp_path: Path) -> None:
    from lorary.train.data.sequence_packing import check_packing

    class Leaky(LlamaForCausalLM):
        def forward(self, input_ids: Any = None, position_ids: Any = None, **words: Any) -> Any:
            words = {k: v for k, v in words.items() if k in ("labels", "use_cache")}
            return super().forward(input_ids=input_ids, **words)

    collate = sft(tmp_path, packing=True, max_length=32).data_collator
    check_packing(llama(), collate)
    with pytest.raises(TrainingError) as caught:
        check_packing(Leaky(llama().config), collate)
    assert str(caught.value) == (
        "this model cannot train on packed rows:\n"
        "  - data.packing: packed examples of Leaky attend to each other (sdpa attention)\n"
        "      hint: set data.packing: false, or model.attn_implementation: flash_attention_2"
    )


def test_early_stopping_keeps_the_best_adapter(tmp_path: Path) -> None:
    from transformers import EarlyStoppingCallback

    model = adapted()
    t = sft(
        tmp_path,
        model,
        held_out=rows(4),
        learning_rate=0.3,  # so high that it gets worse
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_grad_norm=100.0,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
    )
    t.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    t.train()
    curve = [r["eval_loss"] for r in log(t) if "eval_loss" in r]
    assert len(curve) < 12
    assert curve.index(min(curve)) == len(curve) - 3
    assert t.evaluate()["eval_loss"] == pytest.approx(min(curve), abs=1e-7)


# --- DPO ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(TRL_ASKS_BY_AN_OLD_NAME)
@pytest.mark.parametrize("precompute", [False, True])
def test_dpo_learns_against_the_disabled_model(
    tmp_path: Path, precompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def second(*_: Any, **__: Any) -> None:
        raise AssertionError("the base was loaded a second time")

    monkeypatch.setattr(trl.trainer.dpo_trainer, "create_model_from_path", second)
    model = adapted(targets=["all-linear", "lm_head"], model=llama(tie_word_embeddings=False))
    base = frozen(model)
    t = dpo(tmp_path, model, learning_rate=1e-2, num_train_epochs=9, precompute_ref_log_probs=precompute)
    t.train()
    assert losses(t)[0] == pytest.approx(0.6931472, abs=1e-6)  # log 2: at first policy and reference are the same
    assert losses(t)[-1] < 0.4
    assert frozen(model) == base


@pytest.mark.filterwarnings(TRL_ASKS_BY_AN_OLD_NAME)
def test_reference_log_probabilities_are_the_bases(tmp_path: Path) -> None:
    plain = llama().eval()
    t = dpo(tmp_path, adapted(model=copy.deepcopy(plain)), learning_rate=2e-2)
    t.train()
    batch = t.data_collator(list(pairs(3)))
    mask, ids = batch["completion_mask"][:, 1:], batch["input_ids"]
    with torch.no_grad():
        log_p = plain(input_ids=ids, attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
        expected = (log_p.gather(-1, ids[:, 1:, None])[..., 0] * mask).sum(1)
        found = t.ref_model(input_ids=ids, attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
    chosen, rejected = t.compute_ref_log_probs(t.model, batch)
    torch.testing.assert_close(torch.cat([chosen, rejected]), expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(found, log_p)
    policy = t.model(input_ids=ids, attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
    assert (policy - log_p).abs().max() > 0.1


@pytest.mark.filterwarnings(TRL_ASKS_BY_AN_OLD_NAME)
@pytest.mark.parametrize("kind", ["ipo", "hinge", "sft"])
def test_trls_other_losses_are_there(tmp_path: Path, kind: str) -> None:
    t = dpo(tmp_path, learning_rate=2e-2, loss_type=kind, use_weighting=kind == "ipo", num_train_epochs=4)
    t.train()
    assert losses(t)[-1] < losses(t)[0]


# --- saving ---------------------------------------------------------------------------------------------------------


def test_save_model_writes_the_adapter_and_the_tokenizer_and_no_pickle(tmp_path: Path) -> None:
    model = adapted()
    t = sft(tmp_path, model, max_steps=2)
    t.train()
    t.save_model(str(tmp_path / "adapter"))
    names = sorted(p.name for p in (tmp_path / "adapter").iterdir())
    assert "tokenizer.json" in names
    assert not [n for n in names if n.endswith((".bin", ".pt"))]
    again = lorary.load(llama(), tmp_path / "adapter", trainable=True)
    assert trained(again) == trained(model)


@pytest.mark.parametrize("words", [("pissa",), ("qlora", "pissa")])
def test_a_run_goes_on_from_the_start_in_its_checkpoint_where_another_would_be_found(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    """As on a machine with other threads: a base that is packed by then could not give up another part."""
    model, again = llama(), llama()
    plan = lorary.plan(model, lorary.method(*words, r=2, niter=1))
    lorary.attach(model, plan, seed=0)
    lorary.save(model, tmp_path / "adapter")
    if "qlora" in words:
        other = lorary.attach(llama(), plan, seed=1)
        with pytest.raises(StateError, match="started at other tensors here, and its weight is quantised already"):
            resume.load_into(other, resume.read_adapter(tmp_path))
    lorary.attach(again, resume.plan_with_saved_start(plan, tmp_path), seed=1)
    resume.load_into(again, resume.read_adapter(tmp_path))
    assert trained(again) == trained(model)
    assert frozen(again) == frozen(model)
    ids = torch.arange(8)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
