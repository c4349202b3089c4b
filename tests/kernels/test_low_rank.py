"""The low-rank product and its plain reference obey the same laws, and the product keeps only what it must."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lorary.analysis.memory.live_bytes import LiveBytes, kept_for_backward
from lorary.kernels import low_rank
from lorary.kernels.low_rank import add_low_rank, add_low_rank_reference

MiB = 2**20
BOTH = pytest.mark.parametrize("add", [add_low_rank, add_low_rank_reference])
DROPOUTS = pytest.mark.parametrize("dropout", [0.0, 0.4])


@pytest.fixture(autouse=True)
def _fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused nodes, however small the input; test_small_inputs.py has the plain operations."""
    monkeypatch.setattr(low_rank, "FUSED_FROM", 0)


def _tensors(*shape: int, out: int = 4, rank: int = 3, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """x [*shape], W [out, in], b [out], A [rank, in], B [out, rank], all random, none wanting a gradient."""
    generator = torch.Generator().manual_seed(7)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    width = shape[-1]
    sizes = {"x": shape, "W": (out, width), "b": (out,), "A": (rank, width), "B": (out, rank)}
    return {name: normal(*size) for name, size in sizes.items()}


def _adapted(t: dict[str, Tensor], add: Callable[..., Tensor], dropout: float = 0.0, bias: bool = True) -> Tensor:
    torch.manual_seed(11)
    return add(F.linear(t["x"], t["W"], t["b"] if bias else None), t["x"], t["A"], t["B"], 0.7, dropout)


def _gradients(t: dict[str, Tensor], wanted: tuple[str, ...], add: Any, dropout: float) -> dict[str, Tensor]:
    t = {name: tensor.detach().clone().requires_grad_(name in wanted) for name, tensor in t.items()}
    _adapted(t, add, dropout).pow(2).sum().backward()
    assert all(tensor.grad is None for name, tensor in t.items() if name not in wanted)
    return {name: t[name].grad for name in wanted}  # type: ignore[misc]


# --- what is computed -------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("wanted", ["x", "A", "B", "AB", "xAB"])
def test_what_stands_still_is_added_and_gets_no_gradient(add: Any, wanted: str) -> None:
    """Not even where it would take one; the input's gradient goes through it all the same."""
    t = _tensors(2, 3, 5)
    past = torch.randn(2, 5).double().requires_grad_(), torch.randn(4, 2).double().requires_grad_()
    found = []
    for product in (add, lambda y, x, A, B, s, frozen: y + s * (x @ A.T @ B.T + x @ frozen[0].T @ frozen[1].T)):
        here = {name: tensor.clone().requires_grad_(name in wanted) for name, tensor in t.items()}
        y = product(F.linear(here["x"], here["W"]), here["x"], here["A"], here["B"], 0.7, frozen=past)
        if product is add:
            y.pow(2).sum().backward()
            assert past[0].grad is past[1].grad is None
        else:
            y.pow(2).sum().backward(inputs=[here[name] for name in wanted])
        found.append([y, *(here[name].grad for name in wanted)])
    torch.testing.assert_close(*found)


@BOTH
@pytest.mark.parametrize("shape", [(5,), (6, 5), (2, 3, 5), (2, 3, 2, 5), (0, 5), (2, 0, 5)])
def test_it_is_the_layer_with_the_delta_added_to_its_weight(add: Any, shape: tuple[int, ...]) -> None:
    t = _tensors(*shape)
    expected = F.linear(t["x"], t["W"] + 0.7 * t["B"] @ t["A"], t["b"])
    torch.testing.assert_close(_adapted(t, add), expected)


@BOTH
@DROPOUTS
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_the_function(add: Any, dropout: float, bias: bool) -> None:
    t = _tensors(2, 3, 5)
    names = ("x", "A", "B", "W", "b")
    inputs = tuple(t[name].requires_grad_() for name in names)
    assert torch.autograd.gradcheck(
        lambda *values: _adapted(dict(zip(names, values, strict=True)), add, dropout, bias), inputs
    )


WANTED = [wanted for count in range(1, 5) for wanted in itertools.combinations(("x", "W", "A", "B"), count)]


@DROPOUTS
@pytest.mark.parametrize("wanted", WANTED, ids="".join)
def test_every_combination_of_wanted_gradients_agrees_with_the_reference(
    wanted: tuple[str, ...], dropout: float
) -> None:
    t = _tensors(6, 5)
    ours = _gradients(t, wanted, add_low_rank, dropout)
    theirs = _gradients(t, wanted, add_low_rank_reference, dropout)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)])
