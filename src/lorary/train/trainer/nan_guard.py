"""The guard: a loss or a gradient that is not finite stops the run before the optimizer has stepped.

Transformers' trainer steps all the same, and by default replaces such a loss in its log by the mean of the ones
before it. Here every step is looked at, logged or not, and every rank stops when one of them has to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lorary.errors import Diagnostic, TrainingError
from lorary.layers.dtensor import full_tensor, local_shard


class Guard:
    """Watches the losses of the micro-batches of one optimizer step, then the gradients that they left.

    Nothing is read from the device until `check`, which costs one transfer (and, over ranks, one small exchange)
    for each optimizer step.

    Args:
        signalled: the number of a signal that this process has received, or 0. It travels with the check, so that
            all ranks learn of it at the same step.
    """

    def __init__(self, signalled: Callable[[], int] = lambda: 0) -> None:
        self.signalled = signalled
        self.losses: list[Tensor] = []
        self.stop = 0  # the signal that any rank has received

    def note(self, loss: Tensor) -> None:
        """A micro-batch has had this loss."""
        self.losses.append(loss.detach())

    def check(self, model: nn.Module, step: int, rows: Callable[[int], str], scaled: bool = False) -> None:
        """Call when the gradients of an optimizer step are complete.

        Args:
            model: whose gradients to look at.
            step: the optimizer step about to be taken, from 1.
            rows: micro-batch -> which rows it held, in words.
            scaled: whether the gradients are scaled for fp16: then infinite ones are the scaler's business, which
                skips the step and takes a smaller scale.

        Raises:
            TrainingError: on every rank, if any of them has met a number that is not finite.
        """
        losses, self.losses = torch.stack(self.losses).float(), []
        # Every rank looks at its own shards; those of a layer that has no direction left are empty.
        gradients = [
            local_shard(p.grad) for p in model.parameters() if p.grad is not None and local_shard(p.grad).numel()
        ]
        sound = torch.isfinite(losses).all()
        if gradients and not scaled:
            # The largest entry: a sum of squares could overflow although no gradient did.
            largest = torch.nn.utils.get_total_norm(gradients, norm_type=float("inf"))
            sound = sound & torch.isfinite(largest).to(sound.device)
        flags = _largest(torch.stack([(~sound).int(), torch.tensor(self.signalled()).to(sound.device).int()]))
        failed, self.stop = flags.tolist()
        if failed:
            raise TrainingError(
                f"training stopped before optimizer step {step}: the numbers are no longer finite",
                gathered(_reasons(model, losses, rows)),
            )


def gathered(problems: list[Diagnostic]) -> list[Diagnostic]:
    """The problems of all ranks, each with the number of its rank; losses explain the gradients of other ranks."""
    if not _distributed():
        return problems
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, problems)
    every = [(rank, p) for rank, its in enumerate(everyone) for p in its]
    losses = [(rank, p) for rank, p in every if not p.where.startswith("gradient")]
    return [Diagnostic(f"rank {rank}, {p.where}", p.what, p.fix) for rank, p in losses or every]


def _reasons(model: nn.Module, losses: Tensor, rows: Callable[[int], str]) -> list[Diagnostic]:
    fix = "look at these rows; if they are sound, a lower learning rate or bfloat16 instead of float16 may help"
    problems = [
        Diagnostic(f"micro-batch {i}", f"the loss is {loss}; it held {rows(i)}", fix)
        for i, loss in enumerate(losses.tolist())
        if loss - loss != 0
    ]
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    bad = [name for name, g in found.items() if not torch.isfinite(full_tensor(g)).all()]
    if bad and not problems:
        held = "; ".join(f"micro-batch {i} held {rows(i)}" for i in range(len(losses)))
        shown = f"{bad[0]} and {len(bad) - 1} more" if len(bad) > 1 else bad[0]
        problems.append(Diagnostic(f"gradient of {shown}", f"is not finite, although every loss is; {held}", fix))
    return problems


def _largest(values: Tensor) -> Tensor:
    if _distributed():
        torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
    return values


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
