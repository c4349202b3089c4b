"""O-LoRA: a LoRA for each task in turn, whose A is kept away from those of the tasks before."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.adapters import export_peft
from lorary.adapters.adapter import Adapter
from lorary.errors import MethodError, PlanError, StateError
from lorary.layers.adapted import adapted_layers
from lorary.methods.o_lora import OrthogonalToPast, SequentialLoRA, basis

from .. import tiny
from .layers import EACH, attached, exactly, signature

R = 2


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 10, bias=False), nn.Tanh(), nn.Linear(10, 4)).to(
        dtype
    )


def data(task: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(task)
    return torch.randn(20, 12, generator=generator).to(dtype), torch.randn(20, 4, generator=generator).to(dtype)


def started(after: Any = (), seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    model = net(dtype)
    method = lorary.method("o-lora", **{"r": R, "alpha": 6.0} | options)
    return lorary.attach(model, lorary.plan(model, method, after=after), seed=seed, dtype=dtype)


def train(model: nn.Module, task: int, steps: int = 6, make: Any = torch.optim.AdamW) -> Any:
    """Some steps on a task's data; returns the optimizer."""
    optimizer = make(lorary.param_groups(model, lr=0.05))
    rules = lorary.rules(model, steps, optimizer)
    x, y = data(task, next(model.parameters()).dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        ((model(x) - y).square().mean() + rules.penalty()).backward()
        rules.after_backward()
        optimizer.step()
        rules.after_step()
    return optimizer


def tasks(n: int, **options: Any) -> list[Adapter]:
    """The adapters of n tasks, each trained after the ones before."""
    done: list[Adapter] = []
    for task in range(n):
        model = started(done, seed=task, **options)
        train(model, task)
        done.append(Adapter.of(model))
    return done


def layers(model: nn.Module) -> dict[str, Any]:
    return adapted_layers(model)


# --- the first task ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hard", [False, True])
def test_the_first_task_is_lora_bit_for_bit(hard: bool) -> None:
    mine = started(hard=hard)
    lora = net()
    lorary.attach(lora, lorary.plan(lora, lorary.method("lora", r=R, alpha=6.0)), dtype=torch.float64)
    assert lorary.rules(mine, 5, torch.optim.SGD(mine.parameters(), 0.1)).penalty() == 0.0
    train(mine, 0), train(lora, 0)
    for (name, p), (other, q) in zip(mine.named_parameters(), lora.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(p, q)


# --- a later task -----------------------------------------------------------------------------------------------------


@EACH
def test_a_later_task_starts_at_the_sum_of_the_earlier_ones(make: Any, x: Any) -> None:
    """W + s B_1 A_1, whatever scale the first task had; and then learns as LoRA does."""
    first = attached(make(), "lora", r=3, alpha=12.0)
    with torch.no_grad():
        for p in first.params.values():
            p.copy_(torch.randn_like(p).float())  # adapters are values in 32 bits
    model = nn.Sequential(first.base)
    past = lorary.Adapter(
        first.method, (lorary.AdaptedSite(first.site, first.method),), {"0": dict(first.params.items())}
    )
    plan = lorary.plan(model, lorary.method("o-lora", r=R, alpha=6.0), "0", after=[past])
    lorary.attach(model, plan, dtype=torch.float64)
    layer, inputs = adapted_layers(model)["0"], x()
    assert layer.scale == 3.0
    W = layer.kind.matrix(layer.base).detach() + 4.0 * (first.params["B"] @ first.params["A"]).detach()
    torch.testing.assert_close(
        layer(inputs), layer.kind.run(layer.base, inputs, W, layer.bias), rtol=1e-6, atol=1e-6
    )  # B_past is B 4 / 3, rounded once
    one, other = ("A", "B") if layer.site.kind == "embedding" else ("B", "A")
    assert signature(layer, inputs) == {one: "some", other: "zero", "A_past": "none", "B_past": "none"}


def test_the_past_stays_as_it_is_bit_for_bit() -> None:
    (first,) = tasks(1)
    for hard in (False, True):
        model = started([first], seed=1, hard=hard)
        before = {
            name: (layer.params["A_past"].clone(), layer.params["B_past"].clone())
            for name, layer in layers(model).items()
        }
        train(model, 1)
        for name, layer in layers(model).items():
            assert torch.equal(layer.params["A_past"], before[name][0])
            assert torch.equal(layer.params["B_past"], before[name][1])
            assert torch.equal(layer.params["A_past"], first.tensors[name]["A"].float().double())
            assert not layer.params["A_past"].requires_grad
        grouped = {id(p) for group in lorary.param_groups(model, 0.1) for p in group["params"]}
        assert grouped == {id(layer.params[role]) for layer in layers(model).values() for role in "AB"}


def test_dropout_never_drops_the_past() -> None:
    (first,) = tasks(1)
    model = started([first], seed=1, dropout=0.9).train()
    x, _ = data(1, torch.float64)
    assert torch.equal(model(x), model(x))  # B is zero: nothing else is random
    with torch.no_grad():
        for layer in layers(model).values():
            layer.params["B"].normal_()
    assert not torch.equal(model(x), model(x))


# --- the penalty ------------------------------------------------------------------------------------------------------


def second() -> nn.Module:
    model = started(tasks(1), seed=1)
    with torch.no_grad():
        for layer in layers(model).values():
            layer.params["A"].normal_()
            layer.params["B"].normal_()
    return model


def products(model: nn.Module) -> list[float]:
    """The entries of A_i A_t^T of all layers."""
    return [
        float(sum(a * b for a, b in zip(past, now, strict=True)))
        for layer in layers(model).values()
        for past in layer.params["A_past"].tolist()
        for now in layer.params["A"].tolist()
    ]


def test_the_penalty_in_both_forms() -> None:
    model = second()
    every, entries = list(layers(model).values()), products(model)
    sums = {"authors": sum(abs(e) for e in entries), "paper": sum(e * e for e in entries)}
    assert len(entries) == 3 * R * R
    for form, total in sums.items():
        one, mean = OrthogonalToPast(0.7, form, mean=False), OrthogonalToPast(0.7, form)
        assert one.penalty(every, {}).item() == pytest.approx(0.7 * total, rel=1e-12)
        assert mean.penalty(every, {}).item() == pytest.approx(0.7 * total / len(entries), rel=1e-12)
        assert OrthogonalToPast(0.7, form, hard=True).penalty(every, {}) == 0.0
        assert OrthogonalToPast(0.0, form).penalty(every, {}) == 0.0


def test_the_penalty_on_the_norms() -> None:
    model = second()
    every = list(layers(model).values())
    norms = sum(float((layer.params[role].detach() ** 2).sum()) ** 0.5 for layer in every for role in "AB")
    assert OrthogonalToPast(0.0, norms=0.2).penalty(every, {}).item() == pytest.approx(0.2 * norms, rel=1e-12)
    (rule,) = lorary.method("o-lora", norms=0.2, weight=0.0).rules
    assert rule.penalty(every, {}).item() == pytest.approx(0.2 * norms, rel=1e-12)


def test_only_a_has_a_gradient_from_the_penalty() -> None:
    model = second()
    lorary.rules(model, 5).penalty().backward()
    for layer in layers(model).values():
        assert layer.params["A"].grad.abs().min() > 0
        assert [layer.params[role].grad for role in ("B", "A_past", "B_past")] == [None] * 3


@pytest.mark.parametrize("form", ["authors", "paper"])
def test_the_gradient_is_zero_where_the_rows_are_orthogonal(form: str) -> None:
    model = second()
    every = list(layers(model).values())
    with torch.no_grad():
        for layer in every:
            layer.params["A_past"].zero_().fill_diagonal_(2.0)
            layer.params["A"][:, :R] = 0
    penalty = OrthogonalToPast(0.7, form).penalty(every, {})
    penalty.backward()
    assert penalty.item() == 0
    assert all(not layer.params["A"].grad.any() for layer in every)


# --- hard -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.AdamW,
        lambda groups: torch.optim.SGD(groups, momentum=0.9),
        lambda groups: torch.optim.AdamW(groups, weight_decay=0.5),
    ],
    ids=["Adam", "SGD with momentum", "AdamW with decay"],
)
def test_hard_leaves_what_earlier_tasks_see_as_it_is(make: Any) -> None:
    """For every x in the row space of an earlier A the layer's output is the same to 1e-12, after several steps."""
    model = started(tasks(2, hard=True), seed=2, hard=True)
    before = {name: layer.merged()[0] for name, layer in layers(model).items()}
    optimizer = train(model, 2, steps=9, make=make)
    for name, layer in layers(model).items():
        x = layer.params["A_past"].T @ torch.randn(2 * R, 30, dtype=torch.float64)
        change = layer.merged()[0] - before[name]
        assert (change @ x).abs().max() < 1e-12
        assert (change @ torch.randn(change.shape[1], 30, dtype=torch.float64)).abs().max() > 1e-2
        state = optimizer.state[layer.params["A"]]
        momentum = state["exp_avg"] if "exp_avg" in state else state["momentum_buffer"]
        assert (momentum @ layer.params["A_past"].T).abs().max() < 1e-12
        assert momentum.abs().max() > 1e-6


