"""A configuration in the words of TRL's trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from trl import DPOConfig, SFTConfig

from lorary.train.config.config import Config
from lorary.train.trainer.distributed import on_cpus
from lorary.train.trainer.optimizers import transformers_name


def arguments(config: Config, output: Path, *, held_out: bool, resumed: bool) -> Any:
    """`SFTConfig` or `DPOConfig` for a resolved configuration.

    Args:
        config: after `resolve`.
        output: the folder of the checkpoints.
        held_out: whether there are held-out rows.
        resumed: whether the run goes on; if not, the first evaluation is that of the base.
    """
    t = config.training
    words: dict[str, Any] = {
        "output_dir": str(output),
        "run_name": output.absolute().parent.name,
        "per_device_train_batch_size": t.batch_size,
        "per_device_eval_batch_size": t.eval_batch_size,
        "gradient_accumulation_steps": t.gradient_accumulation_steps,
        "learning_rate": t.lr,
        "lr_scheduler_type": _schedule(t.schedule, t.warmup),
        "warmup_steps": t.warmup,
        "optim": transformers_name(t.optimizer),
        "weight_decay": t.weight_decay,
        "max_grad_norm": t.max_grad_norm,
        "seed": t.seed,
        "data_seed": t.seed,
        "logging_steps": t.logging_steps,
        "logging_first_step": True,
        "report_to": list(t.report_to),
        "save_total_limit": t.save_total_limit,
        "activation_checkpointing": t.gradient_checkpointing,
        "gradient_checkpointing": None,  # the older name of the same, which TRL sets
        # The frozen weights are in the dtype that computes, unless autocast is asked for; the adapters' float32 masters
        # are cast to that dtype, not the activations.
        "bf16": t.bf16,
        "use_cpu": on_cpus(),  # else accelerate sees one process where torchrun has started several
        "disable_tqdm": True,
        "log_level": "error",  # Transformers' own messages; lorary has its own
        "log_level_replica": "error",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,  # every adapter takes part in every step
    }
    if t.max_steps is not None:
        words["max_steps"] = t.max_steps
    else:
        words["num_train_epochs"] = t.epochs
    words |= _interval("save", t.save_steps)
    words |= _interval("eval", t.eval_steps) | {"eval_on_start": not resumed} if held_out else {"eval_strategy": "no"}
    if t.early_stopping_patience is not None or t.keep_best:
        words |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    if config.task == "dpo":
        return DPOConfig(**words, beta=t.dpo_beta, max_length=None)
    packing = config.data.packing
    return SFTConfig(
        **words, packing=packing, eval_packing=False, max_length=config.data.max_length if packing else None
    )


def _interval(what: str, steps: int | None) -> dict[str, Any]:
    return {f"{what}_strategy": "steps", f"{what}_steps": steps} if steps is not None else {f"{what}_strategy": "epoch"}


def _schedule(name: str, warmup: float) -> str:
    """Transformers' plain `constant` has no warmup."""
    return "constant_with_warmup" if name == "constant" and warmup > 0 else name
