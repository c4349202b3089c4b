"""LoHa's and LoKr's kernels are their references, in every dtype, and keep no matrix of the weight's size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorary.analysis.memory.live_bytes import kept_for_backward
from lorary.kernels import low_rank
from lorary.kernels.hadamard import add_hadamard, add_hadamard_reference
from lorary.kernels.kronecker import add_kronecker
from lorary.kernels.low_rank import add_low_rank_reference

DROPOUTS = pytest.mark.parametrize("dropout", [0.0, 0.4])
SHAPES = pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6), (0, 6)])
Run = Callable[[dict[str, Tensor], float], Tensor]


@pytest.fixture(autouse=True)
def _fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nodes, however small the input."""
    monkeypatch.setattr(low_rank, "FUSED_FROM", 0)


def made(shape: tuple[int, ...], sizes: dict[str, tuple[int, int]], dtype: torch.dtype = torch.float64) -> Any:
    """x [*shape], W [out, in] and factors of these sizes, all random."""
    generator = torch.Generator().manual_seed(7)
    found = {"x": shape, "W": (8, shape[-1])} | sizes
    return {
        name: torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype) for name, size in found.items()
    }


HADAMARD = {"B1": (8, 4), "A1": (4, 6), "B2": (8, 4), "A2": (4, 6)}
KRONECKER: dict[str, dict[str, tuple[int, int]]] = {
    "C whole, D a product": {"C": (4, 2), "Db": (2, 1), "Da": (1, 3)},
    "both products": {"Cb": (4, 1), "Ca": (1, 2), "Db": (2, 1), "Da": (1, 3)},
    "both whole": {"C": (4, 2), "D": (2, 3)},
    "D narrows": {"C": (8, 1), "D": (1, 6)},
    "C narrows": {"C": (1, 6), "D": (8, 1)},
}


def hadamard(t: dict[str, Tensor], dropout: float) -> Tensor:
    torch.manual_seed(11)
    return add_hadamard(F.linear(t["x"], t["W"]), t["x"], t["B1"], t["A1"], t["B2"], t["A2"], 0.7, dropout)


def hadamard_reference(t: dict[str, Tensor], dropout: float) -> Tensor:
    torch.manual_seed(11)
    return add_hadamard_reference(F.linear(t["x"], t["W"]), t["x"], t["B1"], t["A1"], t["B2"], t["A2"], 0.7, dropout)


def chains(t: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    C, D = ([t[role] for role in ("C", "Cb", "Ca") if role in t], [t[role] for role in ("D", "Db", "Da") if role in t])
    return tuple(C), tuple(D)


def kronecker(t: dict[str, Tensor], dropout: float) -> Tensor:
    torch.manual_seed(11)
    return add_kronecker(F.linear(t["x"], t["W"]), t["x"], *chains(t), 0.7, dropout)


def kronecker_reference(t: dict[str, Tensor], dropout: float) -> Tensor:
    torch.manual_seed(11)
    C, D = (chain[0] @ chain[1] if len(chain) == 2 else chain[0] for chain in chains(t))
    return add_low_rank_reference(
        F.linear(t["x"], t["W"]), t["x"], torch.kron(C, D), torch.eye(8, dtype=C.dtype), 0.7, dropout
    )


def agree(t: dict[str, Tensor], run: Run, reference: Run, dropout: float, wanted: tuple[str, ...]) -> None:
    found = []
    for each in (run, reference):
        own = {name: tensor.clone().requires_grad_(name in wanted) for name, tensor in t.items()}
        y = each(own, dropout)
        y.pow(2).sum().backward()
        found.append((y.detach(), {name: own[name].grad for name in wanted}))
        assert all(own[name].grad is None for name in t if name not in wanted)
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])
    with torch.no_grad():
        torch.testing.assert_close(run(t, dropout), found[1][0])


@SHAPES
@DROPOUTS
@pytest.mark.parametrize("wanted", [("x", *HADAMARD), ("B1", "A2"), ("x",)], ids=", ".join)
def test_hadamard(shape: tuple[int, ...], dropout: float, wanted: tuple[str, ...]) -> None:
    agree(made(shape, HADAMARD), hadamard, hadamard_reference, dropout, wanted)


@SHAPES
@DROPOUTS
@pytest.mark.parametrize("sizes", KRONECKER.values(), ids=KRONECKER)
def test_kronecker(shape: tuple[int, ...], dropout: float, sizes: dict[str, tuple[int, int]]) -> None:
    agree(made(shape, sizes), kronecker, kronecker_reference, dropout, ("x", *sizes))


@pytest.mark.parametrize("run", [hadamard, kronecker])
def test_sixteen_bits_with_masters_of_thirty_two(run: Run) -> None:
    sizes = HADAMARD if run is hadamard else KRONECKER["both products"]
    t = made((5, 6), sizes, torch.float32)
    exact = run(t, 0.0)
    half = {name: tensor.bfloat16() if name in "xW" else tensor.requires_grad_() for name, tensor in t.items()}
    y = run(half, 0.0)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.2)
    y.float().sum().backward()
    assert all(half[name].grad.dtype is torch.float32 for name in sizes)  # type: ignore[union-attr]


def test_no_matrix_of_the_weights_size_is_kept() -> None:
    """Backward keeps the input and the factors alone."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(4, 256, generator=generator), torch.randn(4, 256, generator=generator)
    B1, A1, B2, A2 = (torch.randn(*s, generator=generator).requires_grad_() for s in ((256, 1), (1, 256)) * 2)
    C, Db, Da = (torch.randn(*s, generator=generator).requires_grad_() for s in ((16, 16), (16, 2), (2, 16)))
    beyond = [x, B1, A1, B2, A2, C, Db, Da]
    for run in (
        lambda: add_hadamard(y.clone(), x, B1, A1, B2, A2, 1.0),
        lambda: add_kronecker(y.clone(), x, (C,), (Db, Da), 1.0),
    ):
        assert kept_for_backward(run, beyond) == 0


def test_the_seed_is_that_of_the_other_kernels() -> None:
    """Dropout drops the same elements as that of a LoRA in the same place."""
    t = made((5, 6), HADAMARD)
    torch.manual_seed(11)
    zero = torch.zeros(5, 8, dtype=torch.float64)
    M = (t["B1"] @ t["A1"]) * (t["B2"] @ t["A2"])
    by_lora = low_rank.add_low_rank(zero.clone(), t["x"], M, torch.eye(8, dtype=torch.float64), 1.0, 0.5)
    torch.manual_seed(11)
    found = add_hadamard(zero.clone(), t["x"], t["B1"], t["A1"], t["B2"], t["A2"], 1.0, 0.5)
    torch.testing.assert_close(found, by_lora)
