"""The training script: what decides the data order and the learning rate, and that a kill costs nothing but time."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import train_base

RECIPE = train_base.Recipe(
    vocabulary=64, hidden=16, mlp=32, layers=1, heads=2, key_value_heads=1, context=8, batch=2, steps=12, warmup=2
)
DOCUMENTS = [np.random.default_rng(i).integers(3, 64, size=50 + i).astype(np.uint16) for i in range(4)]


def batches(start: int) -> list[torch.Tensor]:
    return list(train_base._batches(DOCUMENTS, RECIPE, start))


def test_batches_from_a_later_step_are_the_same_ones():
    every = batches(0)
    assert len(every) == RECIPE.steps
    assert all(batch.shape == (RECIPE.batch, RECIPE.context) for batch in every)
    later = batches(7)
    assert len(later) == 5
    assert all(torch.equal(a, b) for a, b in zip(every[7:], later, strict=True))


def test_an_epoch_shows_every_window_once_and_the_next_in_another_order():
    per_epoch = sum(map(len, DOCUMENTS)) // RECIPE.context // RECIPE.batch
    recipe = replace(RECIPE, steps=2 * per_epoch)
    seen = list(train_base._batches(DOCUMENTS, recipe, 0))
    first = torch.cat(seen[:per_epoch]).flatten().tolist()
    assert len(first) >= sum(map(len, DOCUMENTS)) - RECIPE.batch * RECIPE.context
    assert not torch.equal(torch.cat(seen[:per_epoch]), torch.cat(seen[per_epoch:]))


def test_the_learning_rate_warms_up_and_comes_down():
    rates = [train_base._lr(step, RECIPE) for step in range(RECIPE.steps)]
    assert rates[0] == pytest.approx(RECIPE.lr / 2)
    assert rates[1] == rates[2] == RECIPE.lr
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] < 0.05 * RECIPE.lr


def test_a_resumed_run_ends_in_the_same_weights(tmp_path):
    def trained(checkpoint: Path, kills: tuple[int, ...]) -> dict[str, torch.Tensor]:
        run = train_base.Run(RECIPE, checkpoint, compiled=False)
        for batch in train_base._batches(DOCUMENTS, RECIPE, start=run.step):
            run.update(batch)
            if run.step in kills:
                run.save()
                return trained(checkpoint, kills[1:])
        return run.model.state_dict()

    whole = trained(tmp_path / "a.pt", ())
    killed = trained(tmp_path / "b.pt", (3, 9))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    other = replace(RECIPE, seed=1)
    fresh = train_base.Run(other, tmp_path / "c.pt", compiled=False).model.state_dict()
    assert not torch.equal(whole["lm_head.weight"], fresh["lm_head.weight"])
    with pytest.raises(SystemExit, match="is of another recipe"):
        train_base.Run(other, tmp_path / "b.pt", compiled=False)
