"""Two vectors around two frozen matrices: the plain formula, its gradients, and a product that layers share."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lorary
from lorary.analysis.memory.live_bytes import kept_for_backward
from lorary.kernels import low_rank
from lorary.kernels.low_rank import add_low_rank_reference
from lorary.kernels.shared_projection import LastProductCache, add_shared_projection
from lorary.layers.adapted import adapted_layers

MiB = 2**20
DROPOUTS = pytest.mark.parametrize("dropout", [0.0, 0.4])
# rows, more and fewer than what the rank makes worth another way: both ways of the kernel
ROWS = pytest.mark.parametrize("rows", [4, 40], ids=["few rows", "many rows"])


@pytest.fixture(autouse=True)
def _fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused nodes, however small the input; test_small_inputs.py has the plain operations."""
    monkeypatch.setattr(low_rank, "FUSED_FROM", 0)


def _tensors(*shape: int, out: int = 4, rank: int = 3, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """x [*shape], W [out, in], c [out], A [rank, in], B [out, rank], b [out], d [rank], all random."""
    generator = torch.Generator().manual_seed(7)
    width = shape[-1]
    sizes = {
        "x": shape,
        "W": (out, width),
        "c": (out,),
        "A": (rank, width),
        "B": (out, rank),
        "b": (out,),
        "d": (rank,),
    }
    return {n: torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype) for n, size in sizes.items()}


def _ours(t: dict[str, Tensor], dropout: float = 0.0, once: LastProductCache | None = None) -> Tensor:
    torch.manual_seed(11)
    y = F.linear(t["x"], t["W"], t["c"])
    return add_shared_projection(y, t["x"], t["A"], t["B"], t["b"], t["d"], 0.7, dropout, once)


def _plain(t: dict[str, Tensor], dropout: float = 0.0) -> Tensor:
    torch.manual_seed(11)
    y = F.linear(t["x"], t["W"], t["c"])
    return add_low_rank_reference(y, t["x"], t["A"], t["b"][:, None] * t["B"] * t["d"], 0.7, dropout)


def _gradients(t: dict[str, Tensor], wanted: tuple[str, ...], run: Any, dropout: float) -> dict[str, Tensor]:
    t = {name: tensor.detach().clone().requires_grad_(name in wanted) for name, tensor in t.items()}
    run(t, dropout).pow(2).sum().backward()
    assert all(tensor.grad is None for name, tensor in t.items() if name not in wanted)
    return {name: t[name].grad for name in wanted}  # type: ignore[misc]


# --- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), (6, 5), (40, 5), (2, 3, 5), (0, 5), (2, 0, 5)])
def test_it_is_the_layer_with_the_delta_added_to_its_weight(shape: tuple[int, ...]) -> None:
    t = _tensors(*shape)
    M = torch.diag(t["b"]) @ t["B"] @ torch.diag(t["d"]) @ t["A"]
    torch.testing.assert_close(_ours(t), F.linear(t["x"], t["W"] + 0.7 * M, t["c"]))


@ROWS
@DROPOUTS
def test_gradients_are_those_of_the_function(rows: int, dropout: float) -> None:
    t = _tensors(rows, 5)
    names = ("x", "W", "c", "b", "d")
    inputs = tuple(t[name].requires_grad_() for name in names)
    assert torch.autograd.gradcheck(lambda *values: _ours(t | dict(zip(names, values, strict=True)), dropout), inputs)


WANTED = [w for count in range(1, 5) for w in itertools.combinations(("x", "W", "b", "d"), count)]


@ROWS
@DROPOUTS
@pytest.mark.parametrize("wanted", WANTED, ids="".join)
def test_every_combination_of_wanted_gradients_agrees_with_the_reference(
    wanted: tuple[str, ...], dropout: float, rows: int
) -> None:
    t = _tensors(rows, 5)
    torch.testing.assert_close(_gradients(t, wanted, _ours, dropout), _gradients(t, wanted, _plain, dropout))


@pytest.mark.parametrize("wanted", ["A", "B"])
def test_matrices_that_train_after_all_get_their_gradients(wanted: str) -> None:
    t = _tensors(6, 5)
    wants = (wanted, "b", "d")
    torch.testing.assert_close(_gradients(t, wants, _ours, 0.0), _gradients(t, wants, _plain, 0.0))


@ROWS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 3e-2), (torch.float32, 1e-5)])
@DROPOUTS
def test_float32_masters_serve_every_dtype(dtype: torch.dtype, tolerance: float, dropout: float, rows: int) -> None:
    full = _tensors(rows, 64, out=16, rank=4, dtype=torch.float32)
    t = full | {name: full[name].to(dtype) for name in ("x", "W", "c")}
    y = _ours(t, dropout)
    assert y.dtype == dtype
    exact = {name: tensor.double() for name, tensor in t.items()}
    if not dropout:
        assert (y.double() - _plain(exact)).norm() < tolerance * _plain(exact).norm()
    wanted = ("x", "b", "d")
    ours, theirs = _gradients(t, wanted, _ours, dropout), _gradients(exact, wanted, _plain, dropout)
    for name in wanted:
        assert ours[name].dtype == t[name].dtype
        error = (ours[name].double() - theirs[name]).norm() / theirs[name].norm()
        assert error < tolerance, f"{name}: {error}"


