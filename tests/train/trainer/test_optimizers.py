"""Optimizers by name: which one a configuration's name stands for, and what is said where it is not available."""

from __future__ import annotations

import warnings

import pytest
import torch

import lorary
from lorary.errors import TrainingError
from lorary.train.trainer import optimizers

MISSING = "is in bitsandbytes, which is not installed\n      hint: install bitsandbytes, or"
FIX = "set training.optimizer: adamw_torch"


def machine(monkeypatch: pytest.MonkeyPatch, *, cuda: bool, bitsandbytes: bool) -> None:
    """Which machine this is, is all that is made up."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(optimizers, "find_spec", lambda name: name if bitsandbytes else None)


@pytest.mark.parametrize(
    ("name", "cuda", "bitsandbytes", "expected"),
    [
        ("paged_adamw", True, True, "paged_adamw_32bit"),
        ("paged_adamw_32bit", True, True, "paged_adamw_32bit"),
        ("adamw_bnb_8bit", False, True, "adamw_bnb_8bit"),
        ("sgd", False, False, "sgd"),
        ("adamw_torch", False, False, "adamw_torch"),
    ],
)
def test_the_name_in_transformers(
    monkeypatch: pytest.MonkeyPatch, name: str, cuda: bool, bitsandbytes: bool, expected: str
) -> None:
    machine(monkeypatch, cuda=cuda, bitsandbytes=bitsandbytes)
    assert optimizers.transformers_name(name) == expected


@pytest.mark.parametrize(
    ("name", "cuda", "bitsandbytes", "reasons"),
    [
        ("adamw_bnb_8bit", True, False, [f"adamw_bnb_8bit {MISSING} {FIX}"]),
        ("paged_adamw", True, False, [f"paged_adamw {MISSING} {FIX}"]),
        (
            "paged_adamw_32bit",
            False,
            True,
            [f"paged_adamw_32bit pages memory with CUDA, and there is no CUDA device\n      hint: {FIX}"],
        ),
        (
            "paged_adamw",
            False,
            False,
            [
                f"paged_adamw {MISSING} {FIX}",
                f"paged_adamw pages memory with CUDA, and there is no CUDA device\n      hint: {FIX}",
            ],
        ),
    ],
)
def test_an_optimizer_that_is_not_available_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, cuda: bool, bitsandbytes: bool, reasons: list[str]
) -> None:
    machine(monkeypatch, cuda=cuda, bitsandbytes=bitsandbytes)
    with pytest.raises(TrainingError) as caught:
        optimizers.transformers_name(name)
    said = "".join(f"\n  - training.optimizer: {reason}" for reason in reasons)
    assert str(caught.value) == f"this optimizer is not available here:{said}"


def test_the_former_paged_optimizer_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, cuda=False, bitsandbytes=True)
    with pytest.warns(
        DeprecationWarning, match=r"lorary.PagedAdamW is deprecated: use bitsandbytes\.optim\.PagedAdamW32bit$"
    ):
        former = lorary.PagedAdamW  # type: ignore[attr-defined]
    with warnings.catch_warnings(), pytest.raises(TrainingError, match="there is no CUDA device"):
        former([torch.nn.Parameter(torch.ones(2))], lr=0.1)
