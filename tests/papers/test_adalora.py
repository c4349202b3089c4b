"""AdaLoRA: directions that compete for a budget; scores, schedule, masks and what is left of them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.adapters import export_peft
from lorary.adapters.adapter import Adapter
from lorary.errors import ConfigError, MethodError
from lorary.layers.adapted import adapted_layers
from lorary.methods.adalora import AlphaOverInitialRank, OrthogonalityPenalty, SVDDelta, SVDDeltaInit
from lorary.methods.adalora_budget import RankBudget
from lorary.methods.dora import MagnitudeDirection

from .layers import EACH, attached, exactly, gradients, signature

ROLES = ("P", "E", "Q")
STEPS = 20


def net(dead: int | None = None, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Four layers of four shapes; what layer `dead`, if any, puts out reaches nothing."""
    torch.manual_seed(5)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(*size) for size in ((6, 5), (5, 7), (7, 7), (7, 4)))

        def forward(self, x: Tensor) -> Tensor:
            for i, layer in enumerate(self.layers):
                x = x + 0 * layer(x) if i == dead else torch.tanh(layer(x))
            return x

    return Net().to(dtype)


def single(dead: int | None = None) -> nn.Module:
    """The same in 32 bits, as adapters are saved."""
    return net(dead, torch.float32)


def method(**options: Any) -> lorary.Method:
    return lorary.method("adalora", **{"r": 4, "target": 2, "alpha": 8.0, "start": 3, "final": 6} | options)


def started(model: nn.Module | None = None, **options: Any) -> nn.Module:
    model = net() if model is None else model
    dtype = next(model.parameters()).dtype
    return lorary.attach(model, lorary.plan(model, method(**options)), dtype=dtype)


class Run:
    """A training run on fixed data, step by step."""

    def __init__(self, model: nn.Module, steps: int = STEPS, tell: bool = True, make: Any = torch.optim.AdamW) -> None:
        self.model = model
        self.optimizer = make(lorary.param_groups(model, lr=0.05, weight_decay=0.01))
        self.rules = lorary.rules(model, steps, self.optimizer if tell else None)
        generator = torch.Generator().manual_seed(0)
        dtype = next(model.parameters()).dtype
        self.x = torch.randn(9, 6, dtype=dtype, generator=generator)
        self.y = torch.randn(9, 4, dtype=dtype, generator=generator)

    def backward(self, micro: int = 1, penalties: int = 1) -> None:
        for part in range(micro):
            rows = slice(part, None, micro)
            ((self.model(self.x[rows]) - self.y[rows]).square().sum() / self.y.numel()).backward()
        for _ in range(penalties):
            torch.as_tensor(self.rules.penalty()).backward()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.backward()
        self.rules.after_backward()
        self.optimizer.step()
        self.rules.after_step()

    def to(self, step: int) -> Run:
        while self.rules.step < step:
            self.step()
        return self


def layers(model: nn.Module) -> list[Any]:
    return list(adapted_layers(model).values())


def nonzero(model: nn.Module) -> int:
    return sum(int(layer.params["E"].count_nonzero()) for layer in layers(model))


# --- the start --------------------------------------------------------------------------------------------------------


@EACH
def test_at_the_start_the_layer_is_its_base_bit_for_bit(make: Any, x: Any) -> None:
    layer, inputs = attached(make(), "adalora", r=4, target=2), x()
    assert torch.equal(layer(inputs), layer.base(inputs))
    B, A = layer.factors()
    assert not (B @ A).any()


@EACH
def test_only_the_values_have_a_first_gradient_from_the_task(make: Any, x: Any) -> None:
    layer = attached(make(), "adalora", r=4, target=2)
    assert signature(layer, x()) == {"P": "zero", "E": "some", "Q": "zero"}


