"""Paged AdamW in a training run: PyTorch's result, kept and found again; and what each name stands for where."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorary.errors import TrainingError
from lorary.paged import PagedAdamW, PagingWarning
from lorary.train import optimizers, run
from lorary.train.config_file import from_dict
from tests.train.runs import adapted, base_folder, changed, configuration, sft, trained

SETTINGS = {"optim": "adamw_torch", "num_train_epochs": 1, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}


def paged(folder: Path) -> Any:
    """A trainer whose moments are all paged, on the CPU too."""
    t = sft(folder, adapted("lora", "lora+"), **SETTINGS)
    words = {"lr": 2e-3, "page": True, "threshold": 64}
    t.optimizer_cls_and_kwargs = (PagedAdamW, words)
    return t


def test_paged_training_is_adamw_s_bit_for_bit_and_goes_on(tmp_path: Path) -> None:
    plain = sft(tmp_path / "plain", adapted("lora", "lora+"), **SETTINGS)
    plain.train()
    whole = paged(tmp_path / "paged")
    whole.train()
    assert isinstance(whole.optimizer.optimizer, PagedAdamW)
    assert all(whole.optimizer.optimizer.pages(p) for g in whole.optimizer.param_groups for p in g["params"])
    assert [g["name"] for g in whole.optimizer.param_groups] == ["A", "B x16"]
    assert trained(whole.model) == trained(plain.model)
    again = paged(tmp_path / "paged")
    again.train(resume_from_checkpoint=str(tmp_path / "paged" / "checkpoint-2"))
    assert trained(again.model) == trained(plain.model)
    other = sft(tmp_path / "plain", adapted("lora", "lora+"), **SETTINGS)  # either goes on from the other's checkpoint
    other.train(resume_from_checkpoint=str(tmp_path / "paged" / "checkpoint-2"))
    assert trained(other.model) == trained(plain.model)


def test_a_run_on_the_cpu_says_that_nothing_is_paged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = configuration(base_folder(tmp_path / "base"), Path("data.jsonl"))
    short = {"max_steps": 1, "eval_steps": 1, "save_steps": 1, "optimizer": "paged_adamw_torch"}
    with pytest.warns(PagingWarning, match="the parameters are on the CPU: this is torch.optim.AdamW") as told:
        done = run(from_dict(changed(words, "training", **short)), quiet=True)
    assert done.steps == 1
    assert len(told) == 1


@pytest.mark.parametrize(
    ("name", "cuda", "installed", "expected"),
    [
        ("paged_adamw", True, True, "paged_adamw_32bit"),
        ("paged_adamw", True, False, PagedAdamW),
        ("paged_adamw", False, True, PagedAdamW),
        ("paged_adamw_torch", True, True, PagedAdamW),
        ("paged_adamw_32bit", True, True, "paged_adamw_32bit"),
        ("sgd", True, True, "sgd"),
    ],
)
def test_what_a_name_stands_for(
    monkeypatch: pytest.MonkeyPatch, name: str, cuda: bool, installed: bool, expected: Any
) -> None:
    """Which machine this is, is all that is made up."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(optimizers, "find_spec", lambda name: name if installed else None)
    own = optimizers.own(name, SimpleNamespace(learning_rate=0.5, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6))
    assert expected == (own[0] if own else optimizers.known_as(name))
    if own:
        assert own[1] == {"lr": 0.5, "betas": (0.8, 0.9), "eps": 1e-6}
        assert optimizers.known_as(name) == "adamw_torch"


def test_an_optimizer_of_a_library_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    with pytest.raises(TrainingError) as caught:
        optimizers.known_as("paged_adamw_32bit")
    assert str(caught.value) == (
        "there is no such optimizer here:\n"
        "  - training.optimizer: paged_adamw_32bit is in bitsandbytes, which is not installed\n"
        "      hint: install bitsandbytes, or set training.optimizer: paged_adamw_torch"
    )
