"""Error messages of a failed training step: the step, the remedy, and the last good checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorary.analysis.memory.memory import Memory
from lorary.errors import Diagnostic, FileError, LoraryError, TrainingError
from lorary.files.atomic import FULL, write_error
from lorary.model.out_of_memory import allocator_message, is_out_of_memory
from lorary.model.plan import human_bytes
from lorary.train.trainer import checkpoint


@contextmanager
def with_failure_help(trainer: Any) -> Iterator[None]:
    """A context that adds to an error of training how a user can go on.

    Args:
        trainer: the trainer whose steps run inside.

    Raises:
        TrainingError: out of memory, with the step, the batch, the prediction and remedies; or non-finite numbers.
        FileError: the disk is full.
    """
    try:
        yield
    except LoraryError as error:
        raise _with_checkpoint(error, trainer) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise _with_checkpoint(_out_of_memory(error, trainer), trainer) from error
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise _with_checkpoint(write_error(Path(trainer.args.output_dir), error), trainer) from error


def model_too_large(error: BaseException, predicted: Memory) -> TrainingError:
    """The error of a model whose weights alone do not fit into memory."""
    fix = "set model.dtype: bfloat16 for half of the weights' bytes, or take a smaller model"
    problems = [Diagnostic("model", allocator_message(error), fix), _prediction(predicted)]
    return TrainingError("the model does not fit into memory:", problems)


def _with_checkpoint(error: LoraryError, trainer: Any) -> LoraryError:
    """The same error with the last good checkpoint; unchanged before the first step."""
    if trainer.batch is None:
        return error
    path, _ = checkpoint.newest(Path(trainer.args.output_dir))
    what = f"the last good one is kept: {path}" if path is not None else "none had been written yet"
    fix = "resume when there is room" if path is not None and isinstance(error, FileError) else ""
    return type(error)(error.headline, [*error.problems, Diagnostic("checkpoint", what, fix)])


def _out_of_memory(error: BaseException, trainer: Any) -> TrainingError:
    args = trainer.args
    if trainer.batch is None:
        where, problems = "before the first step", [Diagnostic("memory", allocator_message(error))]
    else:
        shape, training = trainer.batch
        where = f"in optimizer step {trainer.state.global_step + 1}" if training else "in an evaluation"
        what = f"{' x '.join(map(str, shape))} tokens in one forward pass; {allocator_message(error)}"
        problems = [Diagnostic("batch", what, _smaller_batch(args, training))]
    if not (args.gradient_checkpointing or args.activation_checkpointing):
        fix = "set gradient_checkpointing: true to recompute them instead"
        problems.append(Diagnostic("gradient_checkpointing", "activations are kept for the backward pass", fix))
    what = "memory grows with the longest row of a batch"
    problems.append(Diagnostic("max_length", what, "set a smaller max_length"))
    if trainer.predicted is not None:
        problems.append(_prediction(trainer.predicted))
    return TrainingError(f"training ran out of memory {where}:", problems)


def _smaller_batch(args: Any, training: bool) -> str:
    size = args.per_device_train_batch_size if training else args.per_device_eval_batch_size
    if size == 1:
        return ""
    if not training:
        return f"set eval_batch_size to {size // 2}: the loss is the same"
    return f"set batch_size to {size // 2} and double gradient_accumulation_steps: the steps are the same"


def _prediction(memory: Memory) -> Diagnostic:
    parts = {name: getattr(memory, name) for name in ("weights", "optimizer", "activations", "logits", "working")}
    listed = ", ".join(f"{name} {human_bytes(value)}" for name, value in parts.items() if value)
    least = "more than " if memory.activations is None else ""
    return Diagnostic("prediction", f"{least}{human_bytes(memory.total)} at the peak ({listed})")