def test_hard_takes_steps_of_the_usual_size_where_an_input_is_always_zero() -> None:
    """Adam divides by the size of the gradients, which is nothing there: it must have no momentum there, either."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(8, 4))
    first = lorary.attach(copy.deepcopy(base), lorary.plan(base, lorary.method("lora", r=2)))
    plan = lorary.plan(base, lorary.method("o-lora", r=2, hard=True), after=[lorary.Adapter.of(first)])
    model = lorary.attach(base, plan)
    optimizer = torch.optim.AdamW(lorary.param_groups(model, lr=0.01))
    rules, A = lorary.rules(model, 20, optimizer), model[0].params["A"]
    start, x = A.detach().clone(), torch.randn(16, 8) * torch.tensor([0.0, 1e-6, 1, 1, 1, 1, 1, 1])
    for _ in range(20):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        rules.after_backward()
        optimizer.step()
        rules.after_step()
    assert 0.01 < (A - start).abs().max() < 1
    assert (A @ model[0].params["A_past"].T).abs().max() < 1e-6


def test_the_soft_penalty_only_keeps_away() -> None:
    """It leaves some interference, less than no penalty does."""
    past = tasks(1)
    left = {}
    for weight in (0.0, 5.0):
        model = started(past, seed=1, weight=weight)
        train(model, 1, steps=40)
        left[weight] = sum(abs(e) for e in products(model))
    assert 1e-6 < left[5.0] < left[0.0] / 3


def test_orthogonal_b_is_neither_needed_nor_enough() -> None:
    torch.manual_seed(1)
    A_1, B_1, A_t = torch.randn(3, 12).double(), torch.randn(9, 3).double(), torch.randn(3, 12).double()
    inside = A_1.T @ torch.randn(3, 20).double()
    B_t = torch.randn(9, 3).double()
    B_t = B_t - B_1 @ torch.linalg.pinv(B_1) @ B_t
    assert (B_1.T @ B_t).abs().max() < 1e-12
    assert (B_t @ A_t @ inside).abs().max() > 1
    Q = basis(A_1, A_1.new_zeros(0, 12))
    away = A_t - A_t @ Q.T @ Q
    assert (torch.randn(9, 3).double() @ away @ inside).abs().max() < 1e-12


def test_the_basis_grows_by_what_is_new() -> None:
    rows = torch.randn(3, 12).double()
    Q = basis(rows, rows.new_zeros(0, 12))
    assert Q.shape == (3, 12)
    exactly(Q @ Q.T, torch.eye(3).double())
    exactly(rows @ Q.T @ Q, rows)
    assert basis(torch.randn(4, 3).double() @ rows, Q).shape == (3, 12), "nothing new"
    more = basis(torch.cat([rows[:1], torch.randn(2, 12).double()]), Q)
    assert more.shape == (5, 12)
    assert torch.equal(more[:3], Q)
    exactly(more @ more.T, torch.eye(5).double())


def test_hard_starts_in_the_complement_and_needs_the_optimizer() -> None:
    model = started(tasks(1), seed=1, hard=True)
    x, _ = data(1, torch.float64)
    y = model(x)
    with pytest.raises(StateError) as error:
        lorary.rules(model, 5)
    assert str(error.value) == (
        "the method's rules need the optimizer:\n"
        "  - OrthogonalToPast: changes the optimizer's state\n"
        "      hint: lorary.rules(model, steps, optimizer)"
    )
    lorary.rules(model, 5, torch.optim.SGD(lorary.param_groups(model, 0.1)))
    assert max(map(abs, products(model))) < 1e-12
    assert torch.equal(model(x), y), "B is zero still"


def test_hard_works_on_masters_of_16_bits() -> None:
    """The basis is found and kept in 32."""
    model = started(tasks(1, dtype=torch.bfloat16), seed=1, hard=True, dtype=torch.bfloat16)
    train(model, 1)
    for layer in layers(model).values():
        A, past = layer.params["A"].detach().float(), layer.params["A_past"].detach().float()
        angles = nn.functional.normalize(A) @ nn.functional.normalize(past).T
        assert angles.abs().max() < torch.finfo(torch.bfloat16).eps


def test_a_frozen_a_goes_with_hard_alone() -> None:
    with pytest.raises(MethodError) as error:
        lorary.method("o-lora", "lora-fa")
    (problem,) = error.value.problems
    assert problem.what == "the penalty is on A, which is frozen; hard=True lets A start in the complement instead"
    model = net()
    method = lorary.method("o-lora", "lora-fa", r=R, hard=True)
    lorary.attach(model, lorary.plan(model, method, after=tasks(1)), seed=1, dtype=torch.float64)
    train(model, 1)
    assert max(map(abs, products(model))) < 1e-12


# --- the past of a plan -----------------------------------------------------------------------------------------------


def test_a_task_that_two_adapters_hold_counts_once() -> None:
    """The second task's adapter holds the first one, too."""
    first, second = tasks(2)
    x, _ = data(0, torch.float64)
    expected = started([second])(x)
    for after in ([first, second], [second, first], [second, second], [second]):
        model = started(after)
        assert {layer.method.delta.past for layer in layers(model).values()} == {(R, R)}
        torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
    assert {layer.method.delta.past for layer in layers(started([first])).values()} == {(R,)}


