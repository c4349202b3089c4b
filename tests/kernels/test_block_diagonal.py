"""The product of blocks is that of the dense block diagonals, and keeps only what it must."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lorary.analysis.memory.live_bytes import kept_for_backward
from lorary.kernels import low_rank
from lorary.kernels.block_diagonal import add_blocks
from lorary.kernels.low_rank import add_low_rank, add_low_rank_reference

MiB = 2**20
DROPOUTS = pytest.mark.parametrize("dropout", [0.0, 0.4])
BLOCKS = pytest.mark.parametrize("n", [1, 2, 3])


@pytest.fixture(autouse=True)
def _fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused nodes, however small the input; test_small_inputs.py has the plain operations."""
    monkeypatch.setattr(low_rank, "FUSED_FROM", 0)


def _tensors(*shape: int, n: int, out: int = 6, rank: int = 2, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """x [*shape], W [out, in], b [out], A [n, rank, in / n], B [n, out / n, rank], all random."""
    generator = torch.Generator().manual_seed(7)
    width = shape[-1]
    sizes = {"x": shape, "W": (out, width), "b": (out,), "A": (n, rank, width // n), "B": (n, out // n, rank)}
    return {
        name: torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype) for name, size in sizes.items()
    }


def _dense(t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The block diagonals (B [out, n rank], A [n rank, in])."""
    return torch.block_diag(*t["B"]), torch.block_diag(*t["A"])


def _adapted(t: dict[str, Tensor], dropout: float = 0.0) -> Tensor:
    torch.manual_seed(11)
    return add_blocks(F.linear(t["x"], t["W"], t["b"]), t["x"], t["A"], t["B"], 0.7, dropout)


def _reference(t: dict[str, Tensor], dropout: float = 0.0) -> Tensor:
    torch.manual_seed(11)
    B, A = _dense(t)
    return add_low_rank_reference(F.linear(t["x"], t["W"], t["b"]), t["x"], A, B, 0.7, dropout)


def _gradients(t: dict[str, Tensor], wanted: tuple[str, ...], run: Any, dropout: float) -> dict[str, Tensor]:
    t = {name: tensor.detach().clone().requires_grad_(name in wanted) for name, tensor in t.items()}
    run(t, dropout).pow(2).sum().backward()
    assert all(tensor.grad is None for name, tensor in t.items() if name not in wanted)
    return {name: t[name].grad for name in wanted}  # type: ignore[misc]


def _addmm(total: Any, left: Any, right: Any, out_shape: Any = None, **_: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


IN_PLACE = {torch.ops.aten.addmm_: _addmm}  # which the counter does not know by itself


# --- what is computed -------------------------------------------------------------------------------------------


@BLOCKS
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6), (0, 6), (2, 0, 6)])
def test_it_is_the_layer_with_the_block_diagonal_added_to_its_weight(n: int, shape: tuple[int, ...]) -> None:
    t = _tensors(*shape, n=n)
    B, A = _dense(t)
    torch.testing.assert_close(_adapted(t), F.linear(t["x"], t["W"] + 0.7 * B @ A, t["b"]))


def test_a_slice_of_the_input_reaches_its_slice_of_the_output_only() -> None:
    t = _tensors(5, 6, n=3)
    t["W"].zero_()
    moved = {**t, "x": t["x"].clone()}
    moved["x"][:, 2:4] += 1.0  # the second of three slices
    gap = (_adapted(moved) - _adapted(t)).abs().amax(0)
    assert gap[2:4].min() > 0
    assert not gap[:2].any()
    assert not gap[4:].any()


@BLOCKS
@DROPOUTS
def test_gradients_are_those_of_the_function(n: int, dropout: float) -> None:
    t = _tensors(2, 3, 6, n=n)
    names = ("x", "A", "B", "W", "b")
    inputs = tuple(t[name].requires_grad_() for name in names)
    assert torch.autograd.gradcheck(lambda *values: _adapted(dict(zip(names, values, strict=True)), dropout), inputs)


WANTED = [wanted for count in range(1, 5) for wanted in itertools.combinations(("x", "W", "A", "B"), count)]


@DROPOUTS
@pytest.mark.parametrize("wanted", WANTED, ids="".join)
def test_every_combination_of_wanted_gradients_agrees_with_the_reference(
    wanted: tuple[str, ...], dropout: float
) -> None:
    t = _tensors(2, 5, 6, n=2)
    torch.testing.assert_close(
        _gradients(t, wanted, _adapted, dropout), _gradients(t, wanted, _reference, dropout), rtol=1e-10, atol=1e-12
    )


@DROPOUTS
def test_inputs_need_not_be_contiguous(dropout: float) -> None:
    t = _tensors(6, 5, 6, n=3)
    odd = {**t, "x": t["x"].transpose(0, 2)}
    odd["A"] = t["A"].mT.contiguous().mT
    plain = {name: tensor.contiguous() for name, tensor in odd.items()}
    assert not odd["x"].is_contiguous()
    assert not odd["A"].is_contiguous()
    wanted = ("x", "A", "B")
    torch.testing.assert_close(_adapted(odd, dropout), _adapted(plain, dropout))
    torch.testing.assert_close(
        _gradients(odd, wanted, _adapted, dropout), _gradients(plain, wanted, _reference, dropout)
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 3e-3), (torch.bfloat16, 2e-2), (torch.float32, 1e-5)])
@DROPOUTS
def test_float32_masters_serve_every_dtype(dtype: torch.dtype, tolerance: float, dropout: float) -> None:
    t = _tensors(32, 64, n=4, out=16, rank=4, dtype=dtype)
    t |= {name: _tensors(32, 64, n=4, out=16, rank=4, dtype=torch.float32)[name] for name in ("A", "B")}
    assert _adapted(t, dropout).dtype == dtype
    wanted = ("x", "A", "B")
    ours = _gradients(t, wanted, _adapted, dropout)
    theirs = _gradients({name: tensor.double() for name, tensor in t.items()}, wanted, _reference, dropout)
    for name in wanted:
        assert ours[name].dtype == t[name].dtype
        error = (ours[name].double() - theirs[name]).norm() / theirs[name].norm()
        assert error < tolerance, f"{name}: {error}"


def test_one_block_is_the_low_rank_product_with_the_same_mask() -> None:
    t = _tensors(4, 6, n=1)
    torch.manual_seed(11)
    y = add_low_rank(F.linear(t["x"], t["W"], t["b"]), t["x"], t["A"][0], t["B"][0], 0.7, 0.4)
    torch.testing.assert_close(_adapted(t, 0.4), y)


def test_a_second_derivative_is_refused() -> None:
    t = {name: tensor.requires_grad_() for name, tensor in _tensors(6, 6, n=2).items()}
    (gradient,) = torch.autograd.grad(_adapted(t).pow(2).sum(), t["A"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# --- whose memory is used ---------------------------------------------------------------------------------------


def test_the_result_lies_in_the_memory_of_the_base_output() -> None:
    t = {name: tensor.requires_grad_() for name, tensor in _tensors(2, 3, 6, n=2).items()}
    y = F.linear(t["x"], t["W"], t["b"])
    assert add_blocks(y, t["x"], t["A"], t["B"], 0.7).data_ptr() == y.data_ptr()


@pytest.mark.parametrize("kind", ["leaf", "of the input", "with gaps"])
def test_an_output_that_is_not_ours_stays_untouched(kind: str) -> None:
    t = _tensors(6, 6, n=2)
    x = t["x"].clone()
    y = {
        "leaf": torch.zeros(6, 6, dtype=torch.float64, requires_grad=True),
        "of the input": x.view(6, 6),
        "with gaps": torch.zeros(6, 6, dtype=torch.float64).t(),
    }[kind]
    before = y.detach().clone()
    B, A = _dense(t)
    total = add_blocks(y, x, t["A"], t["B"], 0.7)
    torch.testing.assert_close(total, before + 0.7 * x @ A.T @ B.T)
    if kind != "with gaps":  # whose memory nobody else reads, but it cannot be written slice by slice in every case
        assert torch.equal(y, before)


def test_inference_mode_and_its_tensors_work() -> None:
    t = _tensors(6, 6, n=2)
    expected = _adapted(t)
    with torch.inference_mode():
        assert torch.equal(_adapted(t), expected)
        y = F.linear(t["x"], t["W"], t["b"])
    with torch.no_grad():
        torch.testing.assert_close(add_blocks(y, t["x"], t["A"], t["B"], 0.7), expected)


def test_activation_checkpointing_replays_the_same_masks() -> None:
    t = {name: tensor.requires_grad_() for name, tensor in _tensors(6, 6, n=2).items()}

    def run(x: Tensor) -> Tensor:
        return add_blocks(F.linear(x, t["W"]), x, t["A"], t["B"], 0.7, 0.4)

    def gradient(again: bool, reentrant: bool = False) -> Tensor:
        torch.manual_seed(5)
        y = checkpoint(run, t["x"], use_reentrant=reentrant) if again else run(t["x"])
        y.pow(2).sum().backward()
        found, t["A"].grad = t["A"].grad, None
        return found  # type: ignore[return-value]

    plain = gradient(False)
    assert torch.equal(gradient(True), plain)
    assert torch.equal(gradient(True, reentrant=True), plain)


@DROPOUTS
def test_autocast_computes_in_the_dtype_of_the_base_output(dropout: float) -> None:
    t = {name: tensor.requires_grad_() for name, tensor in _tensors(16, 32, n=2, dtype=torch.float32).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = _adapted(t, dropout)
        y.float().pow(2).sum().backward()
    assert y.dtype == torch.bfloat16
    exact = _gradients(t, ("x", "A", "B"), _reference, dropout)
    for name, gradient in exact.items():
        assert t[name].grad.dtype == torch.float32  # type: ignore[union-attr]
        torch.testing.assert_close(t[name].grad, gradient, rtol=0.1, atol=0.02 * gradient.abs().max().item())


def test_it_compiles_whole_and_once() -> None:
    t = {name: tensor.requires_grad_() for name, tensor in _tensors(6, 6, n=3, dtype=torch.float32).items()}

    def run(x: Tensor) -> Tensor:
        return add_blocks(F.linear(x, t["W"], t["b"]), x, t["A"], t["B"], 0.7)

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(t["x"]).sum().backward()
        torch.testing.assert_close(compiled(t["x"]), run(t["x"]))


def test_it_runs_on_the_meta_device() -> None:
    t = {name: tensor.to("meta").requires_grad_() for name, tensor in _tensors(6, 6, n=2).items()}
    add_blocks(F.linear(t["x"], t["W"]), t["x"], t["A"], t["B"], 0.7, 0.1).sum().backward()
    assert t["A"].grad is not None
    assert t["A"].grad.shape == (2, 2, 3)


# --- what it costs ----------------------------------------------------------------------------------------------


def _layer(n: int, train_a: bool = True) -> dict[str, Tensor]:
    """One bf16 linear 1024 -> 1024 over 1024 tokens with float32 masters of n blocks of rank 8."""
    t = _tensors(1024, 1024, n=n, out=1024, rank=8, dtype=torch.float32)
    t |= {name: t[name].bfloat16() for name in ("x", "W", "b")}
    for name in ("x", "B") + (("A",) if train_a else ()):
        t[name].requires_grad_()
    return t


@DROPOUTS
@pytest.mark.parametrize("n", [2, 8])
def test_the_middle_alone_is_kept_beyond_the_input(n: int, dropout: float) -> None:
    t = _layer(n)
    kept = kept_for_backward(lambda: _adapted(t, dropout), beyond=t.values())
    assert kept == 1024 * n * 8 * 2  # z in bf16: tokens x n rank


def test_with_a_frozen_the_input_is_not_kept() -> None:
    t = _layer(2, train_a=False)
    factors = [t[name] for name in ("W", "b", "A", "B")]
    assert kept_for_backward(lambda: _adapted(t), beyond=factors) <= 0.05 * MiB
    t["A"].requires_grad_()  # the negative control
    assert kept_for_backward(lambda: _adapted(t), beyond=factors) >= 2 * MiB


@pytest.mark.parametrize("n", [2, 4, 8])
def test_n_blocks_take_the_operations_of_one_pair_of_their_rank(n: int) -> None:
    """2 r (in + out) a token, whatever n is: n times fewer than the dense pair of rank n r."""
    t = {name: tensor.detach() for name, tensor in _layer(n).items()}
    y = torch.zeros(1024, 1024, dtype=torch.bfloat16)
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as blocks:
        add_blocks(y, t["x"], t["A"], t["B"], 0.7)
    B, A = _dense(t)
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as dense:
        add_low_rank(y, t["x"], A, B, 0.7)
    assert blocks.get_total_flops() == 1024 * 2 * 8 * (1024 + 1024)
    assert dense.get_total_flops() == n * blocks.get_total_flops()