def test_the_penalty_reaches_what_the_task_does_not() -> None:
    model = started()
    lorary.rules(model, STEPS).penalty().backward()
    for layer in layers(model):
        assert layer.params["E"].grad is None
        assert layer.params["P"].grad.abs().min() > 0
        assert layer.params["Q"].grad.abs().min() > 0


def test_the_factors_start_small_and_normal() -> None:
    layer = attached(nn.Linear(400, 300), "adalora", r=64, target=2)
    for role in "PQ":
        values = layer.params[role].detach()
        assert values.std() == pytest.approx(0.02, rel=0.02)
        assert values.mean().abs() < 0.001
        assert (values.abs() < 0.02).double().mean() == pytest.approx(0.683, abs=0.01)  # as a normal one's


@EACH
def test_the_gradients_are_those_of_the_dense_form(make: Any, x: Any) -> None:
    layer, inputs = attached(make(), "adalora", r=4, target=2), x()
    with torch.no_grad():
        for p in layer.params.values():
            p.add_(torch.randn_like(p))
    mine = gradients(layer, inputs)
    given = {role: p.detach().clone().requires_grad_() for role, p in layer.params.items()}
    W = layer.kind.matrix(layer.base).detach() + 6 / (4 + 1e-5) * given["P"] @ given["E"].diag() @ given["Q"]
    y = layer.kind.run(layer.base, inputs, W, layer.bias)
    exactly(layer(inputs), y)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().add((y**2).sum() / 7).backward()
    exactly(mine, {role: t.grad for role, t in given.items()})


# --- the budget -------------------------------------------------------------------------------------------------------


def closed_form(t: int, T: int, t_i: int, t_f: int, b_0: int, b_T: int) -> int:
    """The paper's schedule in exact arithmetic."""
    if t <= t_i:
        return b_0
    if t >= T - t_f:
        return b_T
    return int(b_T + (b_0 - b_T) * (1 - Fraction(t - t_i, T - t_i - t_f)) ** 3)


@pytest.mark.parametrize(
    ("T", "t_i", "t_f", "ranks", "target"),
    [
        (100, 10, 30, [12] * 7, 8),
        (57, 0, 20, [3, 4, 9], 2),
        (1000, 333, 1, [12] * 72, 8),
        (11, 4, 6, [2, 2], 1),
        (40, 5, 5, [2, 6], 2),
    ],
)
def test_the_budget_is_the_closed_form(T: int, t_i: int, t_f: int, ranks: list[int], target: int) -> None:
    rule = RankBudget(target, t_i, t_f)
    b = [rule.budget(t, T, ranks) for t in range(1, T + 1)]
    assert b == [closed_form(t, T, t_i, t_f, sum(ranks), target * len(ranks)) for t in range(1, T + 1)]
    assert b == sorted(b, reverse=True)
    assert rule.budget(t_i, T, ranks) == sum(ranks)
    assert rule.budget(T - t_f, T, ranks) == b[-1] == target * len(ranks)
    assert b[T - t_f - 2] >= b[-1]


def test_shares_of_the_run_and_numbers_of_steps_say_the_same() -> None:
    assert RankBudget(2, 0.1, 0.3).times(200) == RankBudget(2, 20, 60).times(200) == (20, 60)


@pytest.mark.parametrize(("start", "final", "steps"), [(3, 6, 9), (0.5, 0.5, 10), (0, 4, 4), (12, 0, 5)])
def test_a_run_without_room_for_the_budget_is_refused(start: float, final: float, steps: int) -> None:
    with pytest.raises(ConfigError) as refusal:
        lorary.rules(started(start=start, final=final), steps)
    t_i, t_f = RankBudget(2, start, final).times(steps)
    assert str(refusal.value) == (
        "AdaLoRA's budget does not fit this run:\n"
        f"  - rules: {t_i} steps before and {t_f} after leave none of the run's {steps} for the budget to fall\n"
        "      hint: lower start or final"
    )