def test_a_second_derivative_is_refused() -> None:
    t = _tensors(6, 5)
    t["b"].requires_grad_()
    (gradient,) = torch.autograd.grad(_ours(t).pow(2).sum(), t["b"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# --- whose memory is used, and what is kept ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["leaf", "of the input", "with gaps"])
@pytest.mark.parametrize("rows", [4, 40])
def test_an_output_that_is_not_ours_stays_untouched(kind: str, rows: int) -> None:
    t = _tensors(rows, 4)
    t["b"].requires_grad_()
    x = t["x"].clone()
    y = {
        "leaf": torch.zeros(rows, 4, dtype=torch.float64, requires_grad=True),
        "of the input": x.view(rows, 4),
        "with gaps": torch.zeros(4, rows, dtype=torch.float64).t(),
    }[kind]
    before = y.detach().clone()
    total = add_shared_projection(y, x, t["A"], t["B"], t["b"], t["d"], 0.7)
    assert torch.equal(y, before)
    torch.testing.assert_close(total, before + 0.7 * x @ (t["b"][:, None] * t["B"] * t["d"] @ t["A"]).T)


@DROPOUTS
def test_the_factor_between_the_vectors_is_not_kept(dropout: float) -> None:
    """A and B in 32 bits of rank 256, 1024 rows: no [out, r] that autograd would record, and not even the input."""
    t = _tensors(1024, 1024, out=1024, rank=256, dtype=torch.float32)
    t |= {name: t[name].bfloat16() for name in ("x", "W", "c")}
    for name in ("x", "b", "d"):
        t[name].requires_grad_()
    beyond = [v for n, v in t.items() if n != "x"]
    outputs: list[Tensor] = []
    kept = kept_for_backward(lambda: outputs.append(_ours(t, dropout)), beyond=beyond)
    assert kept <= 1024 * 256 * 2
    assert kept_for_backward(lambda: _plain(t, dropout), beyond=t.values()) > kept + 1024 * 256 * 4  # autograd's own


def test_inference_mode_and_its_tensors_work() -> None:
    t = _tensors(6, 5)
    expected, once = _ours(t), LastProductCache()
    with torch.inference_mode():
        torch.testing.assert_close(_ours(t, once=once), expected)
        y = F.linear(t["x"], t["W"], t["c"])
    with torch.no_grad():
        torch.testing.assert_close(
            add_shared_projection(y, t["x"], t["A"], t["B"], t["b"], t["d"], 0.7, 0.0, once), expected
        )


@ROWS
@DROPOUTS
def test_autocast_computes_in_the_dtype_of_the_base_output(dropout: float, rows: int) -> None:
    t = _tensors(rows, 32, dtype=torch.float32)
    for name in ("x", "b", "d"):
        t[name].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = _ours(t, dropout)
        y.float().pow(2).sum().backward()
    assert y.dtype == torch.bfloat16
    for name, gradient in _gradients(t, ("x", "b", "d"), _plain, dropout).items():
        assert t[name].grad.dtype == torch.float32  # type: ignore[union-attr]
        torch.testing.assert_close(t[name].grad, gradient, rtol=0.1, atol=0.02 * gradient.abs().max().item())


@ROWS
def test_it_compiles_whole_and_once(rows: int) -> None:
    t = _tensors(rows, 5, dtype=torch.float32)
    for name in ("x", "b", "d"):
        t[name].requires_grad_()
    torch.compiler.reset()

    def run(x: Tensor) -> Tensor:
        return add_shared_projection(
            F.linear(x, t["W"]), x, t["A"], t["B"], t["b"], t["d"], 0.7, 0.0, LastProductCache()
        )

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(t["x"]).sum().backward()
        torch.testing.assert_close(compiled(t["x"]), run(t["x"]))


# --- a product that layers share --------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Three projections of one input, and one of another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.o(self.q(x).tanh() + self.k(x).sigmoid() * self.v(x))
        return y


def attention(shared: bool = True) -> Attention:
    """With VeRA on it; `shared` or with every layer making its own product."""
    torch.manual_seed(0)
    model = Attention().double()
    plan = lorary.plan(model, lorary.method("vera", r=5))
    lorary.attach(model, plan, dtype=torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.5)
    if not shared:
        bank: Any = adapted_layers(model)["q"].shared
        bank.last_product.project = lambda x, A, dtype, *_: F.linear(x.reshape(-1, x.shape[-1]).to(dtype), A.to(dtype))
    return model


def grads(model: nn.Module, x: Tensor) -> list[Tensor]:
    found = [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
    assert all(g is not None for g in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("rows", [2, 60])
def test_sharing_changes_nothing(rows: int) -> None:
    results = []
    for shared in (True, False):
        model, x = attention(shared), torch.linspace(-1, 1, rows * 8).reshape(rows, 8).double().requires_grad_()
        for _ in range(3):  # with other values of the same tensor in between
            model(x).square().sum().backward()
            with torch.no_grad():
                x.add_(0.1)
        results.append(grads(model, x))
    torch.testing.assert_close(*results)


def test_the_product_is_made_once_for_layers_with_one_input() -> None:
    operations = []
    for shared in (True, False):
        model, x = attention(shared), torch.randn(4, 8).double().requires_grad_() * 1  # an activation, not a leaf
        with FlopCounterMode(display=False) as counter:
            model(x)
        operations.append(counter.get_total_flops())
    assert operations[1] - operations[0] == 2 * (2 * 4 * 8 * 5)  # of k and v


def test_each_output_can_be_followed_back_by_itself() -> None:
    """Two losses of one input, one backward pass after the other, as without sharing."""
    results = []
    for shared in (True, False):
        model, x = attention(shared), torch.linspace(-1, 1, 16).reshape(2, 8).double().requires_grad_()
        q, k = model.q(x), model.k(x)
        q.square().sum().backward()
        k.square().sum().backward()
        results.append(
            [x.grad, *(p.grad for layer in (model.q, model.k) for p in layer.parameters() if p.requires_grad)]
        )
    torch.testing.assert_close(*results)


def test_a_graph_that_is_kept_can_be_followed_twice() -> None:
    model, x = attention(), torch.randn(2, 8).double().requires_grad_()
    loss = model(x).square().sum()
    loss.backward(retain_graph=True)
    first = [g.clone() for g in grads(model, x)]
    loss.backward()
    torch.testing.assert_close(grads(model, x), [2 * g for g in first])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_activation_checkpointing(reentrant: bool, whole: bool) -> None:
    results = []
    for again in (False, True):
        model, x = attention(), torch.linspace(-1, 1, 16).reshape(2, 8).double().requires_grad_()

        def inner(x: Tensor, model: Any = model) -> Tensor:
            y: Tensor = model(x)
            return y

        def each(x: Tensor, model: Any = model) -> Tensor:
            q, k, v = (checkpoint(layer, x, use_reentrant=reentrant) for layer in (model.q, model.k, model.v))
            y: Tensor = model.o(q.tanh() + k.sigmoid() * v)  # type: ignore[union-attr]
            return y

        y = (checkpoint(inner, x, use_reentrant=reentrant) if whole else each(x)) if again else inner(x)
        y.square().sum().backward()  # type: ignore[union-attr]
        results.append(grads(model, x))
    torch.testing.assert_close(*results)


def test_other_projections_are_noticed() -> None:
    """Another adapter's A in the same memory, while the product with the old one is still alive."""
    model, x = attention(), torch.randn(2, 8).double().requires_grad_()
    kept = model.q(x)
    bank: Any = adapted_layers(model)["q"].shared
    bank.load({"A": -2 * bank.tensors["A"]})
    expected = F.linear(x, adapted_layers(model)["k"].merged()[0])
    torch.testing.assert_close(model.k(x), expected)
    assert kept.requires_grad


def test_another_input_of_the_same_values_or_the_same_memory_is_noticed() -> None:
    model, x = attention(), torch.randn(2, 8).double()
    kept = model.q(x)
    W = adapted_layers(model)["k"].merged()[0]
    torch.testing.assert_close(model.k(x * 3), F.linear(x * 3, W))
    torch.testing.assert_close(model.k(x.view(4, 4).view(2, 8)), F.linear(x, W))
    x.mul_(3)
    torch.testing.assert_close(model.k(x), F.linear(x, W))
    assert kept.requires_grad


def test_without_gradients_and_then_with() -> None:
    model, x = attention(), torch.randn(2, 8).double().requires_grad_()
    with torch.no_grad():
        model.q(x)
    model.k(x).square().sum().backward()
    assert x.grad is not None
    alone, y = attention(False), x.detach().clone().requires_grad_()
    alone.k(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_copies_start_empty() -> None:
    model, x = attention(), torch.randn(2, 8).double()
    kept = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x), kept)


def test_nothing_is_held_once_nobody_needs_it() -> None:
    model, x = attention(), torch.randn(2, 8).double().requires_grad_() * 1
    model(x).sum().backward()
    bank: Any = adapted_layers(model)["q"].shared
    assert bank.last_product._last is not None
    assert bank.last_product._last[1]() is None
