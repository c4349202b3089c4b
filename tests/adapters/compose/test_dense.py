"""The truncated SVD of a dense matrix: the dense SVD's error, whatever way it was found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorary.adapters.compose import dense
from lorary.adapters.compose.dense import truncated_matrix


def matrix(out: int, inp: int, values: Tensor) -> Tensor:
    """A matrix with these singular values."""
    generator = torch.Generator().manual_seed(out)
    k = len(values)
    U = torch.linalg.qr(torch.randn(out, k, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(inp, k, generator=generator, dtype=torch.float64)).Q
    return (U * values.double() @ V.T).float()


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (7, 7), (1, 9), (9, 1)], ids=str)
def test_the_error_is_the_tail_of_the_spectrum(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    M = matrix(*shape, 0.7 ** torch.arange(min(shape)))
    S = torch.linalg.svdvals(M.double())
    monkeypatch.setattr(dense, "_BLOCK", 1)
    for rows_at_once in (256, 3):
        monkeypatch.setattr(dense, "_LEAST_ROWS", rows_at_once)
        for r in range(1, min(shape) + 1):
            found = truncated_matrix(M, rank=r)
            assert found.lost == pytest.approx(float(S[r:].norm()), rel=1e-6, abs=2e-7)
            assert found.norm == pytest.approx(float(S.norm()), rel=1e-9)
            assert (found.B.shape, found.A.shape, found.exact) == ((shape[0], r), (r, shape[1]), True)
            torch.testing.assert_close(found.B.norm(dim=0), found.A.norm(dim=1), rtol=1e-4, atol=1e-5)
            best = float((M.double() - found.B.double() @ found.A.double()).norm())
            assert best == pytest.approx(found.lost, rel=1e-9, abs=1e-12)


def test_energy_and_rounding() -> None:
    M = matrix(30, 20, torch.tensor([4.0, 2.0, 2.0, 1.0]))  # squares 16, 4, 4, 1
    assert [truncated_matrix(M, energy=e).A.shape[0] for e in (0.6, 0.7, 0.9, 0.95, 0.99)] == [1, 2, 3, 3, 4]
    assert truncated_matrix(M, rank=12).lost < 1e-6  # the rest is rounding
    zero = truncated_matrix(torch.zeros(5, 3), rank=2)
    assert (zero.B.shape, zero.norm, zero.error) == ((5, 1), 0.0, 0.0)
    assert bool(zero.B.isfinite().all())


@pytest.mark.parametrize("decay", [0.5, 0.97, 1.0])
@pytest.mark.parametrize("turned", [False, True])
def test_the_iteration_comes_within_a_thousandth(decay: float, turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "_EXACT_UP_TO", 64)
    values = decay ** torch.arange(120.0) if decay < 1 else torch.linspace(1, 0.9, 120)
    M = matrix(160, 120, values)
    M = M.T.contiguous() if turned else M
    before = torch.get_rng_state()
    found = truncated_matrix(M, rank=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(truncated_matrix(M, rank=4).B, found.B)
    tail = float(torch.linalg.svdvals(M.double())[4:].norm())
    assert tail * (1 - 1e-6) <= found.lost <= tail * 1.001


def test_a_product_is_found_to_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "_EXACT_UP_TO", 64)
    M = matrix(300, 200, torch.tensor([5.0, 1.0, 1e-2, 1e-4]))
    found = truncated_matrix(M, rank=4)
    assert not found.exact
    assert found.error < 3e-7


def test_an_iteration_that_does_not_converge_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    exact = dense._eigenvectors
    monkeypatch.setattr(dense, "_EXACT_UP_TO", 64)
    monkeypatch.setattr(dense, "_MOST_ITERATIONS", 1)
    monkeypatch.setattr(dense, "_eigenvectors", lambda M: calls.append(M) or exact(M))
    assert truncated_matrix(matrix(120, 120, torch.ones(120)), rank=2).exact
    assert len(calls) == 1
