"""LoKr: the Kronecker product of a small matrix and a larger one, which is low-rank where that is smaller."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.adapters.adapter import Adapter
from lorary.errors import MethodError, PlanError
from lorary.layers.adapted import adapted_layers
from lorary.methods.lokr import KroneckerProduct, factorization
from lorary.methods.lora import AlphaOverRank

from .layers import attached, dense_gradients, exactly, gradients, matrix, same_function, shake, signature
from .test_counts import llama_2_7b

LAYERS: dict[str, tuple[Any, Any]] = {
    "linear": (lambda: nn.Linear(24, 40), lambda: torch.randn(5, 24).double()),
    "wide": (lambda: nn.Linear(64, 6), lambda: torch.randn(2, 3, 64).double()),
    "conv1d": (lambda: nn.Conv1d(12, 36, 3, padding=1), lambda: torch.randn(2, 12, 7).double()),
    "conv2d": (lambda: nn.Conv2d(24, 36, (3, 2), groups=2), lambda: torch.randn(2, 24, 5, 5).double()),
    "embedding": (lambda: nn.Embedding(30, 16), lambda: torch.tensor([[1, 5, 5], [0, 29, 1]])),
}
EACH = pytest.mark.parametrize(("make", "x"), LAYERS.values(), ids=LAYERS)
FORMS: dict[str, dict[str, Any]] = {
    "D low-rank": {"r": 1},
    "D whole": {"r": 20},
    "both low-rank": {"r": 1, "decompose_both": True},
    "of two": {"r": 2, "factor": 2},
    "a large C": {"r": 1, "factor": 12, "decompose_both": True},
    "with a core": {"r": 1, "tucker": True},
}
EACH_FORM = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def dense(layer: Any, p: dict[str, Tensor]) -> Tensor:
    """C kron D, entry by entry as it is defined: row i d1 + k, channel j d2 + l, at every place of the window."""
    window = 1
    for size in layer.site.kernel_size:
        window *= size
    C = p["C"] if "C" in p else p["Cb"] @ p["Ca"]
    if "D" in p:
        D = p["D"].unflatten(1, (-1, window))
    elif "T" in p:
        D = torch.stack([p["Db"] @ p["T"][:, :, w] @ p["Da"] for w in range(window)], -1)
    else:
        D = (p["Db"] @ p["Da"]).unflatten(1, (-1, window))
    (c1, c2), (d1, d2, _) = C.shape, D.shape
    M = C.new_zeros(c1 * d1, c2 * d2, window)
    for i, j in itertools.product(range(c1), range(c2)):
        M[i * d1 : (i + 1) * d1, j * d2 : (j + 1) * d2] = C[i, j] * D
    return M.flatten(1)


@EACH
@EACH_FORM
def test_at_the_start_the_layer_is_its_base_bit_for_bit(make: Any, x: Any, form: dict[str, Any]) -> None:
    layer, inputs = attached(make(), "lokr", **form), x()
    assert torch.equal(layer(inputs), layer.base(inputs))
    found = signature(layer, inputs)
    assert {role for role, gradient in found.items() if gradient == "some"} == {"D"} & set(found) | {"Da"} & set(found)


@EACH
@EACH_FORM
def test_it_is_the_kronecker_product(make: Any, x: Any, form: dict[str, Any]) -> None:
    layer, inputs = shake(attached(make(), "lokr", **form)), x()
    p = {role: t.detach() for role, t in layer.params.items()}
    W = matrix(layer) + layer.scale * dense(layer, p)
    same_function(layer, inputs, W)
    exactly(layer.merged()[0], W)
    B, A = layer.factors()
    assert A.shape[0] <= min(W.shape)
    exactly((B @ A).detach(), dense(layer, p))
    formula = dense_gradients(layer, inputs, lambda p: matrix(layer) + layer.scale * dense(layer, p))
    exactly(gradients(layer, inputs), formula)


def test_the_rank_is_the_product_of_both() -> None:
    layer = shake(attached(nn.Linear(36, 64), "lokr", r=2))
    assert {role: tuple(p.shape) for role, p in layer.params.items()} == {"C": (8, 6), "Db": (8, 2), "Da": (2, 6)}
    assert torch.linalg.matrix_rank(layer.merged()[0] - matrix(layer)) == 6 * 2


def test_the_sizes_of_the_authors_table() -> None:
    """The examples of LyCORIS' `factorization`; for 128 by 16 it exchanges the two, PEFT does not."""
    table = {
        127: [(1, 127)] * 5,
        128: [(8, 16), (2, 64), (4, 32), (8, 16), (16, 8)],
        250: [(10, 25), (2, 125), (2, 125), (5, 50), (10, 25)],
        360: [(18, 20), (2, 180), (4, 90), (8, 45), (15, 24)],
        512: [(16, 32), (2, 256), (4, 128), (8, 64), (16, 32)],
        1024: [(32, 32), (2, 512), (4, 256), (8, 128), (16, 64)],
    }
    assert {n: [factorization(n, f) for f in (-1, 2, 4, 8, 16)] for n in table} == table


