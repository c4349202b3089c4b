"""The tables of optimizers and schedules against the installed Transformers, and their options."""

from __future__ import annotations

import importlib
import inspect

import pytest
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import Trainer, TrainingArguments
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from lorary.errors import ConfigError
from lorary.train.config.load import from_dict
from lorary.train.config.optimization import (
    OPTIMIZERS,
    REFUSED_OPTIMIZERS,
    REFUSED_SCHEDULES,
    SCHEDULES,
    adam_keys,
    optimizer_options,
)

LEAST = {"model": "builtin:base", "data": {"train": "builtin:docstrings", "validation_split": 0.1}}
_PASSED = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}


def test_every_optimizer_of_transformers_is_known_or_refused() -> None:
    theirs = {name.value for name in OptimizerNames}
    assert theirs == (OPTIMIZERS.keys() | REFUSED_OPTIMIZERS.keys()) - {"paged_adamw"}
    assert not OPTIMIZERS.keys() & REFUSED_OPTIMIZERS.keys()


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.keys() - {"paged_adamw"}))
def test_an_optimizer_is_the_class_that_transformers_takes(name: str, tmp_path: object) -> None:
    if OPTIMIZERS[name].startswith("bitsandbytes"):
        pytest.importorskip("bitsandbytes")
    args = TrainingArguments(output_dir=str(tmp_path), optim=name, report_to=[], use_cpu=True)
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, None)
    module, _, cls = OPTIMIZERS[name].partition(":")
    assert kind is getattr(importlib.import_module(module), cls)
    used = (("adam_beta1", "adam_beta2") if "betas" in settings else ()) + (
        ("adam_epsilon",) if "eps" in settings else ()
    )
    assert adam_keys(name) == used
    assert not set(optimizer_options(name)) & settings.keys() - {"scale_parameter", "alpha"}


def test_every_schedule_of_transformers_is_known_or_refused() -> None:
    assert {name.value for name in SchedulerType} == SCHEDULES.keys() | REFUSED_SCHEDULES.keys()


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_has_the_options_of_transformers(name: str) -> None:
    function = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
    theirs = inspect.signature(ReduceLROnPlateau if name == "reduce_lr_on_plateau" else function).parameters
    assert set(SCHEDULES[name]) == set(theirs) - _PASSED


def test_the_options_of_an_optimizer() -> None:
    assert optimizer_options("adamw_torch") == ["amsgrad"]
    assert optimizer_options("sgd") == ["momentum", "dampening", "nesterov"]
    assert "decay_rate" in optimizer_options("adafactor")


REFUSED = [
    ({"schedule_options": {"min_lr": 1e-5}}, "`training.schedule_options`: `min_lr` is not an option of cosine\n"
     "      hint: known: num_cycles"),
    ({"schedule": "linear", "schedule_options": {"power": 2}},
     "`training.schedule_options`: `power` is not an option of linear\n      hint: it has none"),
    ({"schedule": "polynomial", "schedule_options": {"power": "two"}},
     "`training.schedule_options`: `power` must be a number of at least 0, not 'two'"),
    ({"schedule": "warmup_stable_decay"}, "`training.schedule_options`: warmup_stable_decay needs `num_decay_steps`\n"
     "      hint: set schedule_options: {num_decay_steps: 100}"),
    ({"schedule": "warmup_stable_decay", "schedule_options": {"num_decay_steps": 0.2}},
     "`training.schedule_options`: `num_decay_steps` must be a whole number, not 0.2"),
    ({"schedule": "warmup_stable_decay", "max_steps": 50, "schedule_options": {"num_decay_steps": 100}},
     "`training.schedule_options`: `num_decay_steps` is 100, and the run has 50 steps"),
    ({"schedule": "warmup_stable_decay", "schedule_options": {"num_decay_steps": 9, "decay_type": "exponential"}},
     "`training.schedule_options`: `decay_type` must be linear or cosine or 1-sqrt, not 'exponential'"),
    ({"schedule": "cosine_with_min_lr"}, "`training.schedule_options`: cosine_with_min_lr needs `min_lr` or "
     "`min_lr_rate`\n      hint: set schedule_options: {min_lr_rate: 0.1}, a tenth of the peak"),
    ({"schedule": "cosine_with_min_lr", "schedule_options": {"min_lr": 1e-5, "min_lr_rate": 0.1}},
     "`training.schedule_options`: `min_lr` and `min_lr_rate` both set the lowest rate\n"
     "      hint: keep one of the two"),
    ({"schedule": "greedy"}, "`schedule` cannot be greedy: it follows single evaluations up and down; "
     "use reduce_lr_on_plateau"),
    ({"schedule": "reduce_lr_on_plateau", "warmup": 10},
     "`training.warmup`: has no effect with reduce_lr_on_plateau\n      hint: remove it"),
    ({"optimizer": "lomo"}, "`optimizer` cannot be lomo: it steps during the backward pass, before gradients are "
     "checked and clipped"),
    ({"optimizer": "sgd", "adam_beta1": 0.8}, "`training.adam_beta1`: has no effect: sgd does not use it\n"
     "      hint: remove it"),
    ({"optimizer": "sgd", "optimizer_options": {"momentun": 0.9}},
     "`training.optimizer_options`: `momentun` is not an option of sgd\n      hint: did you mean `momentum`?"),
    ({"optimizer_options": {"betas": [0.9, 0.99]}}, "`training.optimizer_options`: `betas` is not an option of "
     "adamw_torch\n      hint: set training.adam_beta1 and training.adam_beta2"),
    ({"adam_beta2": 1}, "`adam_beta2` must be below 1, not 1"),
    ({"neftune_noise_alpha": 0}, "`neftune_noise_alpha` must be above 0, not 0"),
    ({"label_smoothing": 1}, "`label_smoothing` must be below 1, not 1"),
]  # fmt: skip


@pytest.mark.parametrize(("training", "message"), REFUSED)
def test_options_without_effect_are_refused(training: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        from_dict(LEAST | {"training": training})
    assert str(refusal.value).partition(": ")[2] == message


def test_plateaus_need_held_out_data_and_have_no_warmup() -> None:
    with pytest.raises(ConfigError, match="reduce_lr_on_plateau needs held-out data"):
        from_dict(
            {"model": "builtin:base", "data": "builtin:docstrings", "training": {"schedule": "reduce_lr_on_plateau"}}
        )
    assert from_dict(LEAST | {"training": {"schedule": "reduce_lr_on_plateau"}}).resolve().training.warmup == 0


@pytest.mark.parametrize("given", [{"eval_steps": 4}, {"save_steps": 4}, {"eval_steps": 4, "save_steps": 4}])
@pytest.mark.parametrize("best", [{"keep_best": True}, {"early_stopping_patience": 2}])
def test_checkpoints_follow_evaluations_to_keep_the_best(given: dict[str, int], best: dict[str, object]) -> None:
    training = from_dict(LEAST | {"training": given | best}).resolve().training
    assert (training.eval_steps, training.save_steps) == (4, 4)
    assert from_dict(LEAST | {"training": {"eval_steps": 4}}).resolve().training.save_steps is None
