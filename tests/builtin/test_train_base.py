"""The training script: what decides the data order and the learning rate, and that a kill costs nothing but time."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import base_data
import base_recipe
import muon
import train_base

RECIPE = base_recipe.Recipe(
    vocabulary=64,
    hidden=16,
    mlp=32,
    layers=1,
    heads=2,
    key_value_heads=1,
    context=8,
    batch=2,
    steps=12,
    cycle=12,
    warmup=2,
    echoes=1,
)
DOCUMENTS = [np.random.default_rng(i).integers(3, 64, size=50 + i).astype(np.uint16) for i in range(4)]


def batches(start: int) -> list[torch.Tensor]:
    return list(base_data.batches(DOCUMENTS, RECIPE, start))


def test_batches_from_a_later_step_are_the_same_ones():
    every = batches(0)
    assert len(every) == RECIPE.steps
    assert all(batch.shape == (RECIPE.batch, RECIPE.context) for batch in every)
    later = batches(7)
    assert len(later) == 5
    assert all(torch.equal(a, b) for a, b in zip(every[7:], later, strict=True))


def test_an_epoch_shows_every_window_once_and_the_next_in_another_order():
    per_epoch = sum(map(len, DOCUMENTS)) // RECIPE.context // RECIPE.batch
    recipe = replace(RECIPE, steps=2 * per_epoch, echoes=0)
    seen = list(base_data.batches(DOCUMENTS, recipe, 0))
    first = torch.cat(seen[:per_epoch]).flatten().tolist()
    assert len(first) >= sum(map(len, DOCUMENTS)) - RECIPE.batch * RECIPE.context
    assert not torch.equal(torch.cat(seen[:per_epoch]), torch.cat(seen[per_epoch:]))


def test_the_learning_rate_warms_up_and_comes_down():
    shares = [base_recipe.share_of_lr(step, RECIPE) for step in range(RECIPE.steps)]
    assert shares[0] == 0.5
    assert shares[1] == shares[2] == 1.0
    assert shares[2:] == sorted(shares[2:], reverse=True)
    assert shares[-1] < 0.05
    twice = replace(RECIPE, steps=24)
    again = [base_recipe.share_of_lr(step, twice) for step in range(12, 24)]
    assert again == pytest.approx([twice.again * share for share in shares])


def test_the_first_windows_of_early_batches_echo():
    for step, batch in enumerate(batches(0)):
        for row, window in enumerate(batch):
            periods = [p for p in range(1, RECIPE.context // 2 + 1) if torch.equal(window[p:], window[:-p])]
            assert bool(periods) is (row < RECIPE.echoes and step < RECIPE.cycle // 3)


def test_muon_steps_along_the_nearest_orthogonal_matrix():
    """One step from zero momentum, against the singular value decomposition."""
    torch.manual_seed(0)
    for shape in ((12, 12), (8, 24), (24, 8)):
        matrix = torch.nn.Parameter(torch.randn(shape))
        before, matrix.grad = matrix.detach().clone(), torch.randn(shape)
        u, _, vh = torch.linalg.svd(matrix.grad, full_matrices=False)
        muon.Muon([matrix], lr=0.1, momentum=0.95, weight_decay=0.5).step()
        size = 0.1 * max(1, shape[0] / shape[1]) ** 0.5
        moved = (before * (1 - 0.1 * 0.5) - matrix.detach()) / size  # the direction O
        values = torch.linalg.svdvals(moved)
        assert values.min() > 0.6
        assert values.max() < 1.3
        assert torch.nn.functional.cosine_similarity(moved.flatten(), (u @ vh).flatten(), dim=0) > 0.97


def test_a_resumed_run_ends_in_the_same_weights(tmp_path):
    def trained(checkpoint: Path, kills: tuple[int, ...]) -> dict[str, torch.Tensor]:
        run = train_base.Run(RECIPE, checkpoint, compiled=False)
        for batch in base_data.batches(DOCUMENTS, RECIPE, start=run.step):
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
