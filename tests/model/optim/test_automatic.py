"""Rules that follow the optimizer by hooks: the same as the calls in a loop, in any loop."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorary
from lorary.errors import StateError, TrainingError
from lorary.layers.adapted import adapted_layers
from lorary.model.optim import automatic
from tests import fresh
from tests.train.runs import VOCABULARY, adapted

STEPS, MICRO = 6, 3
ADALORA = {"r": 4, "target": 2, "start": 1, "final": 2}
METHODS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "adalora": (("adalora",), ADALORA),
    "delta-lora": (("delta-lora",), {"r": 4, "start": 1}),
    "o-lora": (("o-lora",), {"r": 4, "norms": 0.1}),
}


def model(method: str) -> Any:
    presets, options = METHODS[method]
    return adapted(*presets, targets="attention-qv", **options).train()


def batches(count: int = STEPS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, VOCABULARY, (count, MICRO, 2, 10), generator=generator)


def loss(made: Any, tokens: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = made(input_ids=tokens, labels=tokens).loss / MICRO
    return result


def clip_and_step(made: Any, optimizer: torch.optim.Optimizer) -> None:
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.05)
    optimizer.step()


def by_hand(made: Any, count: int = STEPS) -> Any:
    """The loop of the documentation."""
    optimizer = lorary.optimizer(made, lr=1e-2)
    rules = lorary.rules(made, STEPS, optimizer)
    for step in batches(count):
        for i, tokens in enumerate(step):
            total = loss(made, tokens)
            (total + rules.penalty() if i == MICRO - 1 else total).backward()
        rules.after_backward()
        clip_and_step(made, optimizer)
        rules.after_step()
        optimizer.zero_grad()
    return rules


def by_hooks(made: Any, count: int = STEPS) -> Any:
    """A loop that knows nothing of rules."""
    optimizer = lorary.optimizer(made, lr=1e-2)
    rules = lorary.rules(made, STEPS, optimizer, automatic=True)
    for step in batches(count):
        for tokens in step:
            loss(made, tokens).backward()
        clip_and_step(made, optimizer)
        optimizer.zero_grad()
    return rules


def apart(one: Any, other: Any) -> float:
    here, there = one.state_dict(), other.state_dict()
    assert {k: v.shape for k, v in here.items()} == {k: v.shape for k, v in there.items()}
    return max(float((v - there[name]).abs().max()) for name, v in here.items() if v.numel())


@pytest.mark.parametrize("method", METHODS)
def test_the_same_as_the_calls_in_a_loop(method: str) -> None:
    first, second = model(method), model(method)
    expected, found = by_hand(first), by_hooks(second)
    assert found.step == expected.step == STEPS
    assert apart(first, second) < 1e-6
    untouched = model(method)
    optimizer = lorary.optimizer(untouched, lr=1e-2)
    for step in batches():  # without rules it is another method
        for tokens in step:
            loss(untouched, tokens).backward()
        clip_and_step(untouched, optimizer)
        optimizer.zero_grad()
    if method == "adalora":
        assert adapted_layers(untouched)["model.layers.0.self_attn.q_proj"].params["E"].numel() == 4
        assert found.report() == expected.report()
    else:
        assert apart(untouched, second) > 1e-5


def test_of_several_micro_batches_the_last_one_counts() -> None:
    first, second = model("adalora"), model("adalora")
    expected, found = by_hand(first, 2).state_dict(), by_hooks(second, 2).state_dict()
    assert expected.keys() == found.keys()
    assert any(float(t.abs().max()) > 0 for name, t in expected.items() if ".I|" in name)
    for name, t in expected.items():
        assert torch.allclose(t.float(), found[name].float(), rtol=1e-3, atol=1e-9), name


def test_without_pytorchs_private_name_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = model("adalora"), model("adalora")
    by_hooks(first)
    monkeypatch.setattr(automatic, "engine_queue", lambda: None)
    by_hooks(second)
    assert apart(first, second) < 1e-7


def test_the_name_is_there() -> None:
    called: list[str] = []
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda _: automatic.call_after_backward(lambda: called.append("end")))  # type: ignore[no-untyped-call]
    x.register_post_accumulate_grad_hook(lambda _: called.append("accumulated"))
    (x * x).sum().backward()
    assert called == ["accumulated", "end"]


def test_a_penalty_reaches_layers_that_a_batch_has_not_used() -> None:
    first, second = model("adalora"), model("adalora")
    for made in (first, second):
        optimizer = lorary.optimizer(made, lr=1e-2)
        rules = lorary.rules(made, STEPS, optimizer, automatic=made is second)
        hidden = made.model.embed_tokens(batches()[0, 0])
        out = made.model.layers[0].self_attn.q_proj(hidden).square().mean()
        (out + rules.penalty() if made is first else out).backward()
    grads = [{n: p.grad for n, p in made.named_parameters() if p.grad is not None} for made in (first, second)]
    assert grads[0].keys() == grads[1].keys()
    assert any("layers.1" in name for name in grads[1])
    assert all(torch.allclose(g, grads[1][name], atol=1e-7) for name, g in grads[0].items())


def test_removed_hooks_do_nothing() -> None:
    made = model("adalora")
    optimizer = lorary.optimizer(made, lr=1e-2)
    rules = lorary.rules(made, STEPS, optimizer, automatic=True)
    rules.hooks.remove()
    loss(made, batches()[0, 0]).backward()
    optimizer.step()
    assert rules.step == 0


def test_a_method_without_rules_has_no_hooks() -> None:
    made = adapted(targets="attention-qv")
    assert lorary.rules(made, STEPS, lorary.optimizer(made, lr=1e-2), automatic=True).hooks is None


# --- two processes --------------------------------------------------------------------------------------------------


def rank(index: int, folder: str) -> None:
    """One of two processes: half of every batch."""
    os.environ.update(MASTER_ADDR="localhost", RANK=str(index), WORLD_SIZE="2")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=index, world_size=2)
    made = model("adalora")
    wrapped = nn.parallel.DistributedDataParallel(made)
    optimizer = lorary.optimizer(made, lr=1e-2)
    rules = lorary.rules(made, STEPS, optimizer, automatic=True)
    for step in batches(4):
        wrapped(input_ids=step[0, index : index + 1], labels=step[0, index : index + 1]).loss.backward()
        clip_and_step(made, optimizer)
        optimizer.zero_grad()
    torch.save((rules.state_dict(), made.state_dict()), f"{folder}/{index}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.xdist_group(fresh.GROUP)
def test_under_ddp_all_ranks_decide_the_same(tmp_path: Path) -> None:
    fresh.together(rank, str(tmp_path), count=2)
    (rules, weights), (others, other_weights) = (torch.load(tmp_path / str(i)) for i in range(2))
    assert all(torch.equal(t, others[name]) for name, t in rules.items())
    assert all(torch.equal(t, other_weights[name]) for name, t in weights.items())
    made = model("adalora")
    optimizer = lorary.optimizer(made, lr=1e-2)
    alone = lorary.rules(made, STEPS, optimizer, automatic=True)
    for step in batches(4):
        made(input_ids=step[0], labels=step[0]).loss.backward()
        clip_and_step(made, optimizer)
        optimizer.zero_grad()
    assert all(torch.equal(t, alone.state_dict()[name]) for name, t in rules.items() if "alive" in name)
    assert all(torch.allclose(t, weights[name], atol=1e-5) for name, t in made.state_dict().items())


# --- the callback ---------------------------------------------------------------------------------------------------


def test_a_checkpoint_without_the_rules_is_refused(tmp_path: Path) -> None:
    from tests.train.other_trainers import trainers

    made = trainers.model("adalora")
    trainers.train(tmp_path, "Trainer", made)
    (tmp_path / "checkpoint-2" / "lorary_rules.safetensors").unlink()
    with pytest.raises(TrainingError, match=r"checkpoint-2: there is no lorary_rules.safetensors in it"):
        trainers.train(tmp_path, "Trainer", trainers.model("adalora"), resume=tmp_path / "checkpoint-2")


def test_float16_is_refused() -> None:
    from types import SimpleNamespace

    callback = lorary.TrainerCallback(model("adalora"))
    with pytest.raises(TrainingError, match="this method cannot train in float16"):
        callback.on_train_begin(SimpleNamespace(fp16=True), SimpleNamespace(global_step=0), None)


def test_a_sharded_model_is_refused(tmp_path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        made = model("adalora")
        fully_shard(made, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=1e-2)
        with pytest.raises(StateError, match="is sharded by FSDP, where hooks do not see whole gradients"):
            lorary.rules(made, STEPS, optimizer, automatic=True)
    finally:
        torch.distributed.destroy_process_group()
