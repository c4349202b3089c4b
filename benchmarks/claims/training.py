"""One run: a plain loop around lorary's API, with the losses on held-out windows along the way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from tasks import REPORT, TUNING, batches, held_out
from torch import Tensor, nn

import lorary
from lorary import builtin

WARM_UP = 5  # optimizer steps over which the learning rate rises; it is constant afterwards
CLIP = 1.0  # the gradients' norm
TUNING_SEEDS = (1000, 1001)  # never reported


@dataclass(frozen=True)
class Size:
    """How much is done.

    Args:
        steps: optimizer steps of a run that needs time for what its method does on the way.
        short: optimizer steps of most runs.
        batch: windows of a step.
        windows: held-out windows of an evaluation.
        every: optimizer steps from one evaluation to the next.
        rungs: learning rates tried at first; 1: the first one is taken untried.
        seeds: pairs of runs that are compared.
    """

    steps: int = 90
    short: int = 60
    batch: int = 4
    windows: int = 24
    every: int = 10
    rungs: int = 3
    seeds: int = 5


FULL = Size()
QUICK = Size(steps=4, short=2, batch=1, windows=1, every=2, rungs=1, seeds=2)


class Setting(Protocol):
    """The sizes and the tuned learning rates, for those who build a model."""

    @property
    def size(self) -> Size:
        """How much is done."""
        ...

    def rate(self, arm: Arm, horizon: int) -> float:
        """The learning rate with the least held-out loss after `horizon` steps."""
        ...


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Args:
        name: of it.
        build: (setting, seed) -> a model with a method attached.
        task: what it learns.
        watched: the tasks whose held-out loss is followed.
        first: the lowest learning rate tried at first, an index into `protocol.LADDER`.
        short: whether it takes the fewer steps.
        rate: the learning rate, where it is given and not tuned.
        also: what else is noted of the trained model.
    """

    name: str
    build: Callable[[Setting, int], nn.Module]
    task: str
    watched: tuple[str, ...]
    first: int
    short: bool = True
    rate: float | None = None
    also: Callable[[nn.Module], dict[str, Any]] = lambda model: {}

    def steps(self, size: Size) -> int:
        """Optimizer steps of a run."""
        return size.short if self.short else size.steps


def attached(method: lorary.Method, **words: Any) -> Callable[[Setting, int], nn.Module]:
    """What builds the built-in base with a method in all of its linear layers."""

    def build(setting: Setting, seed: int) -> nn.Module:
        model = builtin.load_model()
        return lorary.attach(model, lorary.plan(model, method, **words), seed=seed)

    return build


@torch.no_grad()
def loss_on(model: nn.Module, windows: Tensor) -> float:
    """Mean loss per token, nats."""
    model.eval()
    losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in windows.split(8)]
    model.train()
    return sum(losses) / len(windows)


def trained_numbers(model: nn.Module) -> int:
    """How many numbers train, each once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def train(
    model: nn.Module,
    task: str,
    lr: float,
    seed: int,
    steps: int,
    batch: int,
    look: Callable[[int], None] = lambda step: None,
) -> None:
    """Train in place on batches of so many windows; `look` is called with the number of steps done, from 0."""
    optimizer = torch.optim.AdamW(lorary.param_groups(model, lr=lr))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP))
    rules = lorary.rules(model, steps, optimizer)
    torch.manual_seed(seed)  # dropout
    model.train()
    look(0)
    for step, ids in zip(range(1, steps + 1), batches(task, seed, batch), strict=False):
        loss = model(input_ids=ids, labels=ids).loss + rules.penalty()
        loss.backward()
        rules.after_backward()
        torch.nn.utils.clip_grad_norm_((p for p in model.parameters() if p.requires_grad), CLIP)
        optimizer.step()
        rules.after_step()
        optimizer.zero_grad()
        schedule.step()
        look(step)


def run(setting: Setting, arm: Arm, lr: float, seed: int) -> dict[str, Any]:
    """Train one model and follow its losses.

    Returns:
        A record for the ledger: `losses` holds [step, loss] pairs by task; a loss is None once it is not finite.
    """
    start, size = time.process_time(), setting.size
    steps, part = arm.steps(size), TUNING if seed in TUNING_SEEDS else REPORT
    model = arm.build(setting, seed)
    numbers = trained_numbers(model)
    losses: dict[str, list[tuple[int, float | None]]] = {task: [] for task in arm.watched}

    def look(step: int) -> None:
        if step % size.every == 0 or step == steps:
            for task in arm.watched:
                loss = loss_on(model, held_out(task, part, size.windows))
                losses[task].append((step, round(loss, 5) if math.isfinite(loss) else None))

    train(model, arm.task, lr, seed, steps, size.batch, look)
    return {
        "arm": arm.name,
        "lr": lr,
        "seed": seed,
        "steps": steps,
        "numbers": numbers,
        "numbers_left": trained_numbers(model),
        "also": arm.also(model),
        "cpu_seconds": round(time.process_time() - start, 1),
        "losses": losses,
    }
