"""AdaLoRA against a whole training loop on plain tensors: equations 2, 8-12, algorithm 1 and the authors' penalty."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.layers.adapted import adapted_layers

R, TARGET, ALPHA, GAMMA = 4, 2, 8.0, 0.3
T, T_I, T_F = 24, 3, 10
SIZES = ((6, 5), (5, 7), (7, 7), (7, 4))
ADAM, SGD = torch.optim.AdamW, torch.optim.SGD


def net() -> nn.Module:
    torch.manual_seed(5)
    pairs = [(nn.Linear(*size), nn.Tanh()) for size in SIZES]
    return nn.Sequential(*[module for pair in pairs for module in pair]).double()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(9, 6, generator=generator).double(), torch.randn(9, 4, generator=generator).double()


class Loop:
    """The paper's loop. A masked direction keeps its P and Q, which the penalty goes on training.

    Args:
        weights: (W, b) of each layer.
        start: (P, E, Q) of each layer.
        form: `authors`: the mean of the norms over all P and Q; `paper`: the sum of the squared norms.
    """

    def __init__(
        self, weights: Any, start: Any, form: str, every: int, make: Any, lr: float, decay: float, clip: float
    ) -> None:
        self.weights, self.form, self.every, self.clip = weights, form, every, clip
        self.triplets = [[t.clone().requires_grad_() for t in triplet] for triplet in start]
        self.flat = [t for triplet in self.triplets for t in triplet]
        self.means = [torch.zeros_like(t) for t in self.flat]
        self.doubts = [torch.zeros_like(t) for t in self.flat]
        self.alive = [torch.ones(R, dtype=torch.bool) for _ in start]
        self.optimizer = make(self.flat, lr=lr, weight_decay=decay)
        self.t = 0

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        for (W, b), (P, E, Q) in zip(self.weights, self.triplets, strict=True):
            x = torch.tanh(x @ W.T + b + ALPHA / (R + 1e-5) * ((x @ Q.T) * E) @ P.T)
        return (x - y).square().mean()

    def penalty(self) -> Tensor:
        eye = torch.eye(R).double()
        gaps = [G for P, _, Q in self.triplets for G in (P.T @ P - eye, Q @ Q.T - eye)]
        if self.form == "paper":
            return GAMMA * sum(((G * G).sum() for G in gaps), torch.zeros(()).double())
        return GAMMA * sum(((G * G).sum().sqrt() for G in gaps), torch.zeros(()).double()) / len(gaps)

    def step(self, x: Tensor, y: Tensor) -> None:
        self.t += 1
        self.optimizer.zero_grad()
        (self.loss(x, y) + self.penalty()).backward()
        if self.t <= T - T_F:
            for w, mean, doubt in zip(self.flat, self.means, self.doubts, strict=True):
                now = (w * w.grad).detach().abs()
                mean.copy_(0.85 * mean + 0.15 * now)
                doubt.copy_(0.85 * doubt + 0.15 * (now - mean).abs())
        if self.clip:
            nn.utils.clip_grad_norm_(self.flat, self.clip)
        self.optimizer.step()
        if T_I < self.t <= T - T_F and (self.t % self.every == 0 or self.t == T - T_F):
            self.choose()
        elif self.t <= T - T_F:
            return
        with torch.no_grad():
            for (_, E, _), alive in zip(self.triplets, self.alive, strict=True):
                E[~alive] = 0.0

    def choose(self) -> None:
        n = len(self.triplets)
        left = int(n * TARGET + n * (R - TARGET) * (1 - (self.t - T_I) / (T - T_I - T_F)) ** 3)
        s = [mean * doubt for mean, doubt in zip(self.means, self.doubts, strict=True)]
        scores = [s[3 * i + 1] + s[3 * i].mean(0) + s[3 * i + 2].mean(1) for i in range(n)]
        least = torch.cat(scores).sort(descending=True).values[left - 1]
        self.alive = [score >= least for score in scores]
        assert sum(int(alive.sum()) for alive in self.alive) == left, "no ties"


@pytest.mark.parametrize(
    ("make", "lr", "decay", "clip"),
    [
        (SGD, 0.05, 0.0, 0.0),
        (ADAM, 0.05, 0.0, 0.0),
        (ADAM, 0.05, 0.1, 0.0),
        (SGD, 0.05, 0.1, 0.3),
        (ADAM, 0.05, 0.0, 0.3),
    ],
    ids=["SGD", "Adam", "AdamW with decay", "clipped SGD with decay", "clipped Adam"],
)
@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("form", ["authors", "paper"])
def test_it_is_the_papers_loop_to_the_end(
    form: str, every: int, make: Any, lr: float, decay: float, clip: float
) -> None:
    """Every tensor after every step, those of masked directions too, and the finished weights; to 1e-12."""
    model = net()
    weights = [(m.weight.detach().clone(), m.bias.detach().clone()) for m in model if isinstance(m, nn.Linear)]
    options = {"r": R, "target": TARGET, "alpha": ALPHA, "start": T_I, "final": T_F, "every": every}
    method = lorary.method("adalora", **options, orthogonality=GAMMA, form=form)
    lorary.attach(model, lorary.plan(model, method), dtype=torch.float64)
    layers = list(adapted_layers(model).values())
    start = [[layer.params[role].detach() for role in "PEQ"] for layer in layers]
    theirs = Loop(weights, start, form, every, make, lr, decay, clip)
    optimizer = make(lorary.param_groups(model, lr, decay))
    rules = lorary.rules(model, T, optimizer)
    x, y = data()
    for t in range(1, T + 1):
        optimizer.zero_grad()
        penalty = rules.penalty()
        assert (penalty - theirs.penalty()).abs() < 1e-12
        ((model(x) - y).square().mean() + penalty).backward()
        rules.after_backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        rules.after_step()
        theirs.step(x, y)
        masks = [torch.ones(R, dtype=torch.bool) if t < T else alive for alive in theirs.alive]  # the end removes them
        for layer, (P, E, Q), kept in zip(layers, theirs.triplets, masks, strict=True):
            for mine, other in zip("PEQ", (P[:, kept], E[kept], Q[kept]), strict=True):
                assert (layer.params[mine] - other).abs().max() < 1e-12, (t, mine)
    assert sum(len(layer.params["E"]) for layer in layers) == TARGET * len(SIZES)
    for layer, (W, _), (P, E, Q) in zip(layers, weights, theirs.triplets, strict=True):
        assert (layer.merged()[0] - (W + ALPHA / (R + 1e-5) * P @ E.diag() @ Q)).abs().max() < 1e-12
    far = [alive for alive in theirs.alive if not alive.all()]
    assert far, "something was masked"


@pytest.mark.parametrize("form", ["authors", "paper"])
def test_the_final_choice_changes_no_pull_on_the_other_layers(form: str) -> None:
    """Ten layers of rank 6 and a target of 1: a layer that loses nothing is pulled as hard as before."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(10)])
    method = lorary.method("adalora", r=6, target=1, start=0, final=3, every=100, form=form)
    lorary.attach(model, lorary.plan(model, method), dtype=torch.float64)
    layers = list(adapted_layers(model).values())
    optimizer = torch.optim.SGD(lorary.param_groups(model, 1e-9))
    rules = lorary.rules(model, 6, optimizer)
    pulls = []
    for _ in range(5):
        pulls.append(torch.autograd.grad(rules.penalty(), layers[3].params["P"])[0])
        for i, layer in enumerate(layers):
            for p in layer.params.values():  # the fourth layer matters most, then the fifth
                p.grad = torch.full_like(p, {3: 1.0, 4: 1e-2}.get(i, 1e-4))
        rules.after_backward()
        rules.after_step()
    ranks = rules.report()["ranks"]
    assert ranks["3"] == 6
    assert sum(ranks.values()) == 10
    for pull in pulls[1:]:
        torch.testing.assert_close(pull, pulls[0], rtol=1e-6, atol=0.0)
