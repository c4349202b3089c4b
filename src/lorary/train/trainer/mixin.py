"""lorary in TRL's trainers: the one mixin of `lorary.train.trainer.sft` and `lorary.train.trainer.dpo`.

Everything that Transformers, TRL and accelerate can do stays as it is: packing, completion-only loss, gradient
accumulation and checkpointing, mixed precision, evaluation, early stopping, loggers, DDP and FSDP2. The mixin
changes what an adapter needs, in the order of a step:

    loss            of labelled tokens only, through an adapted head too (`lorary.model.labelled_head`)
    + penalties     of the method's rules: in training, never in evaluation, once per optimizer step; the log has them
                    as `penalty`, and the task's loss alone as `loss`
    backward
    guard           stops every rank if a loss or a gradient is not finite (`lorary.train.trainer.nan_guard`)
    after_backward  of the rules, on the gradients of the whole accumulated step, reduced over the ranks and not yet
                    clipped: what a rule learns about one parameter shall not depend on the size of the others
    clipping
    optimizer       one group for each learning-rate multiplier (`lorary.param_groups`), of any class Transformers knows
    after_step      of the rules, before the gradients are cleared

and what is written: checkpoints hold the adapter, never the base, and are whole or not there at all
(`lorary.train.trainer.checkpoint`); a run that resumes goes on bit for bit. TRL's telemetry is off.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_optimizer import is_optimizer_factory

import lorary
from lorary.adapters import save_adapter
from lorary.errors import Diagnostic, TrainingError
from lorary.model.labelled_head import LabelledHead
from lorary.model.rank_pruning import fit
from lorary.model.state import require
from lorary.train.data.sampler import Position, SeededSampler, rows_of
from lorary.train.trainer import checkpoint, resume, rng
from lorary.train.trainer.distributed import check_strategy, fsdp_on_cpus, refuse_shares, resharded
from lorary.train.trainer.failure_messages import with_failure_help
from lorary.train.trainer.nan_guard import Guard
from lorary.train.trainer.quantized_base import taken_for_plain
from lorary.train.trainer.signals import StopSignal

if TYPE_CHECKING:
    from transformers import Trainer as _Loop

    from lorary.analysis.memory.memory import Memory
else:
    _Loop = object  # in earnest the trainer comes second in the bases of whoever uses the mixin


class AdapterTraining(_Loop):  # type: ignore[misc]  # Transformers has no types
    """Mixin over a TRL trainer, for a model with a method attached.

    Args:
        model: a causal language model, after `lorary.attach`.
        args: the trainer's own configuration.
        callbacks: Transformers' callbacks.
        rest: what else the trainer takes: data sets, tokenizer.

    Attributes:
        rules: the method's rules at work, once training has begun.
        head: what computes losses from labelled tokens.
        interruption: the signal that ended training, if one did.
        sampler: the order of the rows; None for a stream.
        batch: the shape of the latest micro-batch, and whether it was for training.
        predicted: the memory that the run was expected to take, where somebody has said it.
        fingerprint: of the base.

    Raises:
        StateError: nothing is attached.
        TrainingError: settings that cannot be combined with an adapter; all of them.
    """

    statistics: tuple[str, ...] = ("entropy", "is_top1")

    def __init__(self, *, model: Any, args: Any, callbacks: list[Any] | None = None, **rest: Any) -> None:
        require(model, "train")
        _check_arguments(args)
        args.logging_nan_inf_filter = False  # it would hide NaN in the log; the guard stops instead
        args.restore_callback_states_from_checkpoint = True  # early stopping goes on counting
        if args.gradient_checkpointing:
            # With the embeddings frozen, nothing before the first adapter requires a gradient otherwise.
            model.enable_input_require_grads()
        self.rules: Any = None
        self.interruption = StopSignal()
        self.guard = Guard(lambda: self.interruption.received)
        self.fingerprint = lorary.Fingerprint.of(model)  # now, while no rank holds only a shard of it
        self.sampler: SeededSampler | None = None
        self.batch: tuple[tuple[int, ...], bool] | None = None
        self.predicted: Memory | None = None
        self._resumed: dict[str, Any] = {}
        self._batches = 0
        self.optimizer: Any
        before = model.__dict__.get("forward")
        with taken_for_plain(model):
            super().__init__(model=model, args=args, callbacks=[_Events(self), *(callbacks or [])], **rest)
        check_strategy(self.accelerator.state)
        if self.is_fsdp_enabled and any(p.share for p in require(model, "train").sites):
            refuse_shares()
        del model.__dict__["forward"]  # TRL's own head
        if before is not None:
            model.__dict__["forward"] = before
        self.head = LabelledHead(model, self.statistics).install()

    def create_accelerator_and_postprocess(self) -> None:
        """Transformers' own, and FSDP2 on CPUs, where accelerate would give DDP without a word."""
        super().create_accelerator_and_postprocess()
        if fsdp_on_cpus(self.accelerator.state, self.args.fsdp_plugin_args):
            self.is_fsdp_enabled = True

    def _send_telemetry(self) -> None:
        """TRL reports every run to its makers from here. lorary does not."""

    # --- the step ---------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The trainer's loss; in training with the gradient of the rules' penalties, whose value the log has beside."""
        self.batch = tuple(inputs["input_ids"].shape), self.model.training
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        rules = self.rules.rules if self.rules is not None and self.model.training else ()
        if not rules or not self.accelerator.sync_gradients:
            return result
        # Once per step, with the last micro-batch. Where the trainer still divides every loss by the number of
        # micro-batches, the penalty is multiplied by it before.
        penalty = torch.as_tensor(self.rules.penalty())
        self._metrics["train"]["penalty"].append(float(penalty.detach()))
        penalty = penalty * (1 if self.loss_is_scaled_for_ga else self.current_gradient_accumulation_steps)
        still = penalty - penalty.detach()  # zero: the loss that is logged stays that of the task
        return (result[0] + still, result[1]) if return_outputs else result + still

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one micro-batch; after the last one the guard and the rules' `after_backward`."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.guard.note(loss)
        if self.accelerator.sync_gradients:
            scaled = self.accelerator.scaler is not None
            self.guard.check(self.model, self.state.global_step + 1, self._rows, scaled)
            self.rules.after_backward()
        return loss

    def create_optimizer(self, model: Any = None) -> Any:
        """An optimizer of the class that `args.optim` names, over `lorary.param_groups`."""
        if self.optimizer is None:
            model = model if model is not None else self.model
            kind, settings = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, model)
            if is_optimizer_factory(kind) or {"params", "model", "optimizer_dict"} & settings.keys():
                name = getattr(self.args.optim, "value", self.args.optim)
                what = f"{name} makes its own groups: the method's learning rates would be lost"
                problem = Diagnostic("optim", what, "use adamw_torch")
                raise TrainingError("this optimizer cannot train adapters:", [problem])
            rows = lorary.param_groups(model, lr=self.args.learning_rate, weight_decay=self.args.weight_decay)
            self.optimizer = kind(rows, **settings)
        return self.optimizer

    def begin(self, steps: int) -> None:
        """Starts the rules for a run of so many optimizer steps, or goes on where the checkpoint left them."""
        state = self._resumed["rules"] if self._resumed else None
        self.rules = lorary.rules(self.plain_model(), steps, resume.inner(self.optimizer), state)
        if self.rules.rules and self.accelerator.scaler is not None:
            what = "the rules would see gradients that are scaled"
            raise TrainingError("this method cannot train in float16:", [Diagnostic("fp16", what, "use bf16")])
        if self._resumed:
            resume.restore_log(self, self._resumed["log"])

    def plain_model(self) -> nn.Module:
        """The model itself, without what DDP or `torch.compile` put around it."""
        model: nn.Module = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return resharded(model) if self.is_fsdp_enabled else model

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

    def get_train_dataloader(self) -> Any:
        """The trainer's loader."""
        loader = super().get_train_dataloader()
        self._batches = len(loader) if hasattr(loader, "__len__") else 0
        return loader

    def start_epoch(self, epoch: float) -> None:
        """Tells the sampler: resumed in the middle of an epoch, accelerate's loaders of several ranks do not."""
        if self.sampler is not None:
            self.sampler.set_epoch(int(epoch))

    def _rows(self, micro_batch: int) -> str:
        """Which rows a micro-batch of the present step holds on this rank, in words."""
        if self.sampler is None or not self._batches:
            return "rows of a stream, which have no numbers"
        many, ranks = self.args.gradient_accumulation_steps, self.args.world_size
        epoch, step = divmod(self.state.global_step, -(-self._batches // many))
        at = Position(epoch, step * many + micro_batch, self.args.process_index)
        rows = rows_of(self.sampler, at, self._train_batch_size, ranks, self.args.dataloader_drop_last)
        return f"rows {', '.join(map(str, rows))} of the training data (the first is 0)"

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluation, which leaves no trace in the random numbers: how often it happens changes nothing."""
        with rng.untouched():
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        return metrics

    # --- saving and resuming ----------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains. SIGTERM and SIGINT finish the step, save a checkpoint and return; a second one kills.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the newest complete one in `args.output_dir`.
            args: passed on.
            kwargs: passed on.

        Raises:
            FileError: there is no complete checkpoint, or its adapter is another one.
            TrainingError: the checkpoint is of another run; or training met numbers that are not finite, or ran out
                of memory.
        """
        chosen = str(resume.choose(self, resume_from_checkpoint)) if resume_from_checkpoint else None
        if chosen is not None:  # while the model is whole, and nobody holds its parameters
            fit(self.plain_model(), resume.adapter_of(Path(chosen)).sites)
        with self.interruption, with_failure_help(self):
            output = super().train(chosen, *args, **kwargs)
        return output._replace(training_loss=output.metrics["train_loss"])

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Passes a line on to the loggers; the mean loss at the end is that of the whole run, resumed or not."""
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        if "loss" in logs:
            logs.update({name: value for name, value in self.figures().items() if isinstance(value, int | float)})
        super().log(logs, *args, **kwargs)

    def figures(self) -> dict[str, Any]:
        """What the rules report of the present moment: numbers, or numbers by site."""
        return self.rules.report() if self.rules is not None else {}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the adapter folder, with the tokenizer and its chat template."""
        adapter = resume.taken(self.plain_model(), self.fingerprint)
        if self.rules is not None and self.rules.step:  # what has been masked is no part of it
            adapter = adapter.compact()
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            save_adapter(adapter, folder, model=self.plain_model())
            self.processing_class.save_pretrained(str(folder))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        path = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.state.best_global_step:
            best = path.with_name(f"checkpoint-{self.state.best_global_step}")
            if best == path or best.is_dir():
                self.state.best_model_checkpoint = str(best)
        self.store_flos()
        resume.save(self, path)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._resumed = checkpoint.read(Path(resume_from_checkpoint))
        self._take_adapter(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, path: str | None) -> None:
        if path is not None:
            resume.restore_optimizer(self, self._resumed)

    def _load_scaler(self, path: str | None) -> None:
        """`restore_optimizer` has done it."""

    def _load_rng_state(self, path: str | None) -> None:
        if path is not None:
            rng.restore(self._resumed["rng"][self.args.process_index])

    def _load_best_model(self) -> None:
        best = resume.adapter_of(Path(self.state.best_model_checkpoint))
        resume.tell_directions(best, self.state.best_global_step, self.rules.report().get("ranks", {}))
        fit(self.plain_model(), best.sites)
        resume.put(self.plain_model(), best)

    def _take_adapter(self, path: str) -> None:
        resume.put(self.plain_model(), resume.adapter_of(Path(path)))


class _Events(TrainerCallback):  # type: ignore[misc]  # Transformers has no types
    """Passes the loop's events on to the trainer."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.begin(state.max_steps)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.start_epoch(state.epoch or 0)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.rules.after_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.guard.stop:
            control.should_save = control.should_training_stop = True


def _check_arguments(args: Any) -> None:
    found = []
    if args.push_to_hub:
        found.append(Diagnostic("push_to_hub", "checkpoints stay on this machine", "upload the adapter folder"))
    if args.auto_find_batch_size:
        found.append(Diagnostic("auto_find_batch_size", "would change the order of the data", "say a batch size"))
    if args.use_liger_kernel:
        found.append(Diagnostic("use_liger_kernel", "replaces the layers that are adapted", "leave it out"))
    if getattr(args, "sync_ref_model", False):
        found.append(Diagnostic("sync_ref_model", "the reference is the frozen base itself", "leave it out"))
    if found:
        raise TrainingError("these settings cannot be combined with an adapter:", found)