def held_to_the_budget(model: nn.Module, gradient: Callable[[Tensor], Tensor], every: int = 1) -> None:
    """After every mask exactly b(t) values are not zero; before the last phase all of them move again."""
    rules = lorary.rules(model, STEPS)
    for step in range(1, STEPS + 1):
        for layer in layers(model):
            for p in layer.params.values():
                p.grad = gradient(p)
        rules.after_backward()
        with torch.no_grad():
            for layer in layers(model):
                layer.params["E"].add_(1.0)  # an optimizer's step: nothing is zero by chance
        rules.after_step()
        b = closed_form(step, STEPS, 3, 6, 16, 8)
        masked = step > 3 and (step % every == 0 or step >= STEPS - 6)
        assert nonzero(model) == (b if masked else 16), f"step {step}: {nonzero(model)} of {b}"
        if masked:
            assert rules.report()["rank_budget"] == b
            assert sum(rules.report()["ranks"].values()) == b


@pytest.mark.parametrize("every", [1, 4])
def test_after_every_mask_as_many_are_left_as_the_budget_says(every: int) -> None:
    held_to_the_budget(started(every=every), torch.randn_like, every)


def test_also_where_all_scores_are_equal() -> None:
    held_to_the_budget(started(), torch.zeros_like)


class OffByOne(RankBudget):
    """Keeps one direction more than the budget."""

    def _select(self, layers: Any, state: Any, budget: int) -> None:
        super()._select(layers, state, budget + 1)


class TiesStay(RankBudget):
    """The authors' threshold: whatever scores more than the (b_0 - b)-th smallest stays, and equal ones all go."""

    def _select(self, layers: Any, state: Any, budget: int) -> None:
        scores = torch.cat([self.scores(layer, state) for layer in layers])
        threshold = torch.kthvalue(scores, max(len(scores) - budget, 1)).values
        for layer in layers:
            state[f"alive|{layer.site.name}"] = self.scores(layer, state) > threshold


@pytest.mark.parametrize(("planted", "gradient"), [(OffByOne, torch.randn_like), (TiesStay, torch.zeros_like)])
def test_a_mask_that_keeps_too_many_or_too_few_is_caught(planted: Any, gradient: Any) -> None:
    model = started()
    wrong = object.__new__(planted)
    wrong.__dict__.update(vars(layers(model)[0].method.rules[0]))
    for layer in layers(model):
        object.__setattr__(layer.method, "rules", (wrong,))
    with pytest.raises(AssertionError, match="step 4"):
        held_to_the_budget(model, gradient)


def test_masked_directions_may_come_back_until_the_last_phase() -> None:
    model = started(every=2)
    rules = lorary.rules(model, STEPS)
    masks = []
    for _ in range(STEPS):
        for layer in layers(model):
            for p in layer.params.values():
                p.grad = torch.randn_like(p)
        rules.after_backward()
        with torch.no_grad():
            for layer in layers(model):
                layer.params["E"].fill_(1.0)  # where a mask is, until the next one
        rules.after_step()
        masks.append(torch.cat([rules.states[0][f"alive|{layer.site.name}"] for layer in layers(model)]))
    back = [bool((after & ~before).any()) for before, after in itertools.pairwise(masks)]
    assert any(back[: STEPS - 7])
    assert not any(back[STEPS - 7 :]), "the choice stands"


# --- the scores -------------------------------------------------------------------------------------------------------


def slowly(history: list[dict[str, tuple[Tensor, Tensor]]], b1: float, b2: float) -> list[float]:
    """Equations 8-12 in double precision, one number at a time.

    Args:
        history: for each step role -> (tensor, its gradient).
    """

    def worth(values: list[tuple[float, float]]) -> float:
        I = U = 0.0  # noqa: E741
        for w, g in values:
            now = abs(w * g)
            I = b1 * I + (1 - b1) * now  # noqa: E741
            U = b2 * U + (1 - b2) * abs(now - I)
        return I * U

    def entry(role: str, *at: int) -> float:
        return worth([(float(step[role][0][at]), float(step[role][1][at])) for step in history])

    out, r = history[0]["P"][0].shape
    inp = history[0]["Q"][0].shape[1]
    return [
        entry("E", i)
        + sum(entry("P", j, i) for j in range(out)) / out
        + sum(entry("Q", i, j) for j in range(inp)) / inp
        for i in range(r)
    ]


