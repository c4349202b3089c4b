"""What is worked out once: recomputed after every change of what it came from, and after nothing else."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.adapters.adapter import Adapter
from lorary.layers.adapted import Adapted, adapted_layers
from lorary.layers.cache import TensorCache
from lorary.methods import dora
from tests import tiny

WORK: list[str] = []  # one entry for every time that norms are computed


@pytest.fixture(autouse=True)
def _watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the real computations of norms, of W alone and of the whole."""
    WORK.clear()
    for name in ("square_norms", "row_norms"):
        real: Callable[..., Tensor] = getattr(dora, name)

        def counted(*arguments: Any, name: str = name, real: Callable[..., Tensor] = real) -> Tensor:
            WORK.append(name)
            return real(*arguments)

        monkeypatch.setattr(dora, name, counted)


def work(run: Callable[[], object]) -> dict[str, int]:
    """How often each norm is computed meanwhile."""
    WORK.clear()
    run()
    return {name: WORK.count(name) for name in set(WORK)}


NOTHING: dict[str, int] = {}
WHOLE = {"row_norms": 1}
BOTH = {"row_norms": 1, "square_norms": 1}


def made(*names: str, seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 6))
    lorary.attach(model, lorary.plan(model, lorary.method(*(names or ("dora",)), r=2, **options), "0"))
    return tiny.shaken(model)


def the(model: nn.Module) -> Adapted:
    return adapted_layers(model)["0"]


X = torch.linspace(-1, 1, 24).reshape(3, 8)


def truth(model: nn.Module) -> Tensor:
    """What the layer must answer, from its tensors as they are now."""
    W, b = the(model).merged()
    return nn.functional.linear(X.to(W.dtype), W, b)


def correct(model: nn.Module) -> None:
    torch.testing.assert_close(model(X.to(the(model).weight.dtype)).to(torch.float32), truth(model).float())


# --- when it is computed ----------------------------------------------------------------------------------------------


def test_once_for_every_optimizer_step_and_not_for_every_micro_batch() -> None:
    model = made()
    optimizer = torch.optim.AdamW(lorary.param_groups(model, lr=0.1))
    model(X)
    for _ in range(3):

        def micro_batches() -> None:
            for _ in range(4):
                model(X).square().sum().backward()

        assert work(micro_batches) == NOTHING
        optimizer.step()
        optimizer.zero_grad()
        found = work(lambda: model(X))
        assert found["row_norms"] == 1
        correct(model)


def test_evaluation_and_training_in_turns_take_no_more() -> None:
    model = made()
    model(X)

    def turns() -> None:
        model.eval()
        with torch.no_grad():
            model(X)
        with torch.inference_mode():
            model(X)
        model.train()
        model(X).sum().backward()

    assert work(turns) == NOTHING


def test_under_dropout_too() -> None:
    model = made(dropout=0.5).train()
    model(X)
    assert work(lambda: [model(X).sum().backward() for _ in range(3)]) == NOTHING


def test_what_the_weight_gives_is_computed_once_if_factors_alone_change() -> None:
    model = made()
    model(X)
    with torch.no_grad():
        the(model).params["B"].add_(1.0)
    assert work(lambda: model(X)) == WHOLE
    correct(model)


def test_the_magnitude_is_no_part_of_it() -> None:
    model = made()
    model(X)
    with torch.no_grad():
        the(model).params["m"].mul_(3.0)
    assert work(lambda: model(X)) == NOTHING
    correct(model)


def test_an_exact_norm_is_computed_for_every_backward_pass() -> None:
    """It is a part of the graph."""
    model = made(exact=True)
    model(X)
    assert work(lambda: [model(X).sum().backward() for _ in range(3)]) == {"row_norms": 3}


def test_in_inference_mode_first_and_then_in_training() -> None:
    model = made()
    the(model).cached.clear()
    with torch.inference_mode():
        first = model(X).clone()
    y = model(X)
    assert torch.equal(y, first)
    y.square().sum().backward()
    assert the(model).params["A"].grad is not None


