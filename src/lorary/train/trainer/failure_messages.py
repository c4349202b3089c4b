"""What is said when training has to stop: what happened at which step, what would help, what checkpoint is left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lorary.analysis.memory.memory import Memory
from lorary.errors import Diagnostic, FileError, LoraryError, TrainingError
from lorary.files.atomic import FULL, refused
from lorary.model.plan import human_bytes
from lorary.train.trainer import checkpoint

# How allocators that raise a plain RuntimeError say it: PyTorch's for CPUs, its one for Apple's GPUs, and C++ itself.
_SPENT = ("DefaultCPUAllocator: can't allocate memory", "MPS backend out of memory", "std::bad_alloc")


@contextmanager
def with_failure_help(trainer: Any) -> Iterator[None]:
    """Inside, an error of training says what a user needs to go on from it.

    Args:
        trainer: whose steps are taken inside.

    Raises:
        TrainingError: memory ran out: at which step, with which batch, what was expected and what to change; or
            numbers were not finite.
        FileError: nothing more could be written.
    """
    try:
        yield
    except LoraryError as error:
        raise _with_checkpoint(error, trainer) from error
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise _with_checkpoint(_spent(error, trainer), trainer) from error
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise _with_checkpoint(refused(Path(trainer.args.output_dir), error), trainer) from error


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed, on a device or in the machine's own memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _SPENT)


def too_large(error: BaseException, predicted: Memory) -> TrainingError:
    """The error of a model whose weights alone are too much."""
    fix = "set model.dtype: bfloat16 for half of the weights' bytes, or take a smaller model"
    return TrainingError(
        "the model does not fit into memory:", [Diagnostic("model", reason(error), fix), _shown(predicted)]
    )


def reason(error: BaseException) -> str:
    """What the allocator said, in its first line."""
    text = str(error).strip().splitlines()
    return text[0].rpartition("] . ")[2].rpartition("err == 0. ")[2] if text else "there is no memory left"


def _with_checkpoint(error: LoraryError, trainer: Any) -> LoraryError:
    """The same error with the checkpoint that is left; as it is, where no step has been begun."""
    if trainer.batch is None:
        return error
    path, _ = checkpoint.newest(Path(trainer.args.output_dir))
    what = f"the last good one is kept: {path}" if path is not None else "none had been written yet"
    fix = "resume when there is room" if path is not None and isinstance(error, FileError) else ""
    return type(error)(error.headline, [*error.problems, Diagnostic("checkpoint", what, fix)])


def _spent(error: BaseException, trainer: Any) -> TrainingError:
    args, batch = trainer.args, trainer.batch
    if batch is None:
        where, problems = "before the first step", [Diagnostic("memory", reason(error))]
    else:
        shape, training = batch
        where = f"in optimizer step {trainer.state.global_step + 1}" if training else "in an evaluation"
        size = args.per_device_train_batch_size if training else args.per_device_eval_batch_size
        what = f"{' x '.join(map(str, shape))} tokens in one forward pass; {reason(error)}"
        problems = [Diagnostic("batch", what, _smaller(size, training))]
    if not (args.gradient_checkpointing or args.activation_checkpointing):
        fix = "set gradient_checkpointing: true, and they are computed again instead"
        problems.append(Diagnostic("gradient_checkpointing", "activations are kept for the backward pass", fix))
    problems.append(
        Diagnostic("max_length", "memory grows with the longest row of a batch", "set a smaller max_length")
    )
    if trainer.predicted is not None:
        problems.append(_shown(trainer.predicted))
    return TrainingError(f"training ran out of memory {where}:", problems)


def _smaller(size: int, training: bool) -> str:
    if size == 1:
        return ""
    if not training:
        return f"set eval_batch_size to {size // 2}: the loss is the same"
    return f"set batch_size to {size // 2} and double gradient_accumulation_steps: the steps are the same"


def _shown(memory: Memory) -> Diagnostic:
    parts = {name: getattr(memory, name) for name in ("weights", "optimizer", "activations", "logits", "working")}
    shown = ", ".join(f"{name} {human_bytes(value)}" for name, value in parts.items() if value)
    least = "more than " if memory.activations is None else ""
    return Diagnostic("prediction", f"{least}{human_bytes(memory.total)} at the fullest moment ({shown})")