@pytest.mark.parametrize(("b1", "b2"), [(0.85, 0.85), (0.5, 0.97)])
def test_the_scores_are_those_of_a_slow_reference(b1: float, b2: float) -> None:
    model = started()
    rule = RankBudget(2, 10, 5, beta1=b1, beta2=b2)
    state = rule.start(layers(model), STEPS)
    history: dict[str, list[Any]] = {layer.site.name: [] for layer in layers(model)}
    for step in range(1, 6):
        for layer in layers(model):
            for p in layer.params.values():
                p.data.normal_()
                p.grad = torch.randn_like(p)
            history[layer.site.name].append({role: (p.detach().clone(), p.grad) for role, p in layer.params.items()})
        rule.after_backward(layers(model), state, step)
    for layer in layers(model):
        expected = torch.tensor(slowly(history[layer.site.name], b1, b2))
        torch.testing.assert_close(rule.scores(layer, state), expected, rtol=1e-5, atol=1e-9)


def test_the_scores_are_of_the_weights_that_the_gradients_belong_to() -> None:
    """Of those before the optimizer's step, and of gradients that nobody has clipped yet."""
    run = Run(started())
    run.step()
    run.optimizer.zero_grad()
    run.backward()
    layer = layers(run.model)[1]
    before = {role: run.rules.states[0][f"I|layers.1|{role}"].clone() for role in ROLES}
    expected = {role: 0.85 * before[role] + 0.15 * (p * p.grad).abs().float() for role, p in layer.params.items()}
    run.rules.after_backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 1e-3)
    run.optimizer.step()
    run.rules.after_step()
    for role in ROLES:
        torch.testing.assert_close(run.rules.states[0][f"I|layers.1|{role}"], expected[role].detach())


def accumulated(penalties: int) -> dict[str, Tensor]:
    run = Run(started()).to(2)
    run.optimizer.zero_grad()
    run.backward(micro=3, penalties=penalties)
    run.rules.after_backward()
    return {name: t for name, t in run.rules.state_dict().items() if "|" in name}


def test_accumulated_gradients_count_as_one_step() -> None:
    run = Run(started()).to(2)
    run.optimizer.zero_grad()
    run.backward()
    run.rules.after_backward()
    whole = {name: t for name, t in run.rules.state_dict().items() if "|" in name}
    torch.testing.assert_close(accumulated(penalties=1), whole)
    with pytest.raises(AssertionError):  # the penalty belongs to the step, not to each of its parts
        torch.testing.assert_close(accumulated(penalties=3), whole)


@pytest.mark.parametrize("pair", ["PQ", "PE", "EQ"])
def test_signs_that_cancel_change_nothing(pair: str) -> None:
    """(p_i, q_i) and (-p_i, -q_i) are the same direction: the run is the same, mirrored."""
    one, other = Run(started(), make=torch.optim.AdamW), Run(started(), make=torch.optim.AdamW)
    for run in (one, other):
        for i, layer in enumerate(layers(run.model)):
            with torch.no_grad():
                layer.params["E"].copy_(torch.linspace(-1, 1, 4, dtype=torch.float64) + i / 10)
                if run is other:
                    flip = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
                    for role in pair:
                        layer.params[role].mul_(flip[:, None] if role == "Q" else flip)
    for step in range(1, STEPS + 1):
        one.to(step), other.to(step)
        assert one.rules.report() == other.rules.report()
    exactly(one.model(one.x), other.model(one.x))


# --- the penalty ------------------------------------------------------------------------------------------------------


