"""Training in a random subspace: Fastfood, the point of zero, all dimensions, SAID's scales, and d90."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.analysis.inspection.fastfood import Fastfood, walsh_hadamard
from lorary.analysis.inspection.intrinsic import IntrinsicDimension, SubspaceRun
from lorary.analysis.inspection.subspace import SubspaceAdam, layers_of
from tests import tiny


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1, 2, 64, 128, 256, 2048])
def test_the_walsh_hadamard_transform_is_the_matrix(size: int) -> None:
    H = torch.ones(1, 1)
    while len(H) < size:
        H = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), H)
    x = random(3, size)
    assert torch.allclose(walsh_hadamard(x), x @ H / size**0.5, atol=1e-4)


@pytest.mark.parametrize(("d", "size"), [(1, 5), (7, 100), (64, 64), (100, 1000), (300, 200)])
def test_the_transpose_is_the_transpose(d: int, size: int) -> None:
    P = Fastfood(d, size, seed=3)
    M = torch.stack([P(e) for e in torch.eye(d)], 1)  # [D, d]
    assert M.shape == (size, d)
    x, g = random(d), random(size, seed=1)
    assert torch.allclose(P(x), M @ x, atol=1e-4)
    assert torch.allclose(P.transpose(g), M.T @ g, atol=1e-3)


def test_the_projection_is_determined_by_its_seed_and_its_rows_have_a_norm_of_one() -> None:
    P = Fastfood(50, 4000)
    x = random(50)
    assert torch.equal(P(x), Fastfood(50, 4000)(x))
    assert not torch.allclose(P(x), Fastfood(50, 4000, seed=1)(x))
    M = torch.stack([P(e) for e in torch.eye(50)], 1)
    assert float(M.square().sum(1).mean()) == pytest.approx(1, rel=0.05)
    gram = M.T @ M / 4000 * 50
    assert float((gram - torch.eye(50)).abs().max()) < 0.3, "its columns are nearly orthogonal"


def test_large_projections_are_made_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, g = random(40), random(1000)
    one = Fastfood(40, 1000)
    monkeypatch.setattr("lorary.analysis.inspection.fastfood._CHUNK", 200)
    chunked = Fastfood(40, 1000)
    assert len(list(chunked._blocks(x))) == 6
    assert float(chunked(x) @ g) == pytest.approx(float(x @ chunked.transpose(g)), rel=1e-3)
    assert one(x).shape == chunked(x).shape


class Dense:
    """An orthonormal basis of the whole space."""

    def __init__(self, d: int, size: int, seed: int) -> None:
        self.Q = torch.linalg.qr(random(size, d, seed=seed))[0]

    def __call__(self, x: Tensor) -> Tensor:
        return self.Q @ x

    def transpose(self, g: Tensor) -> Tensor:
        return self.Q.T @ g


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def loss_of(model: nn.Module) -> Tensor:
    return (model(random(16, 4, seed=7)) - random(16, 2, seed=8)).square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> float:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    return float(loss_of(model).detach())


def test_the_point_of_zero_is_the_base_bit_for_bit() -> None:
    model = tiny.seeded("LlamaForCausalLM")
    before = tiny.logits(model)
    for said in (False, True):
        SubspaceAdam(dict(model.named_parameters()), 30, lr=1.0, said=said).write()
        assert torch.equal(tiny.logits(model), before)


def test_in_a_dense_basis_of_all_dimensions_it_is_full_fine_tuning() -> None:
    """Gradient descent does not depend on the orthonormal basis."""
    free, inside = network(), network()
    size = sum(p.numel() for p in free.parameters())
    full = train(free, torch.optim.SGD(free.parameters(), lr=0.2), 30)
    inner = functools.partial(torch.optim.SGD)
    subspace = SubspaceAdam(dict(inside.named_parameters()), size, lr=0.2, projection=Dense, inner=inner)
    assert train(inside, subspace, 30) == pytest.approx(full, abs=1e-5)
    for p, q in zip(free.parameters(), inside.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-4)


def test_fastfood_of_all_dimensions_reaches_what_full_fine_tuning_reaches() -> None:
    free, inside = network(), network()
    size = sum(p.numel() for p in free.parameters())
    start = float(loss_of(free).detach())
    full = train(free, torch.optim.Adam(free.parameters(), lr=0.03), 400)
    inner = train(inside, SubspaceAdam(dict(inside.named_parameters()), size, lr=0.03), 400)
    assert (start - inner) / (start - full) > 0.9


def test_only_the_numbers_of_the_subspace_train() -> None:
    model = network()
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = SubspaceAdam(dict(model.named_parameters()), 3, lr=0.1)
    train(model, optimizer, 5)
    moved = torch.cat([(p.detach() - s).flatten() for p, s in zip(model.parameters(), start, strict=True)])
    basis = torch.stack([optimizer.projection(e) for e in torch.eye(3)], 1)
    coordinates = torch.linalg.lstsq(basis, moved[:, None]).solution
    assert torch.allclose(basis @ coordinates, moved[:, None], atol=1e-5)
    assert optimizer.theta.numel() == 3


def test_saids_scales_have_the_gradient_of_their_equation() -> None:
    """theta_i = theta0_i + lambda_i P(theta_d)_i, differentiated by autograd."""
    model = network()
    names = dict(model.named_parameters())
    optimizer = SubspaceAdam(names, 8, lr=0.1, said=True)
    assert optimizer.layers == {"0.weight": "0", "0.bias": "0", "2.weight": "2", "2.bias": "2"}
    assert (optimizer.theta.numel(), optimizer.lam.numel()) == (6, 2)
    with torch.no_grad():
        optimizer.theta.copy_(random(6, seed=2))
        optimizer.lam.copy_(torch.tensor([0.5, -2.0]))
    optimizer.write()
    P = torch.stack([optimizer.projection(e) for e in torch.eye(6)], 1)
    theta, lam = (t.detach().clone().requires_grad_() for t in (optimizer.theta, optimizer.lam))
    parts = (P @ theta).split(optimizer.sizes)
    scale = {"0": lam[0], "2": lam[1]}
    values = {
        name: start + scale[optimizer.layers[name]] * part.view_as(start)
        for (name, start), part in zip(zip(names, optimizer.start, strict=True), parts, strict=True)
    }
    output: Any = torch.func.functional_call(model, values, (random(16, 4, seed=7),))
    (output - random(16, 2, seed=8)).square().mean().backward()
    loss_of(model).backward()
    optimizer.step()
    assert torch.allclose(optimizer.theta.grad, theta.grad, atol=1e-5)  # type: ignore[arg-type]
    assert torch.allclose(optimizer.lam.grad, lam.grad, atol=1e-5)  # type: ignore[arg-type]
    assert not torch.equal(optimizer.lam.detach(), torch.tensor([0.5, -2.0])), "they train"


def test_a_layer_is_a_block_or_a_module_outside_of_them() -> None:
    layers = ("model.embed_tokens", "model.layers.0.mlp.up", "model.layers.0.norm", "model.norm")
    assert list(layers_of(tuple(f"{name}.weight" for name in layers)).values()) == [
        "model.embed_tokens",
        "model.layers.0",
        "model.layers.0",
        "model.norm",
    ]


def test_a_closure_and_a_schedule_work_as_with_any_optimizer() -> None:
    model = network()
    optimizer = SubspaceAdam(dict(model.named_parameters()), 4, lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    before = float(loss_of(model).detach())
    assert float(optimizer.step(closure).detach()) == pytest.approx(before)
    schedule.step()
    optimizer.step(closure)
    assert optimizer.inner.param_groups[0]["lr"] == pytest.approx(0.05)


class Quadratic(nn.Module):
    """The distance to a random target: a subspace of dimension d reaches d/D of it."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(64))

    def loss(self) -> Tensor:
        return (self.w - random(64, seed=11)).square().mean()


