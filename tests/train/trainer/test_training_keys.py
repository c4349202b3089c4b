"""Each training key does in a lorary run what it does in Transformers' own Trainer: same losses, rates, adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from lorary.layers.adapted import adapted_layers
from lorary.train.config.load import from_dict
from lorary.train.runner.build import compile_backbone
from lorary.train.trainer.arguments import training_arguments
from lorary.train.trainer.sft import SFTTrainer
from tests.train.runs import adapted, rows
from tests.train.small import tokenizer

STEPS = 5


class Log(TrainerCallback):
    """The losses and learning rates of a run."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self.rates.append(float(logs["learning_rate"]))


def tensors(model: Any) -> torch.Tensor:
    return torch.cat([t.detach().flatten() for layer in adapted_layers(model).values() for t in layer.params.values()])


def configuration(training: dict[str, Any]) -> Any:
    common = {"max_steps": STEPS, "batch_size": 1, "gradient_accumulation_steps": 1, "lr": 1e-2, "logging_steps": 1}
    data = {"train": "builtin:docstrings", "validation_split": 0.5}
    return from_dict({"model": "builtin:base", "data": data, "training": common | training}).resolve()


def ours(
    folder: Path, training: dict[str, Any], held_out: Any = None, model: Any = None
) -> tuple[Log, torch.Tensor, SFTTrainer]:
    """A run of one row, through a configuration."""
    log, config = Log(), configuration(training)
    model = adapted() if model is None else model
    args = training_arguments(config, folder, held_out=held_out is not None, resumed=False)
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=rows(1),
        eval_dataset=held_out,
        processing_class=tokenizer(),
        callbacks=[log],
    )
    trainer.optimizer_options = config.training.optimizer_options
    trainer.train()
    return log, tensors(model), trainer


def theirs(folder: Path, optimizer: dict[str, Any], **words: Any) -> tuple[Log, torch.Tensor]:
    """The same run in Transformers' Trainer, of which nothing is lorary's but the adapter."""
    log, model = Log(), adapted()
    common = {"max_steps": STEPS, "per_device_train_batch_size": 1, "learning_rate": 1e-2, "logging_steps": 1}
    common |= {"lr_scheduler_type": "cosine", "warmup_steps": 0.03, "seed": 42, "report_to": [], "use_cpu": True}
    common |= {"optim": "adamw_torch", "save_strategy": "no", "disable_tqdm": True, "weight_decay": 0.0}
    args = TrainingArguments(output_dir=str(folder), **common | words)
    options: dict[str, Any] = {}
    if optimizer:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
        options["optimizer_cls_and_kwargs"] = (kind, settings | optimizer)
    trainer = Trainer(
        model=model, args=args, train_dataset=rows(1), data_collator=default_data_collator, callbacks=[log], **options
    )
    trainer.train()
    return log, tensors(model)


