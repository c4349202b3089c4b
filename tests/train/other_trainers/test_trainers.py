"""Every trainer of Transformers and TRL: trains, saves the adapter, resumes bit for bit, loads the best checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trl

import lorary
from lorary.errors import TrainingError
from lorary.model.optim.watch import MethodWarning
from tests.train import runs
from tests.train.other_trainers.trainers import METHODS, SETTINGS, TRAINERS, apart, model, same, train, values
from tests.train.small import tokenizer

OLD_NAMES = "ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning"
# every trainer and every method, each pair of a trainer with its hardest method
CASES = [(name, "adalora") for name in TRAINERS] + [
    ("Trainer", "lora+"),
    ("SFTTrainer", "pissa"),
    ("DPOTrainer", "dora"),
    ("Trainer", "melora"),  # has no form in PEFT
]


@pytest.mark.parametrize(("name", "method"), CASES, ids=["-".join(case) for case in CASES])
def test_saved_and_resumed_bit_for_bit(tmp_path: Path, name: str, method: str) -> None:
    whole = model(method, name)
    first = train(tmp_path, name, whole)
    checkpoint = tmp_path / "checkpoint-2"
    files = {path.name for path in checkpoint.iterdir()}
    assert {"lorary.json", "adapter_model.safetensors"} <= files
    assert files & {"model.safetensors", "config.json", "pytorch_model.bin"} == set()
    assert ("lorary_rules.safetensors" in files) == (method == "adalora")
    resumed = model(method, name)
    second = train(tmp_path, name, resumed, resume=checkpoint)
    assert same(resumed, whole)
    assert not same(model(method, name), whole)
    assert runs.losses(second) == runs.losses(first)
    first.save_model()  # beside the checkpoints
    assert same(lorary.load(_base(name), tmp_path), whole)
    assert checkpoint.is_dir()


def _base(name: str) -> Any:
    return lorary.detach(model("lora", name))


@pytest.mark.parametrize("method", METHODS)
def test_the_best_checkpoint_is_loaded(tmp_path: Path, method: str) -> None:
    best = {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,  # which is that of the first checkpoint, since the loss falls
    }
    trained = model(method)
    run = train(tmp_path, "Trainer", trained, eval_dataset=TRAINERS["Trainer"][2](), **best)
    chosen = Path(run.state.best_model_checkpoint)
    assert chosen.name == "checkpoint-2"
    assert same(lorary.load(_base("Trainer"), chosen), trained)
    assert not same(lorary.load(_base("Trainer"), tmp_path / "checkpoint-4"), trained)


def test_adalora_ends_with_the_ranks_of_its_budget(tmp_path: Path) -> None:
    trained = model("adalora")
    run = train(tmp_path, "Trainer", trained)
    ranks = [t.numel() for name, t in values(trained).items() if name.endswith(".E")]
    assert sum(ranks) == 2 * len(ranks)  # `target`
    assert [line["rank_budget"] for line in run.state.log_history if "loss" in line][-1] == sum(ranks)


def test_two_callbacks_are_as_one(tmp_path: Path) -> None:
    once, twice = (model("adalora") for _ in range(2))
    train(tmp_path / "once", "Trainer", once)
    train(tmp_path / "twice", "Trainer", twice, callbacks=[lorary.TrainerCallback(twice)])
    assert same(once, twice)


def test_a_callback_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="the trainer trains another model"):
        train(tmp_path, "Trainer", model("lora"), callbacks=[lorary.TrainerCallback(model("lora"))])


def test_without_the_callback_adalora_keeps_its_ranks_and_says_so(tmp_path: Path) -> None:
    trained = model("adalora")
    with pytest.warns(MethodWarning, match="without its method's rules") as caught:
        run = train(tmp_path, "SFTTrainer", trained, rules=False)
    run.save_model(str(tmp_path / "final"))  # it has been said once
    assert len(caught) == 1
    assert "callbacks=[lorary.TrainerCallback(model)]" in str(caught[0].message)
    assert {t.numel() for name, t in values(trained).items() if name.endswith(".E")} == {4}


def test_without_the_optimizer_lora_plus_loses_its_ratio_and_says_so(tmp_path: Path) -> None:
    with_ratio, without = model("lora+", "SFTTrainer"), model("lora+", "SFTTrainer")
    train(tmp_path, "SFTTrainer", with_ratio)
    with pytest.warns(MethodWarning, match=r"ratios \(B x16\): at .*q_proj it has A 0.01, B 0.01; .*lorary.optimizer"):
        train(tmp_path, "SFTTrainer", without, optimizer=False)
    plain = model("lora", "SFTTrainer")
    train(tmp_path, "SFTTrainer", plain, optimizer=False)
    assert same(without, plain)
    assert apart(with_ratio, without) > 1e-2


# --- equal to lorary's own trainers ---------------------------------------------------------------------------------

# both: batches in the order of the rows, clipping that bites, two micro-batches to a step
_BOTH = {
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "train_sampling_strategy": "sequential",
    "max_grad_norm": 0.05,
    "num_train_epochs": 1,
    "max_steps": 4,
    "save_strategy": "no",
}


@pytest.mark.filterwarnings(OLD_NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_sft_equals_lorarys_own_trainer(tmp_path: Path, method: str) -> None:
    own, theirs, rows = model(method), model(method), runs.rows()
    runs.sft(tmp_path, own, train=rows, **(_BOTH | {"learning_rate": 1e-3, "warmup_steps": 0})).train()
    settings = _BOTH | {"learning_rate": 1e-3, "lr_scheduler_type": "cosine", "max_length": None}
    train(tmp_path, "SFTTrainer", theirs, train_dataset=rows, **settings)
    assert apart(own, theirs) < 1e-6
    assert method == "adalora" or apart(own, model(method)) > 1e-4


@pytest.mark.filterwarnings(OLD_NAMES)
@pytest.mark.parametrize("method", ["adalora", "dora"])
def test_dpo_equals_lorarys_own_trainer(tmp_path: Path, method: str) -> None:
    own, theirs = model(method), model(method)
    text = runs.pairs().map(lambda row: {k[:-4]: tokenizer().decode(v) for k, v in row.items()})
    text = text.select_columns(["prompt", "chosen", "rejected"])
    settings = _BOTH | {"learning_rate": 1e-3, "lr_scheduler_type": "cosine", "max_length": None}
    args = trl.DPOConfig(str(tmp_path), **(SETTINGS | settings | {"activation_checkpointing": False}))
    from lorary.train.trainer.dpo import DPOTrainer

    DPOTrainer(model=own, args=args, train_dataset=text, processing_class=tokenizer()).train()
    train(tmp_path, "DPOTrainer", theirs, train_dataset=text, **settings)
    assert apart(own, theirs) < 1e-6


# --- the reference --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DPOTrainer", "KTOTrainer", "GRPOTrainer"])
def test_the_reference_is_the_disabled_adapter_and_no_second_copy(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    for module in ("dpo_trainer", "kto_trainer", "grpo_trainer"):
        monkeypatch.setattr(f"trl.trainer.{module}.create_model_from_path", lambda path, **_: loaded.append(path))
    policy = model("lora", name)
    storages = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    run = train(tmp_path, name, policy, save_strategy="no")
    assert run.ref_model is None
    assert loaded == []
    assert {p.untyped_storage().data_ptr() for p in run.model.parameters()} == storages


@pytest.mark.filterwarnings(OLD_NAMES)
def test_the_reference_gives_the_numbers_of_a_copy(tmp_path: Path) -> None:
    alone, beside = model("dora", "DPOTrainer"), model("dora", "DPOTrainer")
    first = train(tmp_path, "DPOTrainer", alone, save_strategy="no")
    args = trl.DPOConfig(str(tmp_path), **(SETTINGS | {"save_strategy": "no"}))
    second = trl.DPOTrainer(
        model=beside,
        ref_model=_base("DPOTrainer"),
        args=args,
        train_dataset=TRAINERS["DPOTrainer"][2](),
        processing_class=tokenizer(),
        optimizers=(lorary.optimizer(beside, lr=1e-2), None),
    )
    second.train()
    assert apart(alone, beside) < 1e-7
    assert runs.losses(first) == pytest.approx(runs.losses(second), abs=1e-7)
    assert len(set(runs.losses(first))) > 1


# --- other heads ----------------------------------------------------------------------------------------------------


def test_an_adapter_on_the_head_that_trl_passes_by_is_said(tmp_path: Path) -> None:
    trained = model("lora", targets=["*.q_proj", "lm_head"])
    with pytest.warns(MethodWarning, match="no gradient has reached the adapter at lm_head"):
        train(tmp_path, "SFTTrainer", trained, save_strategy="no")
    same_layer = model("lora", targets=["*.q_proj", "lm_head"])
    train(tmp_path, "Trainer", same_layer, save_strategy="no")  # which does not pass it by: no warning
    assert float(values(same_layer)["lm_head.B"].abs().max()) > 0


@pytest.mark.parametrize(
    "settings",
    [{"label_smoothing_factor": 0.1}, {"neftune_noise_alpha": 5.0}, {"activation_checkpointing": True}],
    ids=str,
)
def test_options_of_the_trainer_that_ask_for_the_base_model(tmp_path: Path, settings: dict[str, Any]) -> None:
    trained, plain = model("lora"), model("lora")
    train(tmp_path, "Trainer", trained, save_strategy="no", **settings)
    train(tmp_path, "Trainer", plain, save_strategy="no")
    assert same(trained, plain) == ("activation_checkpointing" in settings)


# --- quantised bases ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_quantised_by_bitsandbytes_trains(tmp_path: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    runs.llama().save_pretrained(tmp_path / "base")
    small = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32} if bits == 4 else {"load_in_8bit": True}
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(**small), dtype=torch.float32
    )
    with pytest.raises(ValueError, match="purely quantized"):
        TRAINERS["Trainer"][0](base, TRAINERS["Trainer"][1](str(tmp_path), **SETTINGS))
    trained = runs.adapted(model=base, targets="attention-qv")
    before = values(trained)
    run = train(tmp_path, "Trainer", trained)
    assert any(not torch.equal(t, before[name]) for name, t in values(trained).items())
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()
    after = values(run.model)
    train(tmp_path, "SFTTrainer", trained, save_strategy="no")  # TRL rounds the adapter to bfloat16
    assert {t.dtype for t in values(trained).values()} == {torch.float32}
    assert any(not torch.equal(t, after[name]) for name, t in values(trained).items())
