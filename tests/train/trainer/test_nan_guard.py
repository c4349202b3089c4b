"""Numbers that are not finite stop a run before the optimizer steps, with step and rows by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lorary.errors import TrainingError
from lorary.train.data.sampler import SeededSampler, rows_in_batch
from lorary.train.trainer.nan_guard import NanGuard
from lorary.train.trainer.signals import StopSignal
from tests.train.runs import adapted, llama, losses, rows, sft, trained

POISON = 299  # a token of one row only


def _poisoned(row: int) -> Any:
    """`rows()` where one row holds the token whose embedding is not a number."""
    made = rows().to_list()
    made[row]["input_ids"][2] = POISON
    return type(rows()).from_list(made)


def _model() -> Any:
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[POISON] = math.nan
    return adapted(model=model)


ORDER = SeededSampler(23, seed=42).order(0)  # two rows in a micro-batch, two micro-batches in a step
STEP, MICRO, HELD = 3, 1, ORDER[10:12]


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_a_poisoned_row_stops_the_run_before_its_step(tmp_path: Path, logging_steps: int) -> None:
    schedule = {"lr_scheduler_type": "constant_with_warmup"}
    before = sft(tmp_path, max_steps=STEP - 1, **schedule)
    before.train()
    t = sft(tmp_path, _model(), train=_poisoned(HELD[0]), logging_steps=logging_steps, **schedule)
    with pytest.raises(TrainingError) as caught:
        t.train()
    assert str(caught.value) == (
        f"training stopped before optimizer step {STEP}: the numbers are no longer finite\n"
        f"  - micro-batch {MICRO}: the loss is nan; it held rows {HELD[0]}, {HELD[1]} of the training data "
        "(the first is 0)\n"
        "      hint: look at these rows; if they are sound, a lower learning rate or bfloat16 instead of float16 "
        "may help\n"
        "  - checkpoint: none had been written yet"
    )
    assert trained(t.model) == trained(before.model)  # where the step before had left it


def test_without_the_guard_the_run_would_go_on_in_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NanGuard, "check", lambda self, *_, **__: self.losses.clear())
    t = sft(tmp_path, _model(), train=_poisoned(HELD[0]))
    t.args.logging_nan_inf_filter = True  # Transformers' default
    t.train()
    assert t.state.global_step == 12
    assert sum(math.isnan(loss) for loss in losses(t)) == 0  # its log shows none of it
    assert not all(torch.isfinite(p).all() for p in t.model.parameters() if p.requires_grad)


def test_an_infinite_gradient_under_a_finite_loss_is_caught_too(tmp_path: Path) -> None:
    model = adapted()
    name, parameter = next((n, p) for n, p in model.named_parameters() if p.requires_grad)
    calls: list[int] = []

    def overflow(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return gradient * (math.inf if len(calls) == 6 else 1.0)  # in the second micro-batch of the third step

    parameter.register_hook(overflow)
    t = sft(tmp_path, model, max_grad_norm=0.0)
    with pytest.raises(TrainingError) as caught:
        t.train()
    assert str(caught.value).splitlines()[0].startswith("training stopped before optimizer step 3:")
    what = str(caught.value).splitlines()[1]
    assert what.startswith(f"  - gradient of {name}: is not finite, although every loss is; micro-batch 0 held rows ")
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_large_finite_gradient_passes() -> None:
    layer = torch.nn.Linear(64, 64)
    for parameter in layer.parameters():
        parameter.grad = torch.full_like(parameter, 1e38)  # its sum of squares would overflow
    guard = NanGuard()
    guard.note(torch.tensor(1.0))
    guard.check(layer, 1, str)


def test_scaled_gradients_are_left_to_the_scaler_but_losses_are_not() -> None:
    layer = torch.nn.Linear(2, 2)
    for parameter in layer.parameters():
        parameter.grad = torch.full_like(parameter, math.inf)
    guard = NanGuard()
    guard.note(torch.tensor(1.0))
    guard.check(layer, 1, str, scaled=True)
    guard.note(torch.tensor(math.inf))
    with pytest.raises(TrainingError, match="micro-batch 0: the loss is inf; it held 0"):
        guard.check(layer, 2, str, scaled=True)


def test_a_signal_travels_with_the_check() -> None:
    interruption = StopSignal()
    guard = NanGuard(lambda: interruption.received)
    for received in (0, 15):
        interruption.received = received
        guard.note(torch.tensor(1.0))
        guard.check(torch.nn.Linear(2, 2), 1, str)
        assert guard.stop == received


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_rows_named_are_the_rows_loaded(ranks: int, size: int) -> None:
    """For every number of rows: against PyTorch's batches and accelerate's division of them."""
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    for count in range(1, 20):
        sampler = SeededSampler(count, seed=3)
        for rank in range(ranks):
            batches = BatchSampler(sampler, size, drop_last=False)
            loaded = list(batches) if ranks == 1 else list(BatchSamplerShard(batches, ranks, rank))
            named = [rows_in_batch(sampler, size, epoch=0, batch=i, rank=rank, ranks=ranks) for i in range(len(loaded))]
            assert named == loaded


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    orders = {(s, e): tuple(SeededSampler(40, seed=s).order(e)) for s in range(4) for e in range(4)}
    assert len(set(orders.values())) == 16
    torch.manual_seed(1)
    torch.rand(7)
    assert tuple(SeededSampler(40, seed=2).order(3)) == orders[2, 3]
    assert all(sorted(order) == list(range(40)) for order in orders.values())
    assert SeededSampler(4, seed=0, shuffle=False).order(3) == [0, 1, 2, 3]
