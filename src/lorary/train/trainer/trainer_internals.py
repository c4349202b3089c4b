"""The private names of the trainers of Transformers and TRL, and of accelerate: the only file that reads or sets them.

`AdapterTraining` and its subclasses override the methods in `OVERRIDDEN`; a release in which one of them has gone or
takes other arguments would call ours never, or wrongly, and is refused when the class is made. `CONTRIBUTING.md` lists
all names.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from accelerate.state import PartialState

from lorary.errors import changed_release, check_overridden

OVERRIDDEN = {
    "_get_train_sampler": ("train_dataset",),
    "_init_training_state": (
        *("max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial"),
    ),
    "_load_best_model": (),
    "_load_callback_state": (),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_load_rng_state": ("checkpoint",),
    "_load_scaler": ("checkpoint",),
    "_prepare_dataset": ("dataset", "processing_class", "args", "dataset_name"),
    "_save_checkpoint": ("model", "trial"),
    "_send_telemetry": (),
}
"""Method of a trainer that lorary's trainers replace -> the first of its arguments."""
DIFFERENT = {"GRPOTrainer": {"_get_train_sampler": ("dataset",)}}
"""Class of a trainer -> those of its methods whose arguments have other names."""
TRL_ONLY = {"_send_telemetry"}
"""Those of them that Transformers' own trainer does not have, and does not call."""


def check_trainer(cls: type, mixin: type) -> None:
    """Refuse a trainer whose overridden methods are not what they were.

    Args:
        cls: of a trainer, the mixin before TRL's trainer among its bases.
        mixin: the class that overrides.

    Raises:
        LoraryError: every method that is missing or takes other arguments.
    """
    classes = cls.__mro__
    end = classes.index(mixin) + 1
    library = classes[end].__module__.partition(".")[0]
    ours = {name for name in OVERRIDDEN if any(name in vars(c) for c in classes[:end])}
    ours -= TRL_ONLY if library == "transformers" else set()
    taken = OVERRIDDEN | DIFFERENT.get(classes[end].__name__, {})
    check_overridden(classes[end], {name: taken[name] for name in taken if name in ours}, library)


def _read(trainer: Any, name: str) -> Any:
    if not hasattr(trainer, name):
        raise changed_release("transformers", f"its trainer has no {name}")
    return getattr(trainer, name)


# --- the log ----------------------------------------------------------------------------------------------------------


def log_state(trainer: Any) -> dict[str, Any]:
    """The sums since the last line of the log, as plain values."""
    return {
        "loss": float(_read(trainer, "_tr_loss")),
        "total": _read(trainer, "_total_loss_scalar"),
        "at": _read(trainer, "_globalstep_last_logged"),
        "metrics": {k: [float(v) for v in values] for k, values in _read(trainer, "_metrics")["train"].items()},
        "tokens": tokens_seen(trainer),
    }


def restore_log_state(trainer: Any, log: dict[str, Any]) -> None:
    """Continue with these sums, so that the next line of the log is the same."""
    trainer._tr_loss = _read(trainer, "_tr_loss") + log["loss"]
    trainer._total_loss_scalar, trainer._globalstep_last_logged = log["total"], log["at"]
    _read(trainer, "_metrics")["train"].update({k: list(v) for k, v in log["metrics"].items()})
    set_tokens_seen(trainer, log["tokens"])


def start_log(trainer: Any) -> None:
    """Give a trainer of Transformers, before its own constructor runs, the counters that TRL's trainers have."""
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    set_tokens_seen(trainer, 0)


def mean_metrics(trainer: Any) -> dict[str, float]:
    """The mean of every metric of training since the last line of the log; they begin again."""
    metrics = _read(trainer, "_metrics")["train"]
    means = {key: sum(values) / len(values) for key, values in metrics.items()}
    metrics.clear()
    return means


def drop_metric(trainer: Any, name: str) -> None:
    """Leave a metric out of the next line of the training log."""
    _read(trainer, "_metrics")["train"].pop(name, None)


def log_metric(trainer: Any, name: str, value: float) -> None:
    """Add a value to the mean of a metric in the next line of the training log."""
    _read(trainer, "_metrics")["train"][name].append(value)


def total_loss(trainer: Any) -> float:
    """The sum of the logged losses of all steps."""
    return float(_read(trainer, "_total_loss_scalar"))


def tokens_seen(trainer: Any) -> int:
    """The number of tokens in the training batches so far."""
    return int(_read(trainer, "_total_train_tokens"))


def set_tokens_seen(trainer: Any, count: int) -> None:
    """Set that number."""
    trainer._total_train_tokens = count


# --- the run ----------------------------------------------------------------------------------------------------------


def train_batch_size(trainer: Any) -> int:
    """The rows in a micro-batch of training on this rank."""
    return int(_read(trainer, "_train_batch_size"))


def output_folder(trainer: Any, trial: Any) -> str:
    """The folder of the checkpoints of a run or of a trial of a search."""
    return str(_read(trainer, "_get_output_dir")(trial))


def prepared_inputs(trainer: Any, batch: Any) -> dict[str, Any]:
    """A batch on the trainer's device."""
    inputs: dict[str, Any] = _read(trainer, "_prepare_inputs")(batch)
    return inputs


def make_sampler(trainer: Any) -> Any:
    """The order of the training rows; lorary's trainers keep it as `sampler`."""
    return _read(trainer, "_get_train_sampler")()


def leave_labels_unshifted(trainer: Any) -> None:
    """Tell TRL's supervised trainer that the model shifts the labels."""
    trainer._loss_shifts_labels = True


def set_distributed_type(state: Any, kind: Any) -> None:
    """Change how accelerate runs several processes, in a state and in the one that all states share."""
    state.distributed_type = PartialState._shared_state["distributed_type"] = kind
