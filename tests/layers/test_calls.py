"""However an adapted layer is called: with hooks, by keyword, by a handle, traced, exported, under a transform."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorary
from lorary.kernels import low_rank
from lorary.layers.adapted import Adapted
from tests import tiny

METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {},
    "vera": {},
    "melora": {"n": 2},
    "multilora": {"n": 2},
    "adalora": {"target": 1},
    "glora": {},
    "pissa": {},
    "o-lora": {},
    "delta-lora": {"start": 0},
}
EACH = pytest.mark.parametrize("name", METHODS)
SIZES = pytest.mark.parametrize("fused_from", [0, 2**19], ids=["fused", "plain"])


def made(name: str = "lora", layer: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(layer or nn.Linear(8, 6), nn.Tanh())
    lorary.attach(model, lorary.plan(model, lorary.method(name, r=2, **METHODS[name]), "0"))
    return tiny.shaken(model).eval()


def x() -> Tensor:
    return torch.linspace(-1, 1, 24).reshape(3, 8)


# --- hooks ------------------------------------------------------------------------------------------------------------


def doubled(module: Any, args: Any, y: Tensor) -> Tensor:
    return 2 * y


def shifted(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] + 1,)


@EACH
@pytest.mark.parametrize("sort", ["output", "input"])
def test_hooks_act_on_the_adapted_layer_and_stay_after_merge_unmerge_and_detach(name: str, sort: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 6)
    handle = layer.register_forward_hook(doubled) if sort == "output" else layer.register_forward_pre_hook(shifted)
    plain = nn.Sequential(layer, nn.Tanh())
    before = plain(x())
    model = made(name, layer)
    y = model(x())
    W, b = model[0].merged()
    given = x() + 1 if sort == "input" else x()
    expected = nn.functional.linear(given, W, b) * (2 if sort == "output" else 1)
    torch.testing.assert_close(y, expected.tanh())
    lorary.merge(model, keep=True)
    torch.testing.assert_close(model(x()), y)
    lorary.unmerge(model)
    assert torch.equal(model(x()), y)
    lorary.detach(model)
    torch.testing.assert_close(model(x()), before)
    handle.remove()
    assert not torch.allclose(model(x()), before)


def test_hooks_registered_on_the_adapted_layer_stay_too() -> None:
    model = made()
    handle = model[0].register_forward_hook(doubled)
    y = model(x())
    lorary.merge(model, keep=True)
    torch.testing.assert_close(model(x()), y)
    handle.remove()
    assert not torch.allclose(model(x()), y)
    lorary.unmerge(model)
    y = model(x())
    model[0].register_forward_hook(doubled)
    lorary.detach(model)
    assert torch.equal(model[0](x()), 2 * nn.functional.linear(x(), model[0].weight, model[0].bias))
    assert not torch.equal(model(x()), y)


def test_hooks_of_a_layer_that_is_quantised_move_as_well() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)
    layer.register_forward_hook(doubled)
    model = nn.Sequential(layer)
    lorary.attach(model, lorary.plan(model, lorary.method("qlora", r=2), "0"))
    tiny.shaken(model)
    W, b = model[0].merged()
    given = torch.randn(3, 64)
    y = model(given)
    torch.testing.assert_close(y, 2 * nn.functional.linear(given, W, b), rtol=1e-4, atol=1e-4)
    lorary.merge(model)
    torch.testing.assert_close(model(given), y, rtol=1e-4, atol=1e-4)


@EACH
@SIZES
def test_a_tensor_that_a_hook_returned_is_never_written(
    name: str, fused_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_rank, "FUSED_FROM", fused_from)
    model, kept = made(name), torch.ones(3, 6)
    model[0].base.register_forward_hook(lambda *_: kept)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            model(x())
        assert torch.equal(kept, torch.ones(3, 6))


def test_full_backward_hooks_see_the_adapted_layers_gradient() -> None:
    torch.manual_seed(0)
    layer, seen = nn.Linear(8, 6), []
    layer.register_full_backward_hook(lambda module, gx, gy: seen.append((type(module), gy[0].clone())))
    model = made("lora", layer)
    model[0](x().requires_grad_()).sum().backward()
    assert seen[0][0] is Adapted
    assert torch.equal(seen[0][1], torch.ones(3, 6))


# --- handles and keywords ---------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("keep", [False, True])
def test_a_handle_held_across_a_merge_computes_the_merged_layer(name: str, keep: bool) -> None:
    model = made(name)
    handle = model[0]
    y = handle(x())
    lorary.merge(model, keep=keep)
    assert model[0] is not handle
    torch.testing.assert_close(handle(x()), y)
    assert torch.equal(handle(x()), model[0](x()))
    if keep:
        lorary.unmerge(model)
        assert torch.equal(handle(x()), y)


def test_layers_are_called_by_keyword() -> None:
    model = made()
    assert torch.equal(model[0](input=x()), model[0](x()))
    transposed = made("lora", Conv1D(6, 8))
    assert torch.equal(transposed[0](x=x()), transposed[0](x()))
    table = made("lora", nn.Embedding(9, 6))
    ids = torch.arange(4)
    assert torch.equal(table[0](input=ids), table[0](ids))


# --- tracing, transforms, export --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@EACH
@SIZES
@pytest.mark.parametrize("grad", [False, True])
def test_a_traced_layer_is_the_same_function(
    name: str, fused_from: int, grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_rank, "FUSED_FROM", fused_from)
    model = made(name)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, x())
        for other in (x(), torch.randn(5, 8)):
            torch.testing.assert_close(traced(other), model(other))


@EACH
@SIZES
def test_gradients_by_torch_func(name: str, fused_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "FUSED_FROM", fused_from)
    model = made(name)
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(values: dict[str, Tensor], given: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(model, values, (given,))
        return y.square().sum()

    found = torch.func.grad(loss)(trained, x())
    model(x()).square().sum().backward()
    for n, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(found[n], p.grad, msg=n)
    rows = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(trained, x()[:, None])
    for n in trained:
        torch.testing.assert_close(rows[n].sum(0), found[n], msg=n)


@EACH
@SIZES
def test_vmap_over_rows(name: str, fused_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "FUSED_FROM", fused_from)
    model = made(name)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(model)(x()), model(x()))
    torch.testing.assert_close(torch.func.vmap(model)(x()), model(x()))


@EACH
def test_an_exported_layer_is_the_same_function(name: str) -> None:
    model = made(name)
    rows = torch.export.Dim("rows", min=2, max=64)
    exported = torch.export.export(model, (x(),), dynamic_shapes=({0: rows},)).module()
    for other in (x(), torch.randn(5, 8)):
        torch.testing.assert_close(exported(other), model(other))


# --- replicas ---------------------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("cached", [False, True])
def test_replicas_of_data_parallel(name: str, cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What DataParallel makes for every GPU; here the broadcast is a copy on the CPU."""
    module = sys.modules["torch.nn.parallel.replicate"]

    def broadcast(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
        return [[t.detach() if detach else t.clone() for t in tensors] for _ in devices]

    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", broadcast)
    monkeypatch.setattr(module, "_get_device_index", lambda *_: 0)
    model = made(name)
    expected = model(x())
    with lorary.cached(model) if cached else contextlib.nullcontext():
        model(x())
        replicas = nn.parallel.replicate(model, [0, 0])
        assert all(replica[0].kept is None for replica in replicas)
        for replica in replicas:
            torch.testing.assert_close(replica(x()), expected)
        replicas[1](x()).square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    model(x()).square().sum().backward()
    for p, gradient in zip((p for p in model.parameters() if p.requires_grad), gradients, strict=True):
        torch.testing.assert_close(gradient, p.grad)
