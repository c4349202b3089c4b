"""lorary.disabled: blocks that overlap in any order, in threads, tasks and generators; and what is trained in them."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import lorary
from lorary.errors import StateError
from lorary.layers.adapted import adapted_layers
from lorary.model import disable
from lorary.model.state import base_parameter, state_of
from tests import tiny

METHODS = {
    "lora": (("lora",), {"r": 2}, {}),
    "bitfit": (("bitfit", "lora"), {"r": 2}, {}),
    "pissa": (("pissa",), {"r": 2}, {"tie_word_embeddings": True}),
    "qlora, pissa": (("qlora", "pissa"), {"r": 2}, {}),
    "longlora": (("longlora",), {"r": 2, "length": 6}, {"max_position_embeddings": 3}),
}


class Case:
    """A trained model with what it answers, and what its base does."""

    def __init__(self, name: str) -> None:
        words, options, changes = METHODS[name]
        self.model = tiny.seeded("BertForSequenceClassification" if name == "bitfit" else "LlamaForCausalLM", **changes)
        targets = ["q_proj", "lm_head"] if changes.get("tie_word_embeddings") else "attention"
        lorary.attach(self.model, lorary.plan(self.model, lorary.method(*words, **options), targets))
        with lorary.disabled(self.model):
            self.base = tiny.logits(self.model)
        tiny.shaken(self.model)
        self.adapted = tiny.logits(self.model)
        assert not torch.equal(self.adapted, self.base)
        self.before, self.values = tiny.everything(self.model), tiny.frozen_copy(self.model)

    def is_disabled(self) -> bool:
        found = tiny.logits(self.model)
        assert torch.equal(found, self.base) or torch.equal(found, self.adapted)
        attachment = lorary.attached(self.model)
        assert attachment is not None
        assert attachment.enabled != torch.equal(found, self.base)
        return torch.equal(found, self.base)

    def is_whole(self) -> bool:
        same = self.before == tiny.everything(self.model) and tiny.same(self.values, tiny.frozen_copy(self.model))
        return same and not self.is_disabled()


@pytest.fixture(params=METHODS)
def case(request: Any) -> Case:
    return Case(request.param)


def test_blocks_may_overlap(case: Case) -> None:
    first, second, third = (lorary.disabled(case.model) for _ in range(3))
    assert first.__enter__() is case.model
    second.__enter__()
    first.__exit__(None, None, None)  # before the second, which has begun in it
    assert case.is_disabled()
    third.__enter__()
    second.__exit__(None, None, None)
    assert case.is_disabled()
    third.__exit__(None, None, None)
    assert case.is_whole()


def test_generators_take_turns(case: Case) -> None:
    def answers() -> Iterator[Tensor]:
        with lorary.disabled(case.model):
            for _ in range(3):
                yield tiny.logits(case.model)

    one, other = answers(), answers()
    assert all(torch.equal(next(turn), case.base) for turn in (one, other, one, other, one))
    one.close()
    assert case.is_disabled()
    del other  # a generator that is not run to its end leaves its block when it is collected
    assert case.is_whole()


def test_tasks_take_turns(case: Case) -> None:
    async def work(turns: int) -> None:
        with lorary.disabled(case.model):
            for _ in range(turns):
                await asyncio.sleep(0)
                assert case.is_disabled()

    async def together() -> None:
        await asyncio.gather(*(work(turns) for turns in (1, 3, 2)))

    asyncio.run(together())
    assert case.is_whole()


def test_threads(case: Case) -> None:
    """Being disabled is a state of the model: a thread that is in no block sees it too."""
    inside, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with lorary.disabled(case.model):
            inside.set()
            assert leave.wait(60)

    def come_and_go() -> None:
        for _ in range(20):
            with lorary.disabled(case.model):
                assert case.is_disabled()

    with ThreadPoolExecutor(4) as pool:
        staying = pool.submit(stay)
        assert inside.wait(60)
        assert case.is_disabled()
        for done in [pool.submit(come_and_go) for _ in range(3)]:
            done.result()
        assert case.is_disabled()
        leave.set()
        staying.result()
    assert case.is_whole()
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(come_and_go) for _ in range(4)]:
            done.result()
    assert case.is_whole()


def test_an_error_in_one_of_two_blocks(case: Case) -> None:
    with lorary.disabled(case.model):
        with pytest.raises(ZeroDivisionError), lorary.disabled(case.model):
            _ = 1 / 0
        assert case.is_disabled()
    assert case.is_whole()


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("lora", "qlora, pissa")])
@pytest.mark.parametrize("step", ["copied_like", "set_values"])
def test_no_memory_for_the_base(name: str, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is disabled completely or not at all, and can be later."""
    case = Case(name)
    working, calls = getattr(disable, step), []

    def broken(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return working(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(disable, step, broken)
        with pytest.raises(torch.OutOfMemoryError), lorary.disabled(case.model):
            pass
    assert case.is_whole()
    with lorary.disabled(case.model):
        assert case.is_disabled()
    assert case.is_whole()


def test_a_layer_that_was_off_stays_off() -> None:
    case = Case("lora")
    layer = next(iter(adapted_layers(case.model).values()))
    layer.enabled = False
    expected = tiny.logits(case.model)
    first, second = lorary.disabled(case.model), lorary.disabled(case.model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert torch.equal(tiny.logits(case.model), expected)
    assert [layer.enabled for layer in adapted_layers(case.model).values()] == [False] + [True] * 7


@pytest.mark.parametrize("name", ["bitfit", "pissa"])
def test_what_is_written_to_the_base_in_a_block_is_dropped(name: str) -> None:
    """Neither the trained values nor those that detaching puts back may be touched by it."""
    case = Case(name)
    state: Any = state_of(case.model)
    copied = [f"{site}.weight" for site, t in state.replaced_weights.items() if not isinstance(t, torch.nn.Parameter)]
    names = [*state.full, *copied]
    assert len(names) > 1
    with lorary.disabled(case.model), torch.no_grad():
        for name in names:
            base_parameter(case.model, name).add_(1)
    assert case.is_whole()
    with lorary.disabled(case.model):
        assert case.is_disabled()
    lorary.detach(case.model)
    assert torch.equal(tiny.logits(case.model), case.base)


def test_an_adapter_can_be_trained_in_a_block() -> None:
    case = Case("bitfit")
    layer = next(iter(adapted_layers(case.model).values()))
    B = layer.params["B"]
    with lorary.disabled(case.model), torch.no_grad():
        expected = B.add_(1).clone()
    assert torch.equal(B, expected)


def test_a_graph_from_before_the_block_has_its_own_values() -> None:
    """As in preference optimisation: the policy's graph, the reference without the adapter, then one backward pass."""
    case = Case("bitfit")
    expected = torch.autograd.grad(loss(case.model), trained(case.model))
    policy = loss(case.model)
    with lorary.disabled(case.model):
        reference = tiny.logits(case.model)
    assert torch.equal(reference, case.base)
    found = torch.autograd.grad(policy, trained(case.model))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def loss(model: Any) -> Tensor:
    value: Tensor = model(tiny.ids()).logits.square().sum()
    return value


def trained(model: Any) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def test_a_model_that_moves_in_a_block() -> None:
    case = Case("bitfit")
    with lorary.disabled(case.model):
        case.model.to(torch.bfloat16)
    assert {p.dtype for name, p in case.model.named_parameters() if ".params." not in name} == {torch.bfloat16}
    torch.testing.assert_close(tiny.logits(case.model).float(), case.adapted, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_a_copy_in_a_block_would_never_leave_it(copied: Callable[[Any], object]) -> None:
    case = Case("lora")
    with lorary.disabled(case.model), pytest.raises(StateError, match="leave the `disabled` block first"):
        copied(case.model)
    copied(case.model)
