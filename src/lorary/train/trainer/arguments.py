"""The trainer's arguments for a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from trl import DPOConfig, GRPOConfig, KTOConfig, RewardConfig, SFTConfig

from lorary.train.config.config import Config
from lorary.train.trainer.distributed import cpu_only
from lorary.train.trainer.optimizers import transformers_name

_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")


def training_arguments(config: Config, output: Path, *, held_out: bool, resumed: bool) -> Any:
    """The arguments of the task's trainer, such as `trl.SFTConfig`, for a resolved configuration.

    Args:
        config: after `resolve`.
        output: the folder of the checkpoints.
        held_out: whether there are held-out rows.
        resumed: whether the run continues; a new run evaluates the base first.
    """
    t = config.training
    options: dict[str, Any] = {
        "output_dir": str(output),
        "run_name": output.absolute().parent.name,
        "per_device_train_batch_size": t.batch_size,
        "per_device_eval_batch_size": t.eval_batch_size,
        "gradient_accumulation_steps": t.gradient_accumulation_steps,
        "learning_rate": t.lr,
        # Transformers' plain `constant` has no warmup
        "lr_scheduler_type": "constant_with_warmup" if t.schedule == "constant" and t.warmup > 0 else t.schedule,
        "warmup_steps": t.warmup,
        "lr_scheduler_kwargs": dict(t.schedule_options),
        "optim": transformers_name(t.optimizer),
        **{key: value for key in _ADAM if (value := getattr(t, key)) is not None},
        "neftune_noise_alpha": t.neftune_noise_alpha,
        "weight_decay": t.weight_decay,
        "max_grad_norm": t.max_grad_norm,
        "seed": t.seed,
        "data_seed": t.order_seed,
        "logging_steps": t.logging_steps,
        "logging_first_step": True,
        "report_to": [name for name in t.report_to if name != "tensorboard"] or ["none"],  # its folder is the run's
        "save_total_limit": t.save_total_limit,
        "activation_checkpointing": t.gradient_checkpointing,
        "gradient_checkpointing": None,  # the older name of the option, which TRL sets
        # Without autocast the frozen weights define the compute dtype; the adapter's float32 masters are cast to it.
        "bf16": t.bf16,
        "use_cpu": cpu_only(),  # without it accelerate sees one process where torchrun started several
        "disable_tqdm": True,
        "log_level": "error",  # of Transformers' own messages
        "log_level_replica": "error",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,  # every adapter is used in every step
        **({"num_train_epochs": t.epochs} if t.max_steps is None else {"max_steps": t.max_steps}),
        **_interval("save", t.save_steps),
        # every rank reads the whole stream and takes its rows: one rank's batches cannot be sent around unpadded
        **({"accelerator_config": {"dispatch_batches": False}} if config.data.streaming else {}),
    }
    options |= _interval("eval", t.eval_steps) | {"eval_on_start": not resumed} if held_out else {"eval_strategy": "no"}
    if t.keeps_best:
        options |= {"load_best_model_at_end": True}
    if t.keeps_best or t.schedule == "reduce_lr_on_plateau":
        options |= {"metric_for_best_model": "eval_loss", "greater_is_better": False}
        if config.task == "grpo":  # whose loss says nothing: it is near zero at every reward
            options |= {"metric_for_best_model": "eval_reward", "greater_is_better": True}
    return _of_task(config, options)


def _of_task(config: Config, options: dict[str, Any]) -> Any:
    t, task = config.training, config.task
    if task == "dpo":
        return DPOConfig(**options, beta=t.dpo_beta, max_length=None)
    if task == "kto":
        return KTOConfig(**options, beta=t.kto_beta, max_length=None, train_sampling_strategy="random")
    if task == "reward":
        return RewardConfig(**options, max_length=None)
    if task == "grpo":
        groups = {"num_generations": t.num_generations, "max_completion_length": t.max_completion_length}
        return GRPOConfig(**options, **groups, beta=t.grpo_beta)
    if task == "classification":
        del options["gradient_checkpointing"]  # which only TRL sets
        return TrainingArguments(**options, label_smoothing_factor=t.label_smoothing)
    packing = config.data.packing
    options["label_smoothing_factor"] = t.label_smoothing
    return SFTConfig(
        **options, packing=packing, eval_packing=False, max_length=config.data.max_length if packing else None
    )


def _interval(event: str, steps: int | None) -> dict[str, Any]:
    return {f"{event}_strategy": "epoch"} if steps is None else {f"{event}_strategy": "steps", f"{event}_steps": steps}