def test_there_is_room_for_so_many_tasks_only() -> None:
    """Of 9 inputs four tasks of rank 2 take 8: a fifth cannot be orthogonal to them."""
    done = tasks(4, hard=True)
    with pytest.raises(PlanError) as error:
        started(done)
    assert str(error.value) == (
        "invalid plan:\n"
        "  - 2: of its 9 input directions 4 earlier tasks have taken 8: "
        "there is no room for 2 more that are orthogonal to them"
    )
    model = net()
    smaller = lorary.plan(model, lorary.method("o-lora", r=R), after=done, ranks={"2": 1})
    assert [p.r for p in smaller.sites] == [2, 1, 2]


def test_what_cannot_be_a_past_is_refused() -> None:
    (first,) = tasks(1)
    plain = lorary.method("lora", r=R)
    with pytest.raises(PlanError, match="LowRank cannot hold earlier tasks"):
        lorary.plan(net(), plain, after=[first])
    with pytest.raises(PlanError, match="it adapts 2, which this plan does not: its update there would be lost"):
        lorary.plan(net(), lorary.method("o-lora"), "0", after=[first])
    with pytest.raises(PlanError, match=r"after\[0\]: 'here' is not an adapter"):
        lorary.plan(net(), lorary.method("o-lora"), after=["here"])
    other = net()
    lorary.attach(other, lorary.plan(other, lorary.method("dora", r=R)))
    with pytest.raises(PlanError, match=r"after\[1\]"):
        lorary.plan(net(), lorary.method("o-lora"), after=[first, Adapter.of(other)])
    elsewhere = nn.Sequential(nn.Linear(12, 9))
    with pytest.raises(PlanError, match="other layers or sizes"):
        lorary.plan(elsewhere, lorary.method("o-lora"), after=[first])