def gaps(model: nn.Module) -> list[Tensor]:
    """P^T P - I and Q Q^T - I of every layer."""
    pairs = [
        (layer.params["P"].T @ layer.params["P"], layer.params["Q"] @ layer.params["Q"].T) for layer in layers(model)
    ]
    return [G - torch.eye(len(G), dtype=G.dtype) for pair in pairs for G in pair]


def test_the_penalty_in_both_forms() -> None:
    model = started()
    with torch.no_grad():
        for layer in layers(model):
            for p in layer.params.values():
                p.normal_()
    ours = {form: OrthogonalityPenalty(0.3, form).penalty(layers(model), {}) for form in ("authors", "paper")}
    norms = [float((G.detach() ** 2).sum()) ** 0.5 for G in gaps(model)]
    assert ours["authors"].item() == pytest.approx(0.3 * sum(norms) / len(norms), rel=1e-12)
    assert ours["paper"].item() == pytest.approx(0.3 * sum(n**2 for n in norms), rel=1e-12)
    assert OrthogonalityPenalty(0).penalty(layers(model), {}) == 0.0
    P = layers(model)[0].params["P"]
    (gradient,) = torch.autograd.grad(ours["paper"], P)
    exactly(gradient, (0.3 * 4 * P @ (P.T @ P - torch.eye(4))).detach())


def test_orthonormal_factors_cost_nothing() -> None:
    model = started()
    with torch.no_grad():
        for layer in layers(model):
            layer.params["P"].copy_(torch.linalg.qr(torch.randn_like(layer.params["P"]))[0])
            layer.params["Q"].copy_(torch.linalg.qr(torch.randn_like(layer.params["Q"]).T)[0].T)
    for form in ("authors", "paper"):
        assert OrthogonalityPenalty(1.0, form).penalty(layers(model), {}).item() < 1e-12


# --- what is left -----------------------------------------------------------------------------------------------------


def masked_and_shrunk(step: int, dead: int | None = 2) -> tuple[Run, Run]:
    """Two equal runs, one of which cannot shrink: nobody has told it of the optimizer."""
    return Run(started(net(dead)), tell=False).to(step), Run(started(net(dead))).to(step)


def test_masked_directions_stay_to_the_last_step_and_are_then_removed() -> None:
    """They keep their P and Q, which the penalty trains; the finished tensors are those of the kept directions."""
    masked, shrunk = masked_and_shrunk(STEPS - 7)
    for step in range(STEPS - 6, STEPS + 1):
        before = [layer.params["P"].detach().clone() for layer in layers(masked.model)]
        masked.to(step), shrunk.to(step)
        assert masked.rules.report() == shrunk.rules.report()
        exactly(shrunk.model(shrunk.x), masked.model(masked.x))
        for whole, small, P in zip(layers(masked.model), layers(shrunk.model), before, strict=True):
            kept = (whole.params["E"] != 0) if step == STEPS else torch.ones(4, dtype=torch.bool)
            for role, take in (("P", (slice(None), kept)), ("E", kept), ("Q", kept)):
                assert torch.equal(small.params[role], whole.params[role][take])
            assert small.params["E"].shape[0] == kept.sum() == small.method.delta.R
            assert (whole.params["P"] != P).any(0).all()
    ranks = [layer.method.delta.kept for layer in layers(shrunk.model)]
    assert sum(ranks) == 8
    assert ranks[2] == 0, "what reaches nothing is worth nothing"


def test_the_optimizer_shrinks_with_the_tensors() -> None:
    masked, shrunk = masked_and_shrunk(STEPS)
    for whole, small in zip(layers(masked.model), layers(shrunk.model), strict=True):
        alive = whole.params["E"] != 0
        for role, take in (("P", (slice(None), alive)), ("E", alive), ("Q", alive)):
            state, expected = (r.optimizer.state[layer.params[role]] for r, layer in ((shrunk, small), (masked, whole)))
            assert state["step"] == STEPS
            for moment in ("exp_avg", "exp_avg_sq"):
                exactly(state[moment], expected[moment][take])
    for before, after in zip(masked.optimizer.param_groups, shrunk.optimizer.param_groups, strict=True):
        assert before["name"] == after["name"]
        assert len(before["params"]) == len(after["params"])
    grouped = {id(p) for group in shrunk.optimizer.param_groups for p in group["params"]}
    assert grouped == {id(p) for p in shrunk.model.parameters() if p.requires_grad}
    assert set(map(id, shrunk.optimizer.state)) == grouped