def runner(model: Quadratic) -> Any:
    def run(optimizer: torch.optim.Optimizer | None) -> float:
        for _ in range(150 if optimizer is not None else 0):
            assert optimizer is not None
            optimizer.zero_grad()
            model.loss().backward()
            optimizer.step()
        return float(model.loss().detach())

    return run


def test_the_loss_of_a_quadratic_falls_by_the_share_of_its_dimensions() -> None:
    model = Quadratic()
    told: list[str] = []
    found = lorary.intrinsic_dimension(
        model, runner(model), [64, 8, 32], lr=[0.05, 0.1], full_lr=0.1, progress=told.append
    )
    assert (found.size, [run.d for run in found.runs]) == (64, [8, 32, 64])
    assert found.full < 1e-3
    for run in found.runs:
        assert found.reached(run) == pytest.approx(run.d / 64, abs=0.2)
    assert found.d90 == 64
    assert found.verdict == "d90 is between 32 and 64, 100.00% of 64 parameters"
    assert told == ["base", "full fine-tuning", *(f"d = {d}" for d in (8, 8, 32, 32, 64, 64))]
    assert not model.w.detach().any(), "the model has its values back"
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert record["d90"] == found.d90
    assert str(found).splitlines()[1].split()[:2] == ["0", "base"]