def test_any_adapter_whose_update_adds_up_can_be_the_past() -> None:
    """PiSSA's is of twice its rank on the unmodified base."""
    pissa = net()
    lorary.attach(pissa, lorary.plan(pissa, lorary.method("pissa", r=1)), dtype=torch.float64)
    train(pissa, 0)
    x, _ = data(0, torch.float64)
    model = started([Adapter.of(pissa)])
    assert {layer.method.delta.past for layer in layers(model).values()} == {(2,)}
    torch.testing.assert_close(model(x), pissa(x), rtol=1e-5, atol=1e-5)


# --- what is left -----------------------------------------------------------------------------------------------------


def test_every_form_of_three_tasks_is_the_same_function(tmp_path: Path) -> None:
    single = torch.float32
    done: list[Adapter] = []
    for task in range(3):
        model = started(done, seed=task, dtype=single)
        train(model, task)
        done.append(Adapter.of(model))
    x, _ = data(9, single)
    y = model(x).detach()
    adapter = done[-1]
    assert {form.A.shape[0] for form in adapter.low_rank().values()} == {3 * R}
    assert {p.delta for p in adapter.sites} == {SequentialLoRA(R, (R, R))}
    lorary.save(model, tmp_path / "own")
    assert torch.equal(lorary.load(net(single), tmp_path / "own")(x), y)
    export_peft(adapter, tmp_path / "peft")
    assert (lorary.load(net(single), tmp_path / "peft")(x) - y).abs().max() < 2e-6
    assert (lorary.merge(model)(x) - y).abs().max() < 2e-6