def test_the_authors_defaults_and_start() -> None:
    """LyCORIS: network_dim 4, alpha 1, factor -1; the last factor zero, the others as a linear layer's weight."""
    method = lorary.method("lokr")
    assert method.delta == KroneckerProduct(4)
    assert method.scale(4) == 0.25  # type: ignore[misc]
    layer = attached(nn.Linear(1024, 1024), "lokr", r=12)
    bounds = {"C": 32**-0.5, "Db": 12**-0.5, "Da": 0.0}
    assert {role: p.abs().max().item() for role, p in layer.params.items()} == pytest.approx(bounds, rel=0.02)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"r": 4}, 1_191_936),
        ({"r": 4, "factor": 8}, 1_263_616),
        ({"r": 4, "decompose_both": True}, 262_400),
        ({"r": 10_000}, 2_363_392),
    ],
)
def test_the_numbers_on_llama_2_7b(options: dict[str, Any], expected: int) -> None:
    """c1 c2 + r (d1 + d2) for each layer: 4,096 is 64 x 64, and 11,008 is 86 x 128; with a factor of 8 both by 8."""
    r = options["r"]
    cs, ds = ((8, 8), (512, 1376)) if "factor" in options else ((64, 86), (64, 128))
    square, wide = ((c1, c2, d1, d2) for (c1, c2), (d1, d2) in ((cs[:1] * 2, ds[:1] * 2), (cs, ds)))

    def one(c1: int, c2: int, d1: int, d2: int) -> int:
        C = r * (c1 + c2) if "decompose_both" in options else c1 * c2
        return C + (d1 * d2 if r > 1000 else r * (d1 + d2))

    assert expected == 32 * (4 * one(*square) + 3 * one(*wide))
    plan = lorary.plan(llama_2_7b(), lorary.method("lokr", **options))
    assert plan.trainable == expected


def test_kron_a_has_both_whole() -> None:
    layer = attached(nn.Linear(12, 12), "lokr", r=10, factor=3)
    assert {role: tuple(p.shape) for role, p in layer.params.items()} == {"C": (3, 3), "D": (4, 4)}


def test_sizes_of_its_own_for_files_of_other_rules() -> None:
    model = nn.Sequential(nn.Linear(12, 20).double())
    method = lorary.method("lokr").replace(delta=KroneckerProduct(1, sizes=(10, 2)), scale=AlphaOverRank(1.0))
    lorary.attach(model, lorary.plan(model, method, "0"), dtype=torch.float64)
    layer = shake(adapted_layers(model)["0"])
    assert {role: tuple(p.shape) for role, p in layer.params.items()} == {"C": (10, 2), "Db": (2, 1), "Da": (1, 6)}
    p = {role: t.detach() for role, t in layer.params.items()}
    same_function(layer, torch.randn(3, 12).double(), matrix(layer) + dense(layer, p))
    with pytest.raises(PlanError, match=r"sizes = \(7, 2\) does not divide its 20 output and 12 input features"):
        lorary.plan(nn.Sequential(nn.Linear(12, 20)), method.replace(delta=KroneckerProduct(1, sizes=(7, 2))), "0")


@pytest.mark.parametrize("factor", [0, -2, 1.5, True, 2**40])
def test_impossible_factors_are_refused(factor: Any) -> None:
    with pytest.raises(MethodError, match="it takes a whole number of at least 1, or -1 for the two nearest divisors"):
        lorary.method("lokr", factor=factor)


def test_exported_it_is_lora_of_the_rank_of_the_product() -> None:
    model = nn.Sequential(nn.Linear(36, 64))
    lorary.attach(model, lorary.plan(model, lorary.method("lokr", r=2), "0"))
    shake(model[0])  # type: ignore[arg-type]
    form = Adapter.of(model).low_rank()["0"]
    assert form.A.shape == (12, 36)
    torch.testing.assert_close(form.B @ form.A, (model[0].merged()[0] - model[0].weight).detach())  # type: ignore
