"""The paged AdamW: PyTorch's result bit for bit, with the moments elsewhere; what is there when; and how it says so."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lorary
from lorary.errors import ConfigError, TrainingError
from lorary.paged import PagedAdamW, PagingWarning
from lorary.shrinking import shrink
from tests import tiny

SHAPES = ((30, 5), (7,), (40, 3), (3,), (2, 3, 4, 4), (1, 100))
PAGE = {"page": True, "threshold": 50}


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(1)
    made = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    made[4] = nn.Parameter(made[4].detach().to(memory_format=torch.channels_last))
    return made


def grouped(ps: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": ps[:3]}, {"params": ps[3:], "lr": 0.3, "weight_decay": 0.0, "betas": (0.5, 0.9)}]


def grads(ps: Sequence[nn.Parameter], step: int, missing: int | None = None) -> None:
    torch.manual_seed(100 + step)
    for i, p in enumerate(ps):
        g = torch.randn(p.shape).to(p.dtype)
        p.grad = None if i == missing else g


def equal(one: torch.optim.Optimizer, two: torch.optim.Optimizer) -> bool:
    """Parameters and states, bit for bit."""
    a, b = ([p for g in o.param_groups for p in g["params"]] for o in (one, two))
    return all(
        torch.equal(p, q)
        and one.state[p].keys() == two.state[q].keys()
        and all(torch.equal(one.state[p][k], two.state[q][k]) for k in one.state[p])
        for p, q in zip(a, b, strict=True)
    )


SETTINGS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "decay": {"weight_decay": 0.1, "lr": 0.02},
    "no decay": {"weight_decay": 0.0, "betas": (0.8, 0.95), "eps": 1e-6},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "a rate that is a tensor": {"lr": torch.tensor(0.01)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_the_result_is_that_of_pytorch_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    if dtype.is_complex and name == "fused":
        pytest.skip("PyTorch's fused AdamW takes no complex numbers")
    a, b = parameters(dtype), parameters(dtype)
    plain = torch.optim.AdamW(grouped(a), **SETTINGS[name])
    paged = PagedAdamW(grouped(b), **SETTINGS[name], **PAGE)
    for step in range(12):
        for ps in (a, b):
            grads(ps, step, missing=step % 5 if step > 6 else None)
        plain.step()
        paged.step()
    assert equal(plain, paged)
    assert not all(torch.equal(p, q) for p, q in zip(a, parameters(dtype), strict=True))


def test_parameters_that_join_later_and_rates_that_change() -> None:
    a, b = parameters(), parameters()
    made: list[torch.optim.Optimizer] = []
    for ps, kind, words in ((a, torch.optim.AdamW, {}), (b, PagedAdamW, PAGE)):
        optimizer = kind(ps[:2], lr=0.1, **words)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 4)
        for step in range(6):
            if step == 3:
                optimizer.add_param_group({"params": ps[2:], "lr": 0.01})
            grads(ps, step)
            optimizer.step()
            if step < 3:
                schedule.step()
        made.append(optimizer)
    assert equal(*made)


def test_a_closure_computes_with_gradients_and_its_loss_comes_back() -> None:
    p = nn.Parameter(torch.ones(64))
    optimizer = PagedAdamW([p], lr=0.5, **PAGE)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 64.0
    assert optimizer.step(closure).item() < 64.0


def test_hooks_run_once_for_a_step() -> None:
    ps = parameters()
    optimizer = PagedAdamW(ps, **PAGE)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    grads(ps, 0)
    optimizer.step()
    assert calls == ["before", "after"]


# --- where the moments are ------------------------------------------------------------------------------------------


class Alive(TorchDispatchMode):
    """The most bytes that were alive at once in tensors made within: none of those that were there before."""

    def __init__(self, before: Sequence[Tensor]) -> None:
        super().__init__()
        self.before = {t.data_ptr() for t in before}
        self.made: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not out.is_meta and out.untyped_storage().data_ptr() not in self.before:
            self.made[out.untyped_storage().data_ptr()] = out.untyped_storage()
            self.most = max(self.most, sum(storage.nbytes() for storage in self.made.values()))
        return out


def peak(count: int, page: bool) -> int:
    """Bytes that a step makes, in copies of the 64 KiB of a parameter."""
    ps = [nn.Parameter(torch.randn(2**14)) for _ in range(count)]
    words: dict[str, Any] = {"page": True, "threshold": 1} if page else {}
    optimizer = PagedAdamW(ps, **words) if page else torch.optim.AdamW(ps)
    for step in range(2):
        grads(ps, step)
        states = [v for entry in optimizer.state.values() for v in entry.values()]
        with Alive([*ps, *[p.grad for p in ps if p.grad is not None], *states]) as alive:
            optimizer.step()
    return round(alive.most / 2**16)


def test_two_loads_are_on_the_device_at_most_however_many_there_are() -> None:
    arithmetic = peak(1, page=False)  # what PyTorch's formula holds for a moment
    assert peak(1, page=True) == arithmetic + 2
    assert peak(9, page=True) == peak(3, page=True) == arithmetic + 4  # two moments of two parameters


def test_moments_of_large_tensors_are_at_home_before_and_after_a_step() -> None:
    ps = parameters()
    optimizer = PagedAdamW(ps, **PAGE)
    assert [optimizer.pages(p) for p in ps] == [True, False, True, False, True, True]
    homes: list[int] = []
    for step in range(3):
        grads(ps, step)
        optimizer.step()
        homes.append(optimizer.state[ps[0]]["exp_avg"].data_ptr())
    assert len(set(homes)) == 1
    assert {v.device.type for entry in optimizer.state.values() for v in entry.values()} == {"cpu"}
    assert not PagedAdamW(ps).pages(ps[0])
    large = nn.Parameter(torch.empty(400, 300, device="meta"))
    assert PagedAdamW([large]).pages(large)
    assert not PagedAdamW([large], page=False).pages(large)
    assert not PagedAdamW([large], threshold=120_001).pages(large)


def test_a_state_goes_on_bit_for_bit_from_either_class_to_either() -> None:
    for first, second in ((PagedAdamW, PagedAdamW), (torch.optim.AdamW, PagedAdamW), (PagedAdamW, torch.optim.AdamW)):
        words = [PAGE if kind is PagedAdamW else {} for kind in (first, second)]
        a = parameters()
        one = first(grouped(a), **words[0])
        for step in range(3):
            grads(a, step, missing=2)
            one.step()
        b = [nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in a]
        two = second(grouped(b), lr=9.0, **words[1])
        saved = copy.deepcopy(one.state_dict())
        two.load_state_dict(saved)
        assert two.param_groups[1]["lr"] == 0.3
        if isinstance(two, PagedAdamW):  # its own buffers, not those it was given
            given = {entry["exp_avg"].data_ptr() for entry in saved["state"].values()}
            assert not given & {two.state[p]["exp_avg"].data_ptr() for p in b if two.pages(p) and p in two.state}
        for step in range(3, 6):
            for ps, optimizer in ((a, one), (b, two)):
                grads(ps, step)
                optimizer.step()
        assert equal(one, two)


def test_a_state_of_other_groups_is_refused_as_by_pytorch() -> None:
    saved = PagedAdamW(grouped(parameters()), **PAGE).state_dict()
    with pytest.raises(ValueError, match="different number of parameter groups"):
        PagedAdamW(parameters(), **PAGE).load_state_dict(saved)
    with pytest.raises(ValueError, match="doesn't match the size"):
        PagedAdamW(grouped(parameters()[:5]), **PAGE).load_state_dict(saved)


def test_it_can_be_copied_and_pickled() -> None:
    a = parameters()
    optimizer = PagedAdamW(grouped(a), **PAGE)
    grads(a, 0)
    optimizer.step()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert (other.page, other.threshold) == (True, 50)
        ps = [p for group in other.param_groups for p in group["params"]]
        grads(ps, 1)
        other.step()
        b = parameters()
        plain = torch.optim.AdamW(grouped(b))
        for step in range(2):
            grads(b, step)
            plain.step()
        assert equal(plain, other)


def test_directions_are_cut_out_of_paged_moments() -> None:
    """AdaLoRA's shrinking: smaller tensors and moments, some of them below the threshold from then on."""
    results = []
    for kind, words in ((torch.optim.AdamW, {}), (PagedAdamW, {"page": True, "threshold": 40})):
        model = tiny.trained(
            tiny.seeded("LlamaForCausalLM"), lorary.method("adalora", r=4, target=2), targets=["q_proj"]
        )
        optimizer = kind(lorary.groups(model, lr=1e-2), **words)
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        grads(trained, 0)
        optimizer.step()
        layers = lorary.adapted.adapted(model)
        assert shrink(model, {name: torch.tensor([True, False, True, False]) for name in layers}, optimizer)
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        grads(trained, 1)
        optimizer.step()
        results.append(optimizer)
        if kind is PagedAdamW:
            assert {optimizer.pages(p) for p in trained} == {False}
    assert equal(*results)


# --- what it says ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ({}, "the parameters are on the CPU"),
        ({"page": False}, "page is False"),
        ({"page": True}, "no tensor that trains has 100,000 numbers"),
    ],
)
def test_it_says_once_that_nothing_is_paged(words: dict[str, Any], why: str) -> None:
    ps = parameters()
    optimizer = PagedAdamW(ps, **words)
    grads(ps, 0)
    with pytest.warns(PagingWarning) as told:
        optimizer.step()
    assert [str(w.message) for w in told] == [f"nothing is paged, because {why}: this is torch.optim.AdamW"]
    optimizer.step()  # a second warning would be an error


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        PagedAdamW(parameters(), threshold=-1)
    assert str(caught.value) == (
        "these are no optimizer settings:\n  - threshold: -1 is not a whole number of at least 0"
    )
    with pytest.raises(ValueError, match="Invalid learning rate"):
        PagedAdamW(parameters(), lr=-1.0)
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(TrainingError) as stopped:
        PagedAdamW(table.parameters(), **PAGE).step()
    assert str(stopped.value) == (
        "AdamW does not take these gradients:\n"
        "  - a parameter of (5, 3): its gradient is sparse\n"
        "      hint: use torch.optim.SparseAdam"
    )
