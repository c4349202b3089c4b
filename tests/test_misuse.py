"""What is said when the library is called in the wrong way, and that the model is as it was afterwards."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import lorary
from lorary.adapters.adapter import Adapter
from lorary.errors import ConfigError, FileError, MethodError, PlanError
from lorary.model.state import state_of

LORA = lorary.method("lora", r=2, alpha=4)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def adapter() -> Adapter:
    model = net()
    return Adapter.of(lorary.attach(model, lorary.plan(model, LORA)))


def outline(model: nn.Module) -> list[Any]:
    parameters = [(name, p.requires_grad, p.detach().clone().tolist()) for name, p in model.named_parameters()]
    return [[type(m) for m in model.modules()], parameters, state_of(model)]


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        ((None, LORA), {}, ["model: is a NoneType, not a torch.nn.Module"]),
        (("gpt2", "lora"), {}, ["model: is a str, not", "method: is a str, not a Method", "lorary.method("]),
        ((LORA, net()), {}, ["model: is a Method, not", "method: is a Sequential, not a Method"]),
        ((net(), LORA, 3), {}, ["targets: 3 is not the name of a layer"]),
        ((net(), LORA), {"exclude": 3}, ["exclude: 3 is not the name of a layer"]),
        ((net(), LORA), {"ranks": 4, "alphas": [4]}, ["ranks: is 4, not a mapping", "alphas: is [4], not a mapping"]),
    ],
)
def test_plan(arguments: Any, options: Any, said: list[str]) -> None:
    with pytest.raises(PlanError) as refusal:
        lorary.plan(*arguments, **options)
    assert all(words in str(refusal.value) for words in said), str(refusal.value)


def test_plan_of_base_parameters_needs_no_targets() -> None:
    plan = lorary.plan(net(), lorary.method("bitfit"), targets=None)  # type: ignore[arg-type]
    assert [f.name for f in plan.full] == ["0.bias", "2.bias"]


@pytest.mark.parametrize("name", [["lora"], {"lora": 1}, 3, None])
def test_method(name: Any) -> None:
    with pytest.raises(MethodError, match="is not a method that lorary knows"):
        lorary.method(name)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn, "bf16"])
def test_attach_names_everything_and_changes_nothing(dtype: Any) -> None:
    model = net()
    before = outline(model)
    with pytest.raises(PlanError) as refusal:
        lorary.attach(model, LORA, dtype=dtype)  # type: ignore[arg-type]
    assert "plan: is a Method, not a Plan" in str(refusal.value)
    assert "is not a trainable dtype" in str(refusal.value)
    assert outline(model) == before


def test_memory_that_runs_out_leaves_the_model_alone() -> None:
    model = net()
    before = outline(model)
    plan = lorary.plan(model, LORA, ranks={"2": 10**15})  # the first layer still fits
    with pytest.raises(RuntimeError):
        lorary.attach(model, plan)
    assert outline(model) == before


def test_a_start_that_fails_leaves_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    before = outline(model)
    plan = lorary.plan(model, LORA)
    initialise = lorary.Adapted.initialise

    def second_fails(layer: lorary.Adapted, seed: int) -> None:
        if layer.site.name == "2":
            raise KeyboardInterrupt
        initialise(layer, seed)

    monkeypatch.setattr(lorary.Adapted, "initialise", second_fails)
    with pytest.raises(KeyboardInterrupt):
        lorary.attach(model, plan)
    assert outline(model) == before


@pytest.mark.parametrize("what", ["folder", ["folder"], 3, {"a": 1}])
def test_switch_to_what_is_no_adapter(what: Any) -> None:
    model = net()
    lorary.switch(model, adapter())
    before = state_of(model)
    with pytest.raises(FileError, match=r"is not an adapter\n.*lorary.load_adapter"):
        lorary.switch(model, what)
    assert state_of(model) is before


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda t: t.int(), "expected a dense one of floating-point numbers"),
        (lambda t: t.to(torch.complex64), "expected a dense one of floating-point numbers"),
        (lambda t: t.to(torch.float8_e4m3fn), "expected a dense one of floating-point numbers, of 16 bits or more"),
        (lambda t: t.tolist(), "is a list, not a tensor"),
        (lambda t: t.to_sparse(), "expected a dense one of floating-point numbers"),
        (lambda t: t.to("meta"), "has no values: it is on the meta device"),
    ],
)
def test_switch_to_tensors_that_cannot_be_used(spoil: Any, said: str) -> None:
    good = adapter()
    bad = {site: {role: spoil(t) for role, t in roles.items()} for site, roles in good.tensors.items()}
    model = net()
    lorary.switch(model, good)
    before = state_of(model)
    with pytest.raises(FileError) as refusal:
        lorary.switch(model, dataclasses.replace(good, tensors=bad))
    assert str(refusal.value).count(said) == 4
    assert state_of(model) is before


def test_a_meta_model_has_nothing_to_save(tmp_path: Any) -> None:
    with torch.device("meta"):
        model = net()
    lorary.attach(model, lorary.plan(model, LORA))
    with pytest.raises(FileError, match="its model is on the meta device"):
        lorary.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", ["x", None, True, float("nan")])
def test_rates_that_are_no_numbers(number: Any) -> None:
    model = net()
    lorary.attach(model, lorary.plan(model, LORA))
    with pytest.raises(ConfigError) as refusal:
        lorary.param_groups(model, number, number)
    assert [problem.where for problem in refusal.value.problems] == ["lr", "weight_decay"]


def test_a_model_that_reads_the_weights_of_its_own_layers() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.raises(PlanError, match="reads its weight"):
        lorary.plan(model, LORA, targets="linear1")


@pytest.mark.parametrize(("method", "word"), [("pissa", "SVDInit"), ("olora", "QRInit")])
def test_a_start_in_a_damaged_weight_names_every_layer_and_changes_nothing(method: str, word: str) -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[0, :2] = float("nan")
        model[2].weight[1, 3] = float("inf")
    before, values = [type(m) for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(PlanError) as refusal:
        lorary.attach(model, lorary.plan(model, lorary.method(method, r=2)))
    assert str(refusal.value) == (
        "cannot attach:\n"
        f"  - 0: 2 of 24 numbers of its weight are NaN or infinite; {word} starts at its directions\n"
        "      hint: repair the base, or exclude the layer\n"
        f"  - 2: 1 of 18 numbers of its weight are NaN or infinite; {word} starts at its directions\n"
        "      hint: repair the base, or exclude the layer"
    )
    assert [type(m) for m in model.modules()] == before
    assert state_of(model) is None
    assert all(torch.equal(t, values[k]) or t.isnan().any() for k, t in model.state_dict().items())


def test_a_start_in_a_weight_of_zeros() -> None:
    model = net()
    torch.nn.init.zeros_(model[2].weight)
    before = outline(model)
    with pytest.raises(PlanError) as refusal:
        lorary.attach(model, lorary.plan(model, lorary.method("pissa", r=2)))
    assert str(refusal.value) == (
        "cannot attach:\n  - 2: its weight is zero, and so are the factors that SVDInit takes from it: nothing could "
        "be learned\n      hint: exclude it, or use another init"
    )
    assert outline(model) == before
    lorary.attach(model, lorary.plan(model, lorary.method("olora", r=2)))  # its B is not zero: A can learn


def test_a_base_that_cannot_give_up_its_start() -> None:
    model = net().half()
    before = outline(model)
    with pytest.raises(PlanError) as refusal:
        lorary.attach(model, lorary.plan(model, lorary.method("olora", r=2, alpha=1e9)))
    assert str(refusal.value) == (
        "cannot attach:\n  - 0: the residual of its weight, W - s B A with s = 5e+08, is not finite in torch.float16\n"
        "      hint: use a smaller alpha, or check the base"
    )
    assert outline(model) == before


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "vera", "glora"])
def test_weights_from_inference_mode_are_refused_outside_of_it(method: str) -> None:
    with torch.inference_mode():
        model = net()
    before, said = outline(model), lorary.method(method, r=2)
    with pytest.raises(PlanError) as refusal:
        lorary.attach(model, lorary.plan(model, said))
    assert str(refusal.value) == (
        "the plan does not fit this model:\n  - model: its weights were created in torch.inference_mode() and cannot "
        "be trained or changed outside of it\n      hint: create the model outside inference mode"
    )
    assert outline(model) == before
    with torch.inference_mode():  # inside, they can be used
        lorary.detach(lorary.attach(model, lorary.plan(model, said)))
        assert outline(model) == before


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "vera", "multilora", "glora"])
def test_what_is_attached_in_inference_mode_can_train(method: str) -> None:
    model, x = net(), torch.ones(2, 4)
    with torch.inference_mode():
        before = model(x)
        lorary.attach(model, lorary.plan(model, lorary.method(method, r=2)))
        assert torch.allclose(model(x), before, atol=1e-5)
    (model(x) - 1).square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


def tied_by_memory() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight.data = model[0].weight.data  # two parameters, one memory
    return model


def lent_out() -> nn.Sequential:
    model = net()
    model.register_buffer("alias", model[2].weight.data)
    return model


def one_number() -> nn.Sequential:
    model = net()
    model[2].weight = nn.Parameter(torch.tensor([[0.5]]).expand(3, 6))
    return model


@pytest.mark.parametrize("make", [tied_by_memory, lent_out, one_number])
@pytest.mark.parametrize("targets", ["all-linear", "2"])
@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_a_start_in_memory_that_others_use(make: Any, targets: str, method: str) -> None:
    model, x = make(), torch.randn(5, 4)
    before, y = outline(model), model(x)
    lorary.attach(model, lorary.plan(model, lorary.method(method, r=2), targets))
    assert torch.allclose(model(x), y, atol=1e-4)
    with lorary.disabled(model):
        assert torch.equal(model(x), y)
    lorary.merge(model, keep=True)
    assert torch.allclose(model(x), y, atol=1e-4)
    lorary.detach(lorary.unmerge(model))
    assert outline(model) == before


@pytest.mark.parametrize("method", ["lora", "pissa", "dora", "vera", "glora"])
def test_an_empty_batch_of_images(method: str) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    lorary.attach(model, lorary.plan(model, lorary.method(method, r=2), "conv"))
    y = model(torch.ones(0, 4, 6, 6))
    assert y.shape == (0, 8, 4, 4)
    y.sum().backward()