@DROPOUTS
def test_an_empty_batch_has_zero_gradients(shape: tuple[int, ...], dropout: float) -> None:
    for name, gradient in _gradients(_tensors(*shape), ("x", "A", "B"), add_low_rank, dropout).items():
        assert gradient.shape == _tensors(*shape)[name].shape
        assert not gradient.any()


@DROPOUTS
def test_inputs_need_not_be_contiguous(dropout: float) -> None:
    t = _tensors(5, 3, 2)
    odd = {**t, "x": t["x"].transpose(0, 2), "W": _tensors(6, 5)["W"], "A": _tensors(6, 5)["A"].t().contiguous().t()}
    plain = {name: tensor.contiguous() for name, tensor in odd.items()}
    assert not odd["x"].is_contiguous()
    assert not odd["A"].is_contiguous()
    torch.testing.assert_close(_adapted(odd, add_low_rank, dropout), _adapted(plain, add_low_rank, dropout))
    ours = _gradients(odd, ("x", "A", "B"), add_low_rank, dropout)
    theirs = _gradients(plain, ("x", "A", "B"), add_low_rank_reference, dropout)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float32, 1e-5)])
@DROPOUTS
def test_float32_masters_serve_every_dtype(dtype: torch.dtype, tolerance: float, dropout: float) -> None:
    t = _tensors(32, 64, out=16, rank=4, dtype=dtype)
    t |= {name: _tensors(32, 64, out=16, rank=4, dtype=torch.float32)[name] for name in ("A", "B")}
    assert _adapted(t, add_low_rank, dropout).dtype == dtype
    exact = {name: tensor.double() for name, tensor in t.items()}
    wanted = ("x", "A", "B")
    ours = _gradients(t, wanted, add_low_rank, dropout)
    theirs = _gradients(exact, wanted, add_low_rank, dropout)
    for name in wanted:
        assert ours[name].dtype == t[name].dtype
        error = (ours[name].double() - theirs[name]).norm() / theirs[name].norm()
        assert error < tolerance, f"{name}: {error}"


