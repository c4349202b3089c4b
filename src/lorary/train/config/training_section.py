"""The `training` section of a configuration: steps, optimizer, evaluation, and the settings of single tasks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from lorary.model.loading.source import Section
from lorary.train.config._fields import Count, Fraction, Integer, Number, Optimizer, Schedule, Size, Trackers


class TrainingSection(Section):
    """The optimization."""

    epochs: Annotated[Number, Field(gt=0, le=100_000)] | None = Field(
        default=None, description="passes over the training data; 3 if max_steps is empty too"
    )
    max_steps: Count | None = Field(default=None, description="optimizer steps; replaces epochs")
    batch_size: Size = Field(default=4, description="rows per device and forward pass")
    gradient_accumulation_steps: Size = Field(default=4, description="forward passes per optimizer step")
    eval_batch_size: Size | None = Field(default=None, description="rows per device in evaluation; empty: batch_size")
    lr: Annotated[Number, Field(gt=0, le=1)] | None = Field(
        default=None, description="learning rate; empty: the task's (sft 2e-4, dpo 5e-6), times the method's factor"
    )
    schedule: Schedule = Field(default="cosine", description="learning-rate schedule, as Transformers names it")
    schedule_options: dict[str, Any] = Field(
        default={}, description="the schedule's parameters, such as {min_lr_rate: 0.1} or {num_decay_steps: 100}"
    )
    warmup: Annotated[Number, Field(ge=0, le=1_000_000_000)] = Field(
        default=0.03, description="share of the steps if below 1, number of steps otherwise"
    )
    optimizer: Optimizer = Field(
        default="adamw_torch",
        description="as Transformers names it; paged_adamw (bitsandbytes, CUDA) keeps its state on the host",
    )
    optimizer_options: dict[str, Any] = Field(
        default={}, description="parameters of the optimizer's class, such as {momentum: 0.9} for sgd"
    )
    adam_beta1: Fraction | None = Field(default=None, description="decay of Adam's first moment; empty: 0.9")
    adam_beta2: Fraction | None = Field(default=None, description="decay of Adam's second moment; empty: 0.999")
    adam_epsilon: Annotated[Number, Field(gt=0, le=1)] | None = Field(
        default=None, description="Adam's epsilon; empty: 1e-8"
    )
    weight_decay: Annotated[Number, Field(ge=0, le=1)] = Field(
        default=0.0, description="decoupled weight decay, of matrices, of AdaLoRA's E and of all that GLoRA trains"
    )
    max_grad_norm: Annotated[Number, Field(ge=0, le=1e6)] = Field(
        default=1.0, description="gradient clipping norm; 0: no clipping"
    )
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations: less memory, about a third more time"
    )
    bf16: bool = Field(default=False, description="compute in bfloat16 with float32 weights (autocast)")
    torch_compile: bool = Field(default=False, description="compile the model with torch.compile: a slow first step")
    neftune_noise_alpha: Annotated[Number, Field(gt=0, le=1000)] | None = Field(
        default=None, description="NEFTune's noise on the embeddings in training, usually 5; empty: none"
    )
    label_smoothing: Fraction = Field(
        default=0.0, description="share of a target's probability that is spread over all tokens (SFT)"
    )
    seed: Annotated[Integer, Field(ge=0, le=2**32 - 1)] = Field(
        default=42, description="seed of the initialisation, dropout and the order of the rows"
    )
    data_seed: Annotated[Integer, Field(ge=0, le=2**32 - 1)] | None = Field(
        default=None, description="seed of the order of the rows; empty: training.seed"
    )
    logging_steps: Count = Field(default=10, description="optimizer steps between two log lines")
    eval_steps: Count | None = Field(default=None, description="optimizer steps between evaluations; empty: an epoch")
    save_steps: Count | None = Field(
        default=None, description="optimizer steps between checkpoints; empty: an epoch, or eval_steps to keep the best"
    )
    save_total_limit: Count = Field(default=2, description="checkpoints to keep")
    early_stopping_patience: Count | None = Field(
        default=None, description="stop after so many evaluations without a lower loss; keeps the best"
    )
    keep_best: bool = Field(default=False, description="save the best evaluation's adapter, not the last step's")
    report_to: Trackers = Field(default=("none",), description="tensorboard, wandb or trackio, beside metrics.jsonl")
    dpo_beta: Annotated[Number, Field(gt=0, le=1000)] | None = Field(
        default=None, description="DPO's beta, the pull to the reference; empty: 0.1"
    )
    kto_beta: Annotated[Number, Field(gt=0, le=1000)] | None = Field(
        default=None, description="KTO's beta, the pull to the base; empty: 0.1"
    )
    grpo_beta: Annotated[Number, Field(ge=0, le=1000)] | None = Field(
        default=None, description="GRPO's weight of the divergence from the base; empty: 0, none"
    )
    reference: Literal["start", "base"] | None = Field(
        default=None, description="the reference of these three after model.adapter: start, that adapter; or base"
    )
    reward: str | None = Field(
        default=None, description="GRPO's reward: FILE.py:FUNCTION, which runs; it takes completions, returns numbers"
    )
    num_generations: Annotated[Integer, Field(ge=2, le=65_536)] | None = Field(
        default=None, description="GRPO: answers to each prompt, which are compared; empty: 8"
    )
    max_completion_length: Size | None = Field(default=None, description="GRPO: tokens of an answer; empty: 256")

    @property
    def order_seed(self) -> int:
        """The seed of the order of the rows."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def keeps_best(self) -> bool:
        """Whether the best evaluation's adapter is the run's."""
        return self.keep_best or self.early_stopping_patience is not None
