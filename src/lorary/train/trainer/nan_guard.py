"""The NaN guard: a non-finite loss or gradient stops the run before the optimizer steps.

Transformers' trainer takes the step and by default replaces such a loss in its log by the mean of the previous ones.
The guard checks every step, logged or not, and stops every rank if one of them fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from lorary.errors import Diagnostic, TrainingError
from lorary.layers.dtensor import full_tensor, local_shard


class NotFiniteError(TrainingError):
    """A loss or a gradient is not finite."""


class NanGuard:
    """A check of the micro-batch losses of one optimizer step and of the gradients they produced.

    Nothing is read from the device until `check`, which costs one transfer (and, over ranks, one small exchange) per
    optimizer step.

    Args:
        signalled: the number of a signal that this process has received, or 0. It is exchanged with the check, so that
            all ranks stop at the same step.

    Attributes:
        stop: the signal that any rank has received, or 0.
    """

    def __init__(self, signalled: Callable[[], int] = lambda: 0) -> None:
        self.signalled = signalled
        self.losses: list[Tensor] = []
        self.stop = 0

    def note(self, loss: Tensor) -> None:
        """Record the loss of a micro-batch."""
        self.losses.append(loss.detach())

    def check(self, model: nn.Module, step: int, rows: Callable[[int], str], scaled: bool = False) -> None:
        """Call when the gradients of an optimizer step are complete.

        Args:
            model: its gradients are checked.
            step: the optimizer step about to be taken, from 1.
            rows: micro-batch -> a description of its rows.
            scaled: whether the gradients are scaled for fp16. The scaler then handles infinite ones: it skips the step
                and lowers the scale.

        Raises:
            NotFiniteError: on every rank, if any rank has a non-finite loss or gradient.
        """
        losses, self.losses = torch.stack(self.losses).float(), []
        # each rank checks its own shards; those of a fully pruned layer are empty
        shards = [local_shard(p.grad) for p in model.parameters() if p.grad is not None]
        gradients = [shard for shard in shards if shard.numel()]
        finite = torch.isfinite(losses).all()
        if gradients and not scaled:
            # the largest entry, since a sum of squares could overflow although no gradient did
            largest = torch.nn.utils.get_total_norm(gradients, norm_type=float("inf"))
            finite = finite & torch.isfinite(largest).to(finite.device)
        flags = torch.stack([(~finite).int(), torch.tensor(self.signalled()).to(finite.device).int()])
        if _distributed():
            torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        failed, self.stop = flags.tolist()
        if failed:
            headline = f"training stopped before optimizer step {step}: the numbers are no longer finite"
            raise NotFiniteError(headline, _of_all_ranks(_reasons(model, losses, rows)))


def _of_all_ranks(problems: list[Diagnostic]) -> list[Diagnostic]:
    """The problems of all ranks, each with its rank; if a loss failed, gradients of other ranks are left out."""
    if not _distributed():
        return problems
    rank = torch.distributed.get_rank()
    problems = gather_object([Diagnostic(f"rank {rank}, {p.where}", p.what, p.fix) for p in problems])
    return [p for p in problems if ", gradient" not in p.where] or problems


def _reasons(model: nn.Module, losses: Tensor, rows: Callable[[int], str]) -> list[Diagnostic]:
    fix = "look at these rows; if they are sound, a lower learning rate or bfloat16 instead of float16 may help"
    problems = [
        Diagnostic(f"micro-batch {i}", f"the loss is {loss}; it held {rows(i)}", fix)
        for i, loss in enumerate(losses.tolist())
        if not math.isfinite(loss)
    ]
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    bad = [name for name, g in gradients.items() if not torch.isfinite(full_tensor(g)).all()]
    if bad and not problems:
        held = "; ".join(f"micro-batch {i} held {rows(i)}" for i in range(len(losses)))
        listed = f"{bad[0]} and {len(bad) - 1} more" if len(bad) > 1 else bad[0]
        problems.append(Diagnostic(f"gradient of {listed}", f"is not finite, although every loss is; {held}", fix))
    return problems


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