def test_an_interrupted_run_is_the_same_run(tmp_path: Path) -> None:
    single = torch.float32
    (first,) = tasks(1, dtype=single)
    x, y = data(1, single)
    for hard in (False, True):
        ends = []
        for stop in (None, 3):
            model = started([first], seed=1, dtype=single, hard=hard)
            optimizer = torch.optim.AdamW(lorary.param_groups(model, 0.05))
            rules = lorary.rules(model, 6, optimizer)
            for step in range(6):
                if step == stop:
                    lorary.save(model, tmp_path / "a")
                    state, moments = rules.state_dict(), optimizer.state_dict()
                    model = lorary.load(net(single), tmp_path / "a", trainable=True)
                    optimizer = torch.optim.AdamW(lorary.param_groups(model, 0.05))
                    optimizer.load_state_dict(moments)
                    rules = lorary.rules(model, 6, optimizer, state)
                optimizer.zero_grad()
                ((model(x) - y).square().mean() + rules.penalty()).backward()
                rules.after_backward()
                optimizer.step()
                rules.after_step()
            ends.append(model(x))
        assert torch.equal(*ends)


def test_a_task_starts_elsewhere_than_the_ones_before_whatever_the_seed() -> None:
    method = lorary.method("o-lora", r=2)
    base, past = tiny.llama(), list[lorary.Adapter]()
    starts = []
    for _ in range(3):
        model = copy.deepcopy(base)
        lorary.attach(model, lorary.plan(model, method, ["q_proj"], after=past), seed=7)
        layer = next(iter(adapted_layers(model).values()))
        starts.append(layer.params["A"].detach().clone())
        with torch.no_grad():
            layer.params["B"].normal_()
        past = [lorary.Adapter.of(model)]
    assert not any(torch.equal(starts[i], starts[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
