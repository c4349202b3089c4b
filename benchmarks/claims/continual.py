"""One task after the other: C headers first, then prose. What the second one does to the first.

All ways begin from the same adapter of the first task. A fresh start for the second one begins at a
seed of its own: from the same seed it would start where the first one did.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import torch
from arms import LORA, lora
from ledger import Record
from measures import Figures
from protocol import Bench, loss_at, steps_to
from tasks import HEADERS, TOPICS
from torch import nn
from training import TUNING_SEEDS, Arm, Setting, train

import lorary
from lorary import builtin

SECOND_SEED = 10_000  # added to the first task's


@cache
def _learned(setting: Setting, seed: int) -> nn.Module:
    """The model with a LoRA that has learned the first task."""
    model, steps = LORA.build(setting, seed), setting.size.short
    train(model, HEADERS, setting.rate(LORA, steps), seed, steps, setting.size.batch)
    return model


def _same_adapter(setting: Setting, seed: int) -> nn.Module:
    return copy.deepcopy(_learned(setting, seed))


def _another(**options: object) -> Callable[[Setting, int], nn.Module]:
    def build(setting: Setting, seed: int) -> nn.Module:
        method, model = lora("o-lora", **options), builtin.load_model()
        plan = lorary.plan(model, method, after=[lorary.Adapter.of(_learned(setting, seed))])
        return lorary.attach(model, plan, seed=seed + SECOND_SEED)

    return build


def overlap(model: nn.Module) -> dict[str, float]:
    """Which share of A (its squared norm) lies in the directions of the first task's, on average over the layers."""
    shares = []
    for layer in (m for m in model.modules() if isinstance(m, lorary.Adapted)):
        if "A_past" in layer.params:
            Q = torch.linalg.qr(layer.params["A_past"].detach().T).Q  # [inp, r]
            A = layer.params["A"].detach()
            shares.append(((A @ Q).square().sum() / A.square().sum()).item())
    return {"overlap": round(sum(shares) / len(shares), 5)} if shares else {}


def _arm(name: str, build: Callable[[Setting, int], nn.Module], first: int = 3) -> Arm:
    return Arm(name, build, TOPICS, (TOPICS, HEADERS), first, also=overlap)


SAME = _arm("LoRA, the same one again", _same_adapter)
ANOTHER = _arm("LoRA, one for each task", _another(weight=0.0))
HARD = _arm("O-LoRA, hard", _another(hard=True))
WEIGHTS = {0.0: ANOTHER} | {w: _arm(f"O-LoRA, weight {w:g}", _another(weight=w)) for w in (0.5, 30.0, 1e3, 3e4)}
SOFT, STRONG = WEIGHTS[0.5], WEIGHTS[30.0]  # the default, and one at which learning begins to suffer: see `weights`


def weights(bench: Bench) -> dict[float, tuple[float, float, float]]:
    """weight -> means over the tuning seeds: the first task's loss in the end, the second one's, the overlap.

    All at the rate that is best for no weight at all.
    """
    rate, steps, found = bench.rate(ANOTHER, bench.size.short), bench.size.short, {}
    for weight, arm in WEIGHTS.items():
        runs = [bench.record(arm, rate, seed) for seed in TUNING_SEEDS]
        rows = [(loss_at(r, HEADERS, steps), loss_at(r, TOPICS, steps), r["also"]["overlap"]) for r in runs]
        found[weight] = tuple(sum(column) / len(rows) for column in zip(*rows, strict=True))
    return found


def both(method: list[Record], against: list[Record], horizon: int) -> Figures:
    """The mean loss over both tasks in the end, nats."""
    ours, theirs = (
        [(loss_at(run, HEADERS, horizon) + loss_at(run, TOPICS, horizon)) / 2 for run in runs]
        for runs in (method, against)
    )
    return ours, theirs


def forgotten(method: list[Record], against: list[Record], horizon: int) -> Figures:
    """By how much the first task's loss has risen in the end, nats."""
    return [_rise(run, horizon) for run in method], [_rise(run, horizon) for run in against]


def forgotten_equally_good(method: list[Record], against: list[Record], horizon: int) -> Figures:
    """The same when both have learned the second task equally well: as well as the worse of the two in the end."""
    figures: Figures = ([], [])
    for pair in zip(method, against, strict=True):
        target = max(loss_at(run, TOPICS, horizon) for run in pair)
        for run, into in zip(pair, figures, strict=True):
            into.append(_rise(run, steps_to(run, TOPICS, target, horizon)))
    return figures


def learned(method: list[Record], against: list[Record], horizon: int) -> Figures:
    """The second task's loss in the end, nats."""
    return [loss_at(run, TOPICS, horizon) for run in method], [loss_at(run, TOPICS, horizon) for run in against]


def _rise(run: Record, step: float) -> float:
    return loss_at(run, HEADERS, step) - loss_at(run, HEADERS, 0)