def test_under_no_grad_first_and_then_in_training() -> None:
    model = made()
    the(model).cached.clear()
    with torch.no_grad():
        model(X)
    model(X).square().sum().backward()
    expected = {role: p.grad.clone() for role, p in the(model).params.items() if p.grad is not None}
    model.zero_grad()
    the(model).cached.clear()
    model(X).square().sum().backward()
    assert all(torch.equal(expected[role], p.grad) for role, p in the(model).params.items())  # type: ignore[arg-type]


# --- every way in which a tensor changes ------------------------------------------------------------------------------


class WritesData(torch.optim.Optimizer):
    """An optimizer of the kind that goes past autograd's versions: fused kernels, old code."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.sub_(p.grad.data)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.5),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.5),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.5, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.5, fused=True),
    "data": WritesData,
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("names", [("dora",), ("vera", "dora"), ("dora", "pissa"), ("dora", "melora")])
def test_an_optimizers_step(make: Any, names: tuple[str, ...]) -> None:
    model = made(*names)
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    model(X).square().sum().backward()
    before = model(X)
    optimizer.step()
    assert not torch.allclose(model(X), before, rtol=1e-3)
    correct(model)


def a_copy_of_values(model: nn.Module) -> None:
    with torch.no_grad():
        for p in the(model).params.values():
            p.copy_(torch.randn_like(p))


def other_values_by_load(model: nn.Module) -> None:
    the(model).load({role: torch.randn_like(p) for role, p in the(model).params.items()})


def a_state_dict(model: nn.Module) -> None:
    model.load_state_dict({name: torch.randn_like(t) for name, t in model.state_dict().items()})


def an_assigned_state_dict(model: nn.Module) -> None:
    model.load_state_dict({name: torch.randn_like(t) for name, t in model.state_dict().items()}, assign=True)


def another_base(model: nn.Module) -> None:
    with torch.no_grad():
        the(model).weight.mul_(-3.0).add_(1.0)


def a_base_of_its_own(model: nn.Module) -> None:
    the(model).weight = nn.Parameter(torch.randn(6, 8), requires_grad=False)  # type: ignore[assignment]


def other_parameters(model: nn.Module) -> None:
    layer = the(model)
    for role in list(layer.params):
        layer.params[role] = nn.Parameter(torch.randn_like(layer.params[role]))


CHANGES = [
    a_copy_of_values,
    other_values_by_load,
    a_state_dict,
    an_assigned_state_dict,
    another_base,
    a_base_of_its_own,
    other_parameters,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_change_is_noticed(change: Any, mode: Any) -> None:
    for seed in range(3):
        model = made(seed=seed)
        with mode():
            before = model(X).clone()
        change(model)
        with mode():
            after = model(X).clone()
        assert not torch.allclose(after, before)
        torch.testing.assert_close(after, truth(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_precision_and_back(dtype: torch.dtype) -> None:
    model = made()
    model(X)
    model.to(dtype)
    y = model(X.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), truth(model).double(), rtol=0.02, atol=0.02)
    model.to(torch.float32)
    correct(model)


@pytest.mark.parametrize("times", range(5))
def test_a_precision_that_rounds_and_back_without_a_look_in_between(times: int) -> None:
    """The tensors may come back to the very memory that they left."""
    model = made(seed=times)
    model(X)
    model.to(torch.bfloat16).to(torch.float32)
    correct(model)


def test_other_tensors_at_the_address_of_those_that_are_gone() -> None:
    memo = TensorCache()
    for value in range(20):
        t = torch.full((4,), float(value))
        assert memo("sum", [t], t.sum) == 4 * value
        del t  # the next one comes to lie where it was


def test_a_restored_checkpoint_and_a_switch(tmp_path: Path) -> None:
    model = tiny.seeded("LlamaForCausalLM")
    lorary.attach(model, lorary.plan(model, lorary.method("dora", r=2)))
    values = {}
    for seed in (1, 2):
        tiny.shaken(model, seed=seed)
        lorary.save(model, tmp_path / str(seed))
        values[seed] = (Adapter.of(model), tiny.logits(model))
    fresh = tiny.seeded("LlamaForCausalLM")
    for seed in (1, 2, 1, 2):
        lorary.switch(fresh, values[seed][0])
        assert torch.equal(tiny.logits(fresh), values[seed][1])
    lorary.switch(fresh, None)
    lorary.load(fresh, tmp_path / "1")
    assert torch.equal(tiny.logits(fresh), values[1][1])


def test_merged_and_unmerged() -> None:
    model = made()
    before = model(X)
    lorary.merge(model, keep=True)
    torch.testing.assert_close(model(X), before)
    lorary.unmerge(model)
    assert torch.equal(model(X), before)
    a_copy_of_values(model)
    correct(model)


def test_disabled_and_back() -> None:
    model = made("dora", "pissa")
    before = model(X)
    with lorary.disabled(model):
        model(X)
    assert torch.equal(model(X), before)
    a_copy_of_values(model)
    correct(model)


# --- whose it is ------------------------------------------------------------------------------------------------------


def test_a_copy_has_its_own() -> None:
    model = made()
    expected = model(X)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X), expected)
    a_copy_of_values(twin)
    correct(twin)
    assert not torch.allclose(twin(X), expected)
    assert torch.equal(model(X), expected)
    assert the(twin).cached is not the(model).cached


def test_a_copy_that_outlives_its_original() -> None:
    twins = []
    for seed in range(8):  # memory that one leaves is the next one's
        model = made(seed=seed)
        model(X)
        twins.append(copy.deepcopy(model))
        del model
        a_copy_of_values(twins[-1])
    for twin in twins:
        correct(twin)


def test_pickled_and_read_again() -> None:
    model = made()
    expected = model(X)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(X), expected)
    a_copy_of_values(again)
    correct(again)


def test_two_models_do_not_mix() -> None:
    one, other = made(seed=1), made(seed=2)
    for model in (one, other, one, other):
        correct(model)
    optimizer = torch.optim.SGD(lorary.param_groups(one, lr=0.5))
    one(X).square().sum().backward()
    optimizer.step()
    for model in (other, one, other):
        correct(model)


def test_a_layer_used_twice_in_a_pass_computes_once() -> None:
    model = nn.Sequential(layer := nn.Linear(8, 8), layer)
    lorary.attach(model, lorary.plan(model, lorary.method("dora", r=2), "0"))
    tiny.shaken(model)
    the(model).cached.clear()
    assert work(lambda: model(X)) == BOTH


def test_checkpointed_layers_compute_once() -> None:
    model = tiny.seeded("LlamaForCausalLM")
    lorary.attach(model, lorary.plan(model, lorary.method("dora", r=2), "q_proj"))
    tiny.shaken(model).train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model(input_ids=tiny.ids())
    loss = model(input_ids=tiny.ids(), labels=tiny.ids(), use_cache=False).loss
    assert work(loss.backward) == NOTHING


def test_nothing_is_remembered_of_what_is_compiled() -> None:
    model = made()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(X), model(X))
    a_copy_of_values(model)
    torch.testing.assert_close(compiled(X), truth(model))


# --- by itself --------------------------------------------------------------------------------------------------------


def test_a_name_has_one_result() -> None:
    memo, t = TensorCache(), torch.ones(2)
    assert torch.equal(memo("a", [t], lambda: t + 1), torch.full((2,), 2.0))
    assert torch.equal(memo("a", [t], lambda: t + 7), torch.full((2,), 2.0))
    assert torch.equal(memo("b", [t], lambda: t + 7), torch.full((2,), 8.0))
    t.add_(1)
    assert torch.equal(memo("a", [t], lambda: t + 7), torch.full((2,), 9.0))
    memo.clear()
    assert torch.equal(memo("a", [t], lambda: t + 1), torch.full((2,), 3.0))


def test_a_result_is_a_constant() -> None:
    t = torch.ones(2, requires_grad=True)
    assert not TensorCache()("a", [t], lambda: t * 2).requires_grad


def test_tensors_of_inference_mode_are_never_trusted() -> None:
    memo = TensorCache()
    with torch.inference_mode():
        t = torch.ones(2)
        assert torch.equal(memo("a", [t], lambda: t + 1), torch.full((2,), 2.0))
        t.add_(1)  # they have no versions
        assert torch.equal(memo("a", [t], lambda: t + 1), torch.full((2,), 3.0))
