"""`lorary.cached`: what depends on weights alone is computed once inside the block, and in every pass outside of it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.errors import StateError
from lorary.layers.adapted import adapted_layers
from lorary.methods import dora
from tests import tiny

X = torch.linspace(-1, 1, 24).reshape(3, 8)
WORK: list[None] = []  # one entry for every time that norms are computed


@pytest.fixture(autouse=True)
def _watched(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., Tensor] = dora.row_norms

    def counted(*arguments: Any) -> Tensor:
        WORK.append(None)
        return real(*arguments)

    WORK.clear()
    monkeypatch.setattr(dora, "row_norms", counted)


def work(run: Callable[[], object]) -> int:
    """How often norms are computed meanwhile."""
    WORK.clear()
    run()
    return len(WORK)


def made(*names: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6))
    lorary.attach(model, lorary.plan(model, lorary.method(*(names or ("dora",)), r=2, **options), "0"))
    return tiny.shaken(model)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_once_inside_the_block_and_every_time_outside(mode: Any) -> None:
    model = made()
    with mode():
        expected = model(X)
        assert work(lambda: [model(X) for _ in range(3)]) == 3
        with lorary.cached(model) as same:
            assert same is model
            assert work(lambda: [model(X) for _ in range(3)]) == 1
            assert torch.equal(model(X), expected)
        assert work(lambda: model(X)) == 1


def test_blocks_may_be_nested() -> None:
    model = made()
    with lorary.cached(model):
        model(X)
        with lorary.cached(model):
            assert work(lambda: model(X)) == 0
        assert work(lambda: model(X)) == 0
    assert work(lambda: model(X)) == 1


def test_training_after_inference_mode_inside_the_block() -> None:
    model = made()
    layer = adapted_layers(model)["0"]
    model(X).square().sum().backward()
    expected = {role: p.grad for role, p in layer.params.items()}
    model.zero_grad()
    with lorary.cached(model):
        with torch.inference_mode():
            model(X)
        model(X).square().sum().backward()
    for role, p in layer.params.items():
        assert torch.equal(p.grad, expected[role])


def test_the_exact_norm_keeps_its_graph() -> None:
    model = made(exact=True)
    layer = adapted_layers(model)["0"]
    model(X).square().sum().backward()
    expected = layer.params["A"].grad.clone()
    model.zero_grad()
    with lorary.cached(model):
        for _ in range(2):
            model.zero_grad()
            model(X).square().sum().backward()
            assert torch.equal(layer.params["A"].grad, expected)


@pytest.mark.parametrize("name", ["weight", "A", "B"])
def test_a_weight_that_changes_inside_is_told_at_the_end(name: str) -> None:
    model = made()
    layer = adapted_layers(model)["0"]
    tensor = layer.weight if name == "weight" else layer.params[name]

    def inside() -> None:
        with lorary.cached(model):
            model(X)
            tensor.data.mul_(1.5)

    with pytest.raises(StateError, match=r"(?s)stale outputs in `lorary.cached`:.*- 0: its weights changed"):
        inside()
    W, b = layer.merged()
    torch.testing.assert_close(model(X), nn.functional.linear(X, W, b))


def test_the_magnitude_may_change() -> None:
    model = made()
    with lorary.cached(model):
        model(X)
        adapted_layers(model)["0"].params["m"].data.mul_(2)
        W, b = adapted_layers(model)["0"].merged()
        torch.testing.assert_close(model(X), nn.functional.linear(X, W, b))


def test_an_error_inside_is_the_one_that_is_raised() -> None:
    model = made()

    def inside() -> None:
        with lorary.cached(model):
            model(X)
            adapted_layers(model)["0"].weight.data.mul_(1.5)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        inside()
    assert work(lambda: model(X)) == 1


def test_a_plain_model_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    with lorary.cached(model):
        model(X)


def test_a_compiled_layer_computes_its_own() -> None:
    model = made().eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad(), lorary.cached(model):
        torch.testing.assert_close(compiled(X), model(X))


def test_copies_do_not_take_the_block_with_them() -> None:
    model = made()
    with lorary.cached(model):
        model(X)
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in twins:
        adapted_layers(twin)["0"].weight.data.mul_(1.5)
        W, b = adapted_layers(twin)["0"].merged()
        torch.testing.assert_close(twin(X), nn.functional.linear(X, W, b))


def test_a_language_model_generates_the_same() -> None:
    model = tiny.seeded("LlamaForCausalLM").eval()
    lorary.attach(model, lorary.plan(model, lorary.method("dora", r=2)))
    tiny.shaken(model)
    ids = torch.arange(5)[None]
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    layers = len(adapted_layers(model))
    with lorary.cached(model):
        assert work(lambda: model.generate(ids, max_new_tokens=6, do_sample=False)) == layers
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)


def test_a_model_that_has_diverged_is_not_called_stale() -> None:
    model = made()
    adapted_layers(model)["0"].params["A"].data.fill_(float("nan"))
    with lorary.cached(model):
        assert model(X).isnan().all()


def test_a_model_that_moves_inside_is_told_at_the_end() -> None:
    model = made()

    def inside() -> None:
        with lorary.cached(model):
            model(X)
            model.to("meta")

    with pytest.raises(StateError, match="its weights changed inside the block"):
        inside()
