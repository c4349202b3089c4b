"""lorary in TRL's trainers: the mixin of the trainer of each task (`sft`, `dpo`, `kto`, `grpo`, `reward`, ...).

Everything that Transformers, TRL and accelerate can do is unchanged: packing, completion-only loss, gradient
accumulation and checkpointing, mixed precision, evaluation, early stopping, loggers, DDP and FSDP2. The mixin changes
only what an adapter needs, in the order of a step:

    loss            of labelled tokens only, also through an adapted head (`lorary.model.labelled_head`)
    + penalties     of the method's rules: in training, never in evaluation, once per optimizer step; logged as
                    `penalty`, while `loss` is the task's alone
    backward
    NaN guard       stops every rank if a loss or a gradient is not finite (`lorary.train.trainer.nan_guard`)
    after_backward  of the rules, on the gradients of the whole accumulated step, reduced over the ranks and not yet
                    clipped, so that what a rule sees of one parameter does not depend on the size of the others
    clipping
    optimizer       one group for each learning-rate multiplier (`lorary.param_groups`), of any class Transformers knows
    after_step      of the rules, before the gradients are cleared

Checkpoints hold the adapter, never the base, and are committed atomically (`lorary.train.trainer.checkpoint`); a
resumed run continues bit for bit (`lorary.train.trainer.resume`). TRL's telemetry is off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import EarlyStoppingCallback
from transformers.trainer_utils import SaveStrategy

import lorary
from lorary.adapters import save_adapter
from lorary.model.labelled_head import LabelledHead
from lorary.model.rank_pruning import resize_adapters
from lorary.model.state import require_attached
from lorary.train.data.sampler import SeededSampler, rows_in_batch
from lorary.train.trainer import checkpoint, distributed, resume, rng, same_run, trainer_internals
from lorary.train.trainer.callback import refuse_scaled_gradients
from lorary.train.trainer.events import Events, stopped_early, why_over
from lorary.train.trainer.failure_messages import with_failure_help
from lorary.train.trainer.idle_experts import IdleExperts
from lorary.train.trainer.nan_guard import NanGuard
from lorary.train.trainer.optimizers import refuse_own_groups
from lorary.train.trainer.quantized_base import hide_quantization
from lorary.train.trainer.refused_arguments import refuse_arguments
from lorary.train.trainer.signals import StopSignal

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer

    from lorary.analysis.memory.memory import Memory
else:
    _Trainer = object  # at run time TRL's trainer is the second base of the classes that use the mixin


class AdapterTraining(_Trainer):  # type: ignore[misc]  # Transformers has no types
    """Mixin over a TRL trainer, for a model with a method attached.

    Args:
        model: a causal language model or a classifier, as the trainer trains it, after `lorary.attach`.
        args: the trainer's own configuration.
        callbacks: Transformers' callbacks.
        rest: further arguments of the trainer: data sets, tokenizer.

    Attributes:
        rules: the method's `lorary.Rules`, once training has begun.
        head: the labelled head, which computes the losses of tokens.
        stop_signal: records SIGTERM and SIGINT during training.
        guard: the NaN guard; its `stop` is the signal that ended training, or 0.
        sampler: the order of the rows; None for a stream.
        batch: the shape of the latest micro-batch, and whether it was for training.
        predicted: the predicted memory of the run, for messages.
        stream_digest: of the first rows of a stream; empty: not known.
        compared_at_resume: further facts of the run, in words, that its checkpoint must share.
        fingerprint: of the base.
        optimizer_options: further arguments of the optimizer's class.
        extended: whether a resumed run goes on beyond its end: the patience of early stopping then starts again.

    Raises:
        StateError: no adapter is attached.
        TrainingError: settings that cannot be combined with an adapter; all of them.
    """

    statistics: tuple[str, ...] = ("entropy", "is_top1")
    compared_at_resume: Mapping[str, str] = {}
    scores_tokens = True  # whether the loss is computed from the log-probabilities of tokens

    def __init_subclass__(cls) -> None:
        trainer_internals.check_trainer(cls, AdapterTraining)

    def __init__(self, *, model: Any, args: Any, callbacks: list[Any] | None = None, **rest: Any) -> None:
        sites = require_attached(model, "train").sites
        refuse_arguments(args)
        args.logging_nan_inf_filter = False  # it would hide NaN in the log; the guard stops instead
        args.restore_callback_states_from_checkpoint = True  # early stopping continues to count
        if args.gradient_checkpointing:
            # with frozen embeddings no input of the first block would require a gradient
            model.enable_input_require_grads()
        self.rules: Any = None
        self.stop_signal = StopSignal()
        self.guard = NanGuard(lambda: self.stop_signal.received)
        self.idle_experts = IdleExperts(model)
        self.fingerprint = lorary.Fingerprint.of(model)  # before any rank holds only a shard of it
        self.row_digests = same_run.RowDigests()
        self.save_total_limit: int | None = args.save_total_limit
        self.sampler: SeededSampler | None = None
        self.batch: tuple[tuple[int, ...], bool] | None = None
        self.predicted: Memory | None = None
        self.stream_digest = ""
        self.optimizer_options: dict[str, Any] = {}
        self.extended = False
        self._resumed: dict[str, Any] = {}
        self.optimizer: Any
        before = model.__dict__.get("forward")
        with hide_quantization(model):
            super().__init__(model=model, args=args, callbacks=[Events(self), *(callbacks or [])], **rest)
        distributed.check_strategy(self.accelerator.state)
        if self.is_fsdp_enabled and any(site.share for site in sites):
            distributed.refuse_sharding_shared_layers()
        model.__dict__.pop("forward", None)  # TRL's own head
        if before is not None:
            model.__dict__["forward"] = before
        self.head: Any = LabelledHead(model, self.statistics).install() if self.scores_tokens else _OwnHead()

    def create_accelerator_and_postprocess(self) -> None:
        """Transformers' own, and FSDP2 on CPUs, where accelerate would silently use DDP."""
        super().create_accelerator_and_postprocess()
        if distributed.enable_fsdp_on_cpus(self.accelerator.state, self.args.fsdp_plugin_args):
            self.is_fsdp_enabled = True

    def _send_telemetry(self) -> None:
        """Nothing: TRL sends a report of every run from here."""

    # --- the step ---------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The trainer's loss, in training with the gradient of the penalties, whose value is logged separately."""
        ids = inputs["input_ids"] if "input_ids" in inputs else inputs["completion_ids"]
        self.batch = tuple(ids.shape), self.model.training
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        rules = self.rules.rules if self.rules is not None and self.model.training else ()
        if not rules or not self.accelerator.sync_gradients:
            return result
        # Once per step, with the last micro-batch; scaled up where the trainer divides every loss by their number.
        penalty = torch.as_tensor(self.rules.penalty())
        trainer_internals.log_metric(self, "penalty", float(penalty.detach()))
        penalty = penalty * (1 if self.loss_is_scaled_for_ga else self.current_gradient_accumulation_steps)
        gradient_only = penalty - penalty.detach()  # zero, so that the logged loss is the task's
        return (result[0] + gradient_only, result[1]) if return_outputs else result + gradient_only

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one micro-batch; after the last one the guard and the rules' `after_backward`."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.guard.note(loss)
        if self.accelerator.sync_gradients:
            scaled = self.accelerator.scaler is not None
            self.guard.check(self.model, self.state.global_step + 1, self._describe_rows, scaled)
            self.idle_experts.log(self)
            self.rules.after_backward()
        return loss

    def create_optimizer(self, model: Any = None) -> Any:
        """An optimizer of the class that `args.optim` names, over `lorary.param_groups`."""
        if self.optimizer is None:
            model = model if model is not None else self.model
            kind, settings = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, model)
            refuse_own_groups(self.args.optim, kind, settings)
            groups = lorary.param_groups(model, lr=self.args.learning_rate, weight_decay=self.args.weight_decay)
            self.optimizer = kind(groups, **settings | self.optimizer_options)
        return self.optimizer

    def start_rules(self, steps: int) -> None:
        """Start the rules for a run of `steps` optimizer steps, or continue from the checkpoint."""
        state = self._resumed["rules"] if self._resumed else None
        self.rules = lorary.rules(self.unwrapped_model(), steps, resume.unwrapped_optimizer(self), state)
        if self.rules.rules and self.accelerator.scaler is not None:
            refuse_scaled_gradients()
        if self._resumed:
            resume.restore_log(self, self._resumed["log"])

    def unwrapped_model(self) -> nn.Module:
        """The model without the wrappers of DDP and `torch.compile`."""
        model: nn.Module = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return distributed.reshard(model) if self.is_fsdp_enabled else model

    # --- the data ---------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """An order that is a function of the seed and the epoch; Transformers' own for its other strategies."""
        rows = train_dataset if train_dataset is not None else self.train_dataset
        strategy = self.args.train_sampling_strategy
        if strategy not in ("random", "sequential") or not hasattr(rows, "__len__"):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        self.sampler = SeededSampler(len(rows), seed, shuffle=strategy == "random")
        return self.sampler

    def start_epoch(self, epoch: float) -> None:
        """Set the sampler's epoch, which accelerate's loaders of several ranks do not when resumed in its middle."""
        if self.sampler is not None:
            self.sampler.set_epoch(int(epoch))

    def _describe_rows(self, micro_batch: int) -> str:
        """The rows of a micro-batch of the current step on this rank, for a message."""
        if self.sampler is None:
            return "rows of a stream, which have no numbers"
        accumulated, ranks = self.args.gradient_accumulation_steps, self.args.world_size
        steps = math.ceil(len(self.callback_handler.train_dataloader) / accumulated)
        epoch, step = divmod(self.state.global_step, steps)
        batch, rank = step * accumulated + micro_batch, self.args.process_index
        size = trainer_internals.train_batch_size(self)
        rows = rows_in_batch(self.sampler, size, epoch, batch, rank, ranks, self.args.dataloader_drop_last)
        return f"rows {', '.join(map(str, rows))} of the training data (the first is 0)"

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluation; it preserves the random numbers, so that its frequency does not change the run."""
        with rng.preserved():
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        if stopped_early(self) and self.args.save_strategy != SaveStrategy.NO:
            self.control.should_save = True  # so that the newest checkpoint says that the run is over
        return metrics

    # --- saving and resuming ----------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train. SIGTERM and SIGINT finish the step, save a checkpoint and return; a second one kills.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the newest complete one in `args.output_dir`.
            args: passed on.
            kwargs: passed on.

        Raises:
            FileError: there is no complete checkpoint, or it holds another adapter.
            TrainingError: the checkpoint belongs to another run; or non-finite numbers, or out of memory.
        """
        chosen = resume.choose_checkpoint(self, resume_from_checkpoint) if resume_from_checkpoint else None
        if chosen is not None:  # before the model is sharded and an optimizer holds its parameters
            adapter = resume.read_adapter(chosen)
            same_run.check(self, adapter, checkpoint.read(chosen))
            resize_adapters(self.unwrapped_model(), adapter.sites)
        # with a limit of 1 Transformers would remove the last checkpoint at the end, and the run would look unfinished
        self.save_total_limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with self.stop_signal, with_failure_help(self):
                output = super().train(str(chosen) if chosen is not None else None, *args, **kwargs)
        finally:
            self.args.save_total_limit = self.save_total_limit
        if chosen is not None and self.args.should_save:
            resume.remove_old_checkpoints(self)  # a kill may have come before their removal
        return output._replace(training_loss=output.metrics["train_loss"])

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log a line; the final mean loss is that of the whole run, resumed or not."""
        if "train_loss" in logs:
            logs["train_loss"] = trainer_internals.total_loss(self) / max(self.state.global_step, 1)
        if "loss" in logs:
            logs.update({name: value for name, value in self.rule_report().items() if isinstance(value, int | float)})
        super().log(logs, *args, **kwargs)

    def rule_report(self) -> dict[str, Any]:
        """The rules' current figures: numbers, or numbers by site."""
        return self.rules.report() if self.rules is not None else {}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter folder, with the tokenizer and its chat template."""
        adapter = resume.copy_adapter(self.unwrapped_model(), self.fingerprint)
        if self.rules is not None and self.rules.step:
            adapter = adapter.compact()  # without masked directions
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            save_adapter(adapter, folder, model=self.unwrapped_model())
            self.processing_class.save_pretrained(str(folder))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        path = Path(trainer_internals.output_folder(self, trial)) / f"checkpoint-{self.state.global_step}"
        if self.state.best_global_step:
            best = path.with_name(f"checkpoint-{self.state.best_global_step}")
            if best == path or best.is_dir():
                self.state.best_model_checkpoint = str(best)
        self.store_flos()
        resume.save_checkpoint(self, path)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._resumed = checkpoint.read(Path(resume_from_checkpoint))
        resume.load_into(self.unwrapped_model(), resume.read_adapter(Path(resume_from_checkpoint)))

    def _init_training_state(self, max_steps: int, steps_per_epoch: int, epochs: int, *args: Any) -> tuple[int, int]:
        """(epochs done, micro-batches done in the next one); of a run that is over all epochs, or it would go on."""
        epochs_done, batches_done = super()._init_training_state(max_steps, steps_per_epoch, epochs, *args)
        if args[0] is not None:
            resume.restore_best(self, Path(args[0]))
        return (epochs, 0) if why_over(self) else (epochs_done, batches_done)

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        for callback in self.callback_handler.callbacks:
            if self.extended and isinstance(callback, EarlyStoppingCallback):
                callback.early_stopping_patience_counter = 0

    def _load_optimizer_and_scheduler(self, path: str | None) -> None:
        if path is not None:
            resume.restore_optimizer(self, self._resumed)

    def _load_scaler(self, path: str | None) -> None:
        """Nothing: `restore_optimizer` restores it."""

    def _load_rng_state(self, path: str | None) -> None:
        if path is not None:
            rng.restore(self._resumed["rng"][self.args.process_index])

    def _load_best_model(self) -> None:
        best = resume.read_adapter(Path(self.state.best_model_checkpoint))
        resume.warn_of_pruning_since(best, self.state.best_global_step, self.rule_report().get("ranks", {}))
        resize_adapters(self.unwrapped_model(), best.sites)
        resume.load_into(self.unwrapped_model(), best)


class _OwnHead:
    """The head of a model that computes its own loss."""

    def remove(self) -> None:
        """Nothing: the model's `forward` is its own."""