def test_nothing_shrinks_under_an_optimizer_that_trains_other_parameters() -> None:
    """One of two optimizers: the other one would go on with tensors that are no part of the model any more."""
    model = started()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizers = [torch.optim.AdamW(half, lr=1e-2) for half in (parameters[:2], parameters[2:])]
    rules = lorary.rules(model, STEPS, optimizers[0])
    for _ in range(STEPS):
        (model(torch.randn(4, 6, dtype=torch.float64)).square().mean() + rules.penalty()).backward()
        rules.after_backward()
        for optimizer in optimizers:
            optimizer.step()
        rules.after_step()
        model.zero_grad()
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in parameters}
    assert nonzero(model) == rules.report()["rank_budget"] < sum(len(layer.params["E"]) for layer in layers(model))


def test_what_the_scores_took_is_given_back() -> None:
    before, after, end = (
        sum(t.numel() for t in Run(started()).to(step).rules.state_dict().values())
        for step in (STEPS - 7, STEPS - 6, STEPS)
    )
    numbers = sum(4 * (out + inp + 1) for out, inp in ((5, 6), (7, 5), (7, 7), (4, 7)))
    assert before == 2 * numbers + 4 * 4 + 2  # two means of everything that trains, the masks, two counters
    assert after == 4 * 4 + 2
    assert end == 8 + 2


def finished(dead: int | None, tell: bool) -> tuple[nn.Module, Tensor, Tensor]:
    run = Run(started(single(dead)), tell=tell).to(STEPS)
    return run.model, run.x, run.model(run.x).detach()


@pytest.mark.parametrize("tell", [True, False], ids=["shrunk", "masked"])
def test_every_form_of_the_finished_adapter_is_the_same_function(tell: bool, tmp_path: Path) -> None:
    model, x, y = finished(2, tell)
    assert (y - single(2)(x)).abs().max() > 0.1
    adapter = Adapter.of(model)

    def near(other: nn.Module) -> None:
        assert (other(x) - y).abs().max() < 1e-6

    for form in (adapter, adapter.compact()):
        assert [p.scale for p in form.sites] == [8 / (4 + 1e-5)] * 4
        near(lorary.switch(single(2), form))
        lorary.save_adapter(form, tmp_path / "own")
        near(lorary.load(single(2), tmp_path / "own"))
        export_peft(form, tmp_path / "peft")
        near(lorary.load(single(2), tmp_path / "peft"))
    assert sum(p.delta.kept for p in adapter.compact().sites) == 8
    assert adapter.compact().sites[2].delta.kept == 0
    ranks = [form.A.shape[0] for form in adapter.compact().low_rank().values()]
    assert ranks == [p.delta.kept for p in adapter.compact().sites]
    near(lorary.merge(copy.deepcopy(model)))
    near(lorary.unmerge(lorary.merge(copy.deepcopy(model), keep=True)))


def test_what_joins_the_directions_stays_whole() -> None:
    """The magnitude of DoRA has no directions that could be taken out."""
    model = nn.Sequential(nn.Linear(6, 5))
    method = lorary.method("adalora", r=4, target=2).replace(rules=(), join=MagnitudeDirection())
    lorary.attach(model, lorary.plan(model, method))
    with torch.no_grad():
        model[0].params["E"][1:3] = 0.5
    x = torch.randn(3, 6)
    y = model(x)
    small = Adapter.of(model).compact()
    assert small.sites[0].delta.kept == 2
    assert torch.allclose(lorary.switch(model, small)(x), y, rtol=1e-5, atol=1e-6)


