"""The tensor memory of a training step, counted while it runs.

The memory of a process also holds Python, its libraries and the allocator's free blocks, so it cannot be compared with
a prediction of tensors. Counted here is what `lorary.analysis.memory` predicts: the bytes of live tensors, at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from lorary.analysis.memory.live_bytes import LiveBytes
from lorary.kernels.torch_internals import storage_id
from lorary.layers.quantized_weight import is_quantized, stored_tensors

# The tasks whose step is what the prediction simulates, passes over given rows. Other tasks' steps hold more than one
# batch of tokens: answers as they are sampled, or mismatched pairs.
_COUNTED = ("sft", "dpo")


@dataclass(frozen=True)
class CountedStep:
    """The tensor memory of one step.

    Args:
        step: its number.
        peak: the most bytes of live tensors.
        batch: sequences of its largest micro-batch.
        length: tokens of each, padding included.
        labelled: share of these tokens with a label.
        padded: whether the micro-batch had an attention mask.
    """

    step: int
    peak: int
    batch: int
    length: int
    labelled: float
    padded: bool


class CountMemory(TrainerCallback):  # type: ignore[misc]  # Transformers has no types
    """Counts the live tensors of the session's second step, the first one in which the optimizer has its state.

    Counting changes no number. It is left out with several processes and in compiled models, and in runs of one step.

    Args:
        rule_state: returns the tensors of the method's rules.

    Attributes:
        counted: the result; None before that step.
    """

    def __init__(self, rule_state: Callable[[], Iterable[Tensor]]) -> None:
        self.rule_state = rule_state
        self.counted: CountedStep | None = None
        self._at = 0
        self._persistent = 0
        self._live: LiveBytes | None = None
        self._counting = ExitStack()
        self._hook: Any = None
        self._batches: list[tuple[int, int, float, bool]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        alone = args.world_size == 1 and not getattr(args, "torch_compile", False)
        self._at = state.global_step + 1 if alone else -1

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kept: Any) -> None:
        if state.global_step != self._at or self.counted is not None:
            return
        tensors = [*_tensors(model), *_optimizer_state(kept.get("optimizer")), *self.rule_state()]
        storages = {storage_id(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}
        self._persistent = sum(storages.values())
        self._hook = model.register_forward_pre_hook(self._note, with_kwargs=True)
        self._live = LiveBytes()
        self._counting.enter_context(self._live)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._live is None:
            return
        peak = self._persistent + self._live.peak
        self.close()
        if self._batches:
            self.counted = CountedStep(state.global_step, peak, *max(self._batches, key=lambda b: b[0] * b[1]))

    def close(self) -> None:
        """Stop counting; also after an error in the step."""
        if self._live is not None:
            self._counting.close()
            self._hook.remove()
            self._live = None

    def _note(self, _: Any, args: Any, inputs: dict[str, Any]) -> None:
        ids, labels = inputs.get("input_ids"), inputs.get("labels")
        if isinstance(ids, Tensor) and ids.dim() == 2:
            share = 1.0
            if isinstance(labels, Tensor) and labels.shape == ids.shape:
                share = float((labels[:, 1:] != -100).float().mean())
            self._batches.append((*ids.shape, share, inputs.get("attention_mask") is not None))


def count_memory(trainer: Any, task: str) -> CountMemory:
    """A counter that counts a step of this trainer, if the task is one whose memory is predicted."""
    counter = CountMemory(lambda: trainer.rules.state_dict().values())
    if task in _COUNTED:
        trainer.add_callback(counter)
    return counter


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """The model's own tensors, and their gradients."""
    for module in filter(is_quantized, model.modules()):
        yield from stored_tensors(module)
    yield from model.buffers()
    for parameter in model.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad


def _optimizer_state(optimizer: Any) -> Iterator[Tensor]:
    for state in getattr(optimizer, "state", {}).values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