def test_a_second_derivative_is_refused() -> None:
    t = {name: tensor.requires_grad_() for name, tensor in _tensors(6, 5).items()}
    (gradient,) = torch.autograd.grad(_adapted(t, add_low_rank).pow(2).sum(), t["A"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# --- dropout ------------------------------------------------------------------------------------------------------


def test_dropout_drops_what_it_should_and_keeps_the_expectation() -> None:
    torch.manual_seed(0)
    x, A, B = torch.ones(4000, 1), torch.ones(1, 1), torch.ones(1, 1)
    y = add_low_rank(torch.zeros(4000, 1), x, A, B, 1.0, 0.25)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs((y == 0).double().mean().item() - 0.25) < 0.03


def test_the_probability_is_a_multiple_of_two_to_the_minus_16() -> None:
    one = torch.ones(1, 1).double()
    for dropout in (0.3, 1 / 3, 0.1 + 1e-6):
        steps = round(dropout * 2**16)
        y = add_low_rank(torch.zeros(500, 1).double(), torch.ones(500, 1).double(), one, one, 1.0, dropout)
        assert set(y.unique().tolist()) == {0.0, 1 / (1 - steps / 2**16)}
        assert 1 / (1 - steps / 2**16) != 1 / (1 - dropout)
    never = add_low_rank(torch.zeros(500, 1).double(), torch.ones(500, 1).double(), one, one, 1.0, 2**-18)
    assert (never == 1.0).all()


def test_dropout_follows_the_default_generator_alone() -> None:
    t = _tensors(6, 5)
    first, again = _adapted(t, add_low_rank, 0.4), _adapted(t, add_low_rank, 0.4)
    assert torch.equal(first, again)
    later = add_low_rank(F.linear(t["x"], t["W"], t["b"]), t["x"], t["A"], t["B"], 0.7, 0.4)
    assert not torch.equal(first, later)


def test_reference_and_product_drop_the_same_elements() -> None:
    t = _tensors(2, 16, 5)
    torch.testing.assert_close(_adapted(t, add_low_rank, 0.4), _adapted(t, add_low_rank_reference, 0.4))


def test_activation_checkpointing_replays_the_same_masks() -> None:
    t = {name: tensor.requires_grad_() for name, tensor in _tensors(6, 5).items()}

    def run(x: Tensor) -> Tensor:
        for _ in range(2):
            x = add_low_rank(F.linear(x, t["W"].t() @ t["W"]), x, t["A"], t["A"].t(), 0.7, 0.4)
        return x

    def gradient(forward: Callable[[Tensor], Tensor]) -> Tensor:
        torch.manual_seed(5)
        return torch.autograd.grad(forward(t["x"]).pow(2).sum(), t["A"])[0]

    plain = gradient(run)
    assert torch.equal(gradient(lambda x: checkpoint(run, x, use_reentrant=False)), plain)
    # the negative control: without the generator's state the replayed masks differ
    lost = gradient(lambda x: checkpoint(run, x, use_reentrant=False, preserve_rng_state=False))
    assert not torch.allclose(lost, plain)


# --- whose memory is used -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_the_result_lies_in_the_memory_of_the_base_output(bias: bool) -> None:
    t = {name: tensor.requires_grad_() for name, tensor in _tensors(2, 3, 5).items()}
    y = F.linear(t["x"], t["W"], t["b"] if bias else None)
    assert add_low_rank(y, t["x"], t["A"], t["B"], 0.7).data_ptr() == y.data_ptr()


def test_a_leaf_that_wants_a_gradient_stays_untouched() -> None:
    t = _tensors(6, 5)
    y = torch.zeros(6, 4, dtype=torch.float64, requires_grad=True)
    add_low_rank(y, t["x"], t["A"], t["B"], 0.7).sum().backward()
    assert not y.any()
    assert torch.equal(y.grad, torch.ones_like(y))  # type: ignore[arg-type]


def test_an_output_that_shares_memory_with_the_input_stays_untouched() -> None:
    t = _tensors(6, 4)
    x = t["x"].clone()
    y = add_low_rank(x.view(6, 4), x, t["A"], t["B"], 0.7)
    assert torch.equal(x, t["x"])
    torch.testing.assert_close(y, x + 0.7 * x @ t["A"].t() @ t["B"].t())


def test_an_output_with_gaps_in_memory_stays_untouched() -> None:
    t = _tensors(6, 5)
    y = torch.zeros(4, 6, dtype=torch.float64).t()
    total = add_low_rank(y, t["x"], t["A"], t["B"], 0.7)
    assert not y.any()
    torch.testing.assert_close(total, 0.7 * t["x"] @ t["A"].t() @ t["B"].t())


def test_a_base_that_kept_its_output_fails_loudly() -> None:
    t = {name: tensor.requires_grad_() for name, tensor in _tensors(6, 5).items()}
    y = torch.tanh(F.linear(t["x"], t["W"]))  # tanh keeps its output for backward
    total = add_low_rank(y, t["x"], t["A"], t["B"], 0.7)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.sum().backward()


def test_inference_mode_and_its_tensors_work() -> None:
    t = _tensors(6, 5)
    expected = _adapted(t, add_low_rank)
    with torch.inference_mode():
        assert torch.equal(_adapted(t, add_low_rank), expected)
        y = F.linear(t["x"], t["W"], t["b"])
    with torch.no_grad():
        torch.testing.assert_close(add_low_rank(y, t["x"], t["A"], t["B"], 0.7), expected)


# --- mixed precision and the compiler -----------------------------------------------------------------------------


@DROPOUTS
def test_autocast_computes_in_the_dtype_of_the_base_output(dropout: float) -> None:
    t = {name: tensor.float().requires_grad_() for name, tensor in _tensors(16, 32, dtype=torch.float32).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = _adapted(t, add_low_rank, dropout)
        y.float().pow(2).sum().backward()  # inside on purpose: autocast must not reach the backward either
    assert y.dtype == torch.bfloat16
    assert {t[name].grad.dtype for name in ("x", "A", "B")} == {torch.float32}  # type: ignore[union-attr]
    exact = _gradients(t, ("x", "A", "B"), add_low_rank, dropout)
    for name, gradient in exact.items():
        torch.testing.assert_close(t[name].grad, gradient, rtol=0.1, atol=0.02 * gradient.abs().max().item())


def test_autocast_leaves_a_float32_base_output_in_float32() -> None:
    t = _tensors(16, 32, dtype=torch.float32)
    y = F.linear(t["x"], t["W"], t["b"])
    expected = add_low_rank(y.clone(), t["x"], t["A"], t["B"], 0.7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(add_low_rank(y, t["x"], t["A"], t["B"], 0.7), expected)


@pytest.mark.parametrize("autocast", [False, True])
@DROPOUTS
def test_it_compiles_whole_and_once(dropout: float, autocast: bool) -> None:
    t = {name: tensor.requires_grad_() for name, tensor in _tensors(6, 5, dtype=torch.float32).items()}

    def run(x: Tensor) -> Tensor:
        return add_low_rank(F.linear(x, t["W"], t["b"]), x, t["A"], t["B"], 0.7, dropout)

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        compiled(t["x"]).sum().backward()
        second = compiled(t["x"])
    if not (dropout or autocast):
        torch.testing.assert_close(second, run(t["x"]))


def test_it_runs_on_the_meta_device() -> None:
    t = {name: tensor.to("meta").requires_grad_() for name, tensor in _tensors(6, 5).items()}
    add_low_rank(F.linear(t["x"], t["W"]), t["x"], t["A"], t["B"], 0.7, 0.1).sum().backward()
    assert t["A"].grad is not None
    assert t["A"].grad.shape == (3, 5)


# --- what is kept for backward ------------------------------------------------------------------------------------


def _layer(train_a: bool, x_wants: bool = True) -> dict[str, Tensor]:
    """One bf16 linear 1024 -> 1024 over 1024 tokens with float32 masters of rank 16."""
    t = _tensors(1024, 1024, out=1024, rank=16, dtype=torch.float32)
    t |= {name: t[name].bfloat16() for name in ("x", "W", "b")}
    t["x"].requires_grad_(x_wants)
    t["A"].requires_grad_(train_a)
    t["B"].requires_grad_()
    return t


def _stashed(output: Tensor) -> int:
    """Bytes of the tensors that Python Functions in the graph hold as attributes, past the hooks' sight."""
    found, seen, todo = {}, set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for value in getattr(node, "__dict__", {}).values():
            if isinstance(value, Tensor):
                found[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
        todo += [parent for parent, _ in node.next_functions]
    return sum(found.values())


@DROPOUTS
@pytest.mark.parametrize("train_a", [True, False], ids=["lora", "lora-fa"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_twentieth_of_a_mebibyte_is_kept_beyond_the_input(train_a: bool, dropout: float, bias: bool) -> None:
    t = _layer(train_a)
    outputs = []
    kept = kept_for_backward(lambda: outputs.append(_adapted(t, add_low_rank, dropout, bias)), beyond=t.values())
    assert kept == 1024 * 16 * 2  # z in bf16, 0.03 MiB
    assert kept <= 0.05 * MiB
    assert _stashed(outputs[0]) == 0


@DROPOUTS
def test_lora_fa_does_not_even_keep_the_input(dropout: float) -> None:
    t = _layer(train_a=False)
    factors = [t[name] for name in ("W", "b", "A", "B")]
    assert kept_for_backward(lambda: _adapted(t, add_low_rank, dropout), beyond=factors) <= 0.05 * MiB
    # the negative control: with A trained, the input is counted
    t["A"].requires_grad_()
    assert kept_for_backward(lambda: _adapted(t, add_low_rank, dropout), beyond=factors) >= 2 * MiB


def test_a_float32_input_under_autocast_is_kept_as_it_came() -> None:
    t = {name: tensor.float().detach() for name, tensor in _layer(train_a=True).items()}
    t["A"].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kept_for_backward(lambda: _adapted(t, add_low_rank), beyond=t.values()) == 0  # B does not train


def test_the_accounts_see_what_a_function_hides_on_its_context() -> None:
    class Hoarder(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.hidden = x.clone()
            return x + 1

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient

    x = torch.ones(8, requires_grad=True)
    assert _stashed(Hoarder.apply(x) * 2) == 32


@pytest.mark.parametrize(("dropout", "forward", "backward"), [(0.0, 0.1, 6.2), (0.1, 4.1, 6.2)])
def test_the_working_memory_of_a_layer(dropout: float, forward: float, backward: float) -> None:
    """MiB alive at once beyond the 2 MiB output: nothing but z and factors, plus one mask with dropout."""
    t = _layer(train_a=True)
    with LiveBytes() as live:
        y = F.linear(t["x"], t["W"])
        live.restart_peak()
        before = live.now
        y = add_low_rank(y, t["x"], t["A"], t["B"], 2.0, dropout)
        assert live.peak - before < forward * MiB
        gradient = torch.ones_like(y)
        live.restart_peak()
        before = live.now
        y.backward(gradient)
        assert live.peak - before < backward * MiB