def test_verdicts() -> None:
    def of(*losses: float) -> str:
        runs = tuple(SubspaceRun(10**i, loss, 0.1) for i, loss in enumerate(losses, 1))
        return IntrinsicDimension(100_000, False, 2.0, 1.0, runs).verdict

    assert of(1.05, 1.0) == "d90 is at most 10, 0.01% of 100,000 parameters"
    assert of(1.5, 1.05) == "d90 is between 10 and 100, 0.10% of 100,000 parameters"
    assert of(1.5, 1.2) == "no measured dimension reaches 90% of full fine-tuning: d90 is above 100"


def bad(*arguments: Any, **options: Any) -> str:
    with pytest.raises(lorary.LoraryError) as caught:
        lorary.intrinsic_dimension(*arguments, **options)
    return str(caught.value)


def test_every_wrong_argument_is_told_at_once() -> None:
    model = Quadratic()
    told = bad(model, runner(model), [0, 65, 2.5], lr=[float("nan"), 0.1], full_lr=-1.0)
    assert told == (
        "cannot measure the intrinsic dimension:\n"
        "  - dimensions: 0 is not a whole number from 1 to 64\n"
        "  - dimensions: 65 is not a whole number from 1 to 64\n"
        "  - dimensions: 2.5 is not a whole number from 1 to 64\n"
        "  - lr: nan is not a finite number above 0\n"
        "  - full_lr: -1.0 is not a finite number above 0"
    )
    told = bad(model.requires_grad_(False), runner(model), [], lr=[], full_lr=0.1)
    assert "model: none of its parameters requires a gradient" in told
    assert "dimensions: is empty" in told
    assert "lr: is empty" in told


def test_a_training_that_fails_leaves_the_model_as_it_was() -> None:
    model = Quadratic()

    def spoilt(optimizer: torch.optim.Optimizer | None) -> float:
        model.w.data.fill_(3.0 if optimizer is not None else 0.0)
        return float("inf") if optimizer is not None else 1.0

    assert "full fine-tuning: the held-out loss is inf" in bad(model, spoilt, [4], lr=[0.1], full_lr=0.1)
    assert not model.w.detach().any()
    losses = iter([1.0, 1.5])
    told = bad(model, lambda _: next(losses), [4], lr=[0.1], full_lr=0.1)
    assert "full_lr: the held-out loss is 1.5000 after full fine-tuning, and 1.0000 before" in told


def test_a_dimension_that_leaves_nothing_beside_the_scales_is_refused() -> None:
    names = dict(network().named_parameters())
    with pytest.raises(lorary.PlanError, match=r"d: is 2, and SAID takes 2 of it for the scales of the layers"):
        SubspaceAdam(names, 2, lr=0.1, said=True)
    with pytest.raises(lorary.PlanError, match=r"d: is True, not from 1 to 37"):
        SubspaceAdam(names, True, lr=0.1)
