"""Experts without a token: counted in the log, their gradients zero, and what AdamW does to them all the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorary
from lorary.layers.adapted import adapted_layers
from lorary.train import run
from lorary.train.config.load import from_dict
from lorary.train.trainer.idle_experts import IdleExperts
from tests.experts import IDS, moe, shake
from tests.train.runs import VOCABULARY, adapted, configuration, log, sft
from tests.train.small import tokenizer

TRL_ASKS_BY_AN_OLD_NAME = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
pytestmark = pytest.mark.filterwarnings(TRL_ASKS_BY_AN_OLD_NAME)


def many(**changes: Any) -> Any:
    """A Mixtral of 16 experts in each of two blocks, of which a row of three tokens cannot use all."""
    return moe("MixtralForCausalLM", num_local_experts=16, **changes)


def used_experts(model: Any) -> list[set[int]]:
    """The experts with a token, by block, filled by each forward pass."""
    used: list[set[int]] = []
    for block in model.model.layers:
        found: set[int] = set()
        block.mlp.experts.register_forward_pre_hook(
            lambda _, args, found=found: found.update(args[1].flatten().tolist())
        )
        used.append(found)
    return used


def test_the_share_is_that_of_the_experts_without_a_token() -> None:
    model = many()
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2)))
    idle = IdleExperts(model)
    assert idle.share() is None
    used = used_experts(model)
    model(input_ids=IDS[:1, :3]).logits.sum().backward()  # A has no gradient yet, because B is zero
    assert 0 < sum(map(len, used)) < 32
    assert idle.share() == pytest.approx(1 - sum(map(len, used)) / 32)


def test_models_without_experts_and_shared_adapters_have_none() -> None:
    model = adapted()
    model(input_ids=IDS).logits.sum().backward()
    assert IdleExperts(model).share() is None
    model = many()
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2), "experts.down_proj", experts="shared"))
    model(input_ids=IDS).logits.sum().backward()
    assert IdleExperts(model).share() is None


def test_an_idle_expert_moves_by_momentum_and_decay_alone() -> None:
    """AdamW's rule for a gradient of zero, to the bit: p (1 - lr wd) - lr m / (sqrt(v) + eps)."""

    def step(model: Any, ids: Tensor, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(input_ids=ids).logits.square().mean().backward()
        optimizer.step()

    def changed(decay: float, first: Tensor, second: Tensor) -> tuple[Tensor, set[int], set[int]]:
        """[E] whether an expert's factors move in the second step, and the experts of both steps."""
        model = many(num_hidden_layers=1)
        lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2), "experts.down_proj"))
        shake(model)
        optimizer = torch.optim.AdamW(lorary.param_groups(model, lr=1e-2, weight_decay=decay))
        (layer,) = adapted_layers(model).values()
        (used,) = used_experts(model)
        step(model, first, optimizer)
        before, in_first = layer.params["B"].detach().clone(), set(used)
        used.clear()
        step(model, second, optimizer)
        idle = [e for e in range(16) if e not in used]
        assert not layer.params["B"].grad[idle].any()
        assert not layer.params["A"].grad[idle].any()
        return (layer.params["B"] != before).flatten(1).any(1), in_first, set(used)

    moved, first, second = changed(0.0, IDS[:1, :3], IDS[:1, 3:6])
    assert first - second, "an expert must be idle after a step in which it had a token"
    assert {e for e in range(16) if moved[e]} == first | second  # the momentum of its own gradients
    moved, *_ = changed(0.1, IDS[:1, :3], IDS[:1, 3:6])
    assert moved.all()  # weight decay acts on every adapter, used or not


def test_the_log_has_the_share_of_every_step(tmp_path: Path) -> None:
    model = many(vocab_size=VOCABULARY)
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2)))
    trainer = sft(tmp_path, model, max_steps=3)
    trainer.train()
    shares = [record["idle_experts"] for record in log(trainer) if "loss" in record]
    assert len(shares) == 3
    assert all(0 <= share < 1 and share * 32 == pytest.approx(round(share * 32)) for share in shares)
    assert not any("idle_experts" in record for record in _of_llama(tmp_path))


def _of_llama(folder: Path) -> list[dict[str, Any]]:
    trainer = sft(folder, max_steps=1)
    trainer.train()
    return log(trainer)


def test_a_run_writes_it_and_its_report_shows_it(tmp_path: Path) -> None:
    base = tmp_path / "base"
    many(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1, pad_token_id=1).save_pretrained(base)
    tokenizer().save_pretrained(base)
    words = configuration(base, tmp_path / "rows.jsonl") | {"output": str(tmp_path / "out")}
    words["training"] |= {"max_steps": 2, "logging_steps": 1, "eval_steps": 2}
    run(from_dict(words))
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= record["idle_experts"] < 1 for record in records if "loss" in record)
    assert "Experts without a token" in (tmp_path / "out" / "report.html").read_text()