def test_the_scale_outlives_the_directions(tmp_path: Path) -> None:
    """s = alpha / (r + 1e-5) of the rank at the start: after shrinking, and from a file."""
    model, x, y = finished(2, True)
    lorary.save(model, tmp_path / "a")
    again = lorary.load(single(2), tmp_path / "a")
    assert torch.equal(again(x), y)
    for layer in layers(again):
        assert layer.scale == 8 / (4 + 1e-5)
        assert layer.method.delta.r == 4
        assert layer.params["E"].shape[0] == layer.method.delta.kept


def test_an_interrupted_run_is_the_same_run(tmp_path: Path) -> None:
    """Stopped before the masks, among them, and after the final choice."""
    straight = Run(started(single())).to(STEPS)
    for step in (2, 9, STEPS - 6, STEPS - 2):
        first = Run(started(single())).to(step)
        lorary.save(first.model, tmp_path / "a")
        state = {name: t.clone() for name, t in first.rules.state_dict().items()}
        model = lorary.load(single(), tmp_path / "a", trainable=True)
        second = Run(model)
        second.optimizer.load_state_dict(first.optimizer.state_dict())
        second.rules = lorary.rules(model, STEPS, second.optimizer, state)
        assert second.rules.step == step
        second.to(STEPS)
        assert torch.equal(second.model(second.x), straight.model(straight.x)), step


def test_a_run_that_an_older_version_has_pruned_goes_on(tmp_path: Path) -> None:
    """Up to 0.6 the masked directions were removed when the choice became final."""
    run = Run(started(single(2))).to(STEPS - 6)
    alive = {layer.site.name: layer.params["E"] != 0 for layer in layers(run.model)}
    assert run.rules.prune_directions(alive)
    lorary.save(run.model, tmp_path / "a")
    state = run.rules.state_dict() | {f"0.alive|{name}": mask[mask] for name, mask in alive.items()}
    model = lorary.load(single(2), tmp_path / "a", trainable=True)
    again = Run(model)
    again.optimizer.load_state_dict(run.optimizer.state_dict())
    again.rules = lorary.rules(model, STEPS, again.optimizer, state)
    again.to(STEPS)
    assert again.rules.report()["ranks"] == {name: int(mask.sum()) for name, mask in alive.items()}
    assert nonzero(model) == sum(layer.params["E"].numel() for layer in layers(model)) == 8
    assert torch.isfinite(model(again.x)).all()


# --- what does not go together ----------------------------------------------------------------------------------------


def refusal(*names: str, **options: Any) -> list[str]:
    with pytest.raises(MethodError) as error:
        lorary.method(*names, **options)
    return [problem.what for problem in error.value.problems]


def test_refusals() -> None:
    assert refusal("adalora", "dora") == [
        "MagnitudeDirection depends on the norm of the joined weight, which changes whenever a direction is masked"
    ]
    assert refusal("adalora", "lora-fa") == ["the scores need the gradients of P, E and Q, and Q is frozen"]
    assert refusal("adalora", r=4, target=5) == ["a target of 5 is more than the 4 directions of the start"]
    assert refusal("adalora", beta1=0.5) == ["is not an option of lora + adalora"]


def test_learning_rates_of_a_and_b_are_those_of_q_and_p() -> None:
    made = lorary.method("adalora", "lora+", ratio=4)
    assert (made.rate("P"), made.rate("Q"), made.rate("E")) == (4, 1, 1)


def test_its_components_work_without_the_preset() -> None:
    method = lorary.Method(SVDDelta(4), SVDDeltaInit(0.1), AlphaOverInitialRank(8.0), lorary.method().join)
    model = net()
    lorary.attach(model, lorary.plan(model, method), dtype=torch.float64)
    assert lorary.rules(model, 5).penalty() == 0.0