KEYS: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ({}, {}, {}),
    ({"neftune_noise_alpha": 5}, {}, {"neftune_noise_alpha": 5}),
    ({"label_smoothing": 0.2}, {}, {"label_smoothing_factor": 0.2}),
    (
        {"adam_beta1": 0.5, "adam_beta2": 0.8, "adam_epsilon": 1e-3},
        {},
        {"adam_beta1": 0.5, "adam_beta2": 0.8, "adam_epsilon": 1e-3},
    ),
    ({"optimizer_options": {"amsgrad": True}}, {"amsgrad": True}, {}),
    (
        {"optimizer": "sgd", "optimizer_options": {"momentum": 0.9, "nesterov": True}},
        {"momentum": 0.9, "nesterov": True},
        {"optim": "sgd"},
    ),
    (
        {"optimizer": "adafactor", "optimizer_options": {"decay_rate": -0.3}},
        {"decay_rate": -0.3},
        {"optim": "adafactor"},
    ),
    ({"optimizer": "rmsprop", "lr": 1e-3}, {}, {"optim": "rmsprop", "learning_rate": 1e-3}),
    ({"optimizer": "adagrad", "lr": 1e-3}, {}, {"optim": "adagrad", "learning_rate": 1e-3}),
    *(
        (
            {"schedule": name, "schedule_options": options, "warmup": 2},
            {},
            {"lr_scheduler_type": name, "lr_scheduler_kwargs": options, "warmup_steps": 2},
        )
        for name, options in {
            "warmup_stable_decay": {"num_decay_steps": 2, "min_lr_ratio": 0.1},
            "cosine_with_min_lr": {"min_lr_rate": 0.25},
            "cosine_warmup_with_min_lr": {"min_lr": 1e-3},
            "cosine_with_restarts": {"num_cycles": 2},
        }.items()
    ),
]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
def test_keys_do_what_they_do_in_transformers(tmp_path: Path) -> None:
    plain, _, _ = ours(tmp_path / "plain", {})
    for training, optimizer, words in KEYS:
        mine, adapter, _ = ours(tmp_path / "ours", training)
        reference, expected = theirs(tmp_path / "theirs", optimizer, **words)
        assert len(mine.losses) == STEPS
        assert mine.rates == pytest.approx(reference.rates, rel=1e-9), training
        assert mine.losses == pytest.approx(reference.losses, rel=2e-5), training
        assert float((adapter - expected).norm() / expected.norm()) < 1e-3, training  # Adam enlarges rounding errors
        if training:
            assert (mine.losses, mine.rates) != (plain.losses, plain.rates), f"{training} has an effect"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_smoothing_leaves_the_evaluation_alone(tmp_path: Path) -> None:
    """The loss of held-out rows is the plain one: two runs are compared by it."""
    settings = {"max_steps": 1, "lr": 1e-9}
    found = []
    for smoothing in (0.0, 0.5):
        _, _, trainer = ours(tmp_path, settings | {"label_smoothing": smoothing}, held_out=rows(4))
        found.append(next(r["eval_loss"] for r in trainer.state.log_history if "eval_loss" in r))
    assert found[0] == found[1]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_plateau_lowers_the_rate_and_is_resumed(tmp_path: Path) -> None:
    training = {
        "schedule": "reduce_lr_on_plateau",
        "schedule_options": {"patience": 0, "factor": 0.5, "threshold": 0.5},
        "eval_steps": 1,
        "save_steps": 3,
        "lr": 1e-4,
    }
    whole, _, trainer = ours(tmp_path, training, held_out=rows(3))
    halved = [rate for rate in whole.rates if rate < 1e-4]
    assert halved[-1] == pytest.approx(1e-4 * 0.5 ** (len(halved)))
    log, model, config = Log(), adapted(), configuration(training)
    again = SFTTrainer(
        model=model,
        args=training_arguments(config, tmp_path, held_out=True, resumed=True),
        train_dataset=rows(1),
        eval_dataset=rows(3),
        processing_class=tokenizer(),
        callbacks=[log],
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert log.rates == whole.rates[3:]
    assert torch.equal(tensors(again.model), tensors(trainer.model))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # of PyTorch's own compiler
def test_a_compiled_run_computes_the_same(tmp_path: Path) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = adapted()
    compile_backbone(model, backend="aot_eager")  # inductor would need a C++ compiler
    compiled, mine, _ = ours(tmp_path / "compiled", {"max_steps": 2}, model=model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    plain, expected, _ = ours(tmp_path / "plain", {"max_steps": 2})
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-5)
    assert float((mine - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["lion_32bit", "ademamix_8bit"])
def test_optimizers_of_bitsandbytes(tmp_path: Path, name: str) -> None:
    pytest.importorskip("bitsandbytes")
    training = {"optimizer": name, "lr": 1e-3, "adam_beta2": 0.9, "max_steps": 4}
    mine, _, trainer = ours(tmp_path / "ours", training)
    reference, _ = theirs(tmp_path / "theirs", {}, optim=name, learning_rate=1e-3, adam_beta2=0.9, max_steps=4)
    assert mine.losses == pytest.approx(reference.losses, rel=1e-4)
    assert mine.losses[-1] < mine.losses[0]
    assert type(trainer.optimizer.optimizer).__module__.startswith("bitsandbytes")
