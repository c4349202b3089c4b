"""Delta-LoRA: the weight follows the product; in closed form it is two LoRAs on a base that nobody writes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.adapters import export_peft
from lorary.adapters.adapter import Adapter
from lorary.errors import ConfigError, MethodError, PlanError
from lorary.layers.adapted import adapted_layers
from lorary.methods.delta_lora import DeltaLoRADelta, DeltaLoRARule

from .. import tiny
from .layers import EACH, attached, dense_gradient, exactly, gradients, loss_of, shake, signature

STEPS = 7
SGD = (torch.optim.SGD, {"lr": 0.05, "weight_decay": 0.0})
DECAYED = (torch.optim.SGD, {"lr": 0.05, "weight_decay": 0.1})
ADAM = (torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.0})
EACH_OPTIMIZER = pytest.mark.parametrize(
    ("make", "settings"),
    [SGD, DECAYED, ADAM, (torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.3})],
    ids=["SGD", "SGD with decay", "Adam", "AdamW with decay"],
)


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7, bias=False), nn.Tanh(), nn.Linear(7, 5)).to(dtype)


def started(*names: str, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    model = net(dtype)
    made = lorary.method(*(names or ("delta-lora",)), **{"r": 2, "alpha": 3.0} | options)
    return lorary.attach(model, lorary.plan(model, made), dtype=dtype)


def data(model: nn.Module) -> tuple[Tensor, Tensor]:
    generator, dtype = torch.Generator().manual_seed(0), next(model.parameters()).dtype
    return torch.randn(9, 6, generator=generator).to(dtype), torch.randn(9, 5, generator=generator).to(dtype)


def train(model: nn.Module, make: Any, settings: dict[str, Any], steps: int = STEPS, clip: float = 0.0) -> nn.Module:
    optimizer = make(lorary.param_groups(model, settings["lr"], settings["weight_decay"]), **settings)
    rules = lorary.rules(model, steps, optimizer)
    x, y = data(model)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        rules.after_backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        rules.after_step()
    return model


def algorithm(make: Any, settings: dict[str, Any], K: int, ratio: float = 2.0, clip: float = 0.0) -> list[Tensor]:
    """The paper's algorithm 1 on plain tensors, t from 0: the effective weights W_T + s B_T A_T."""
    start, s = started(start=K, ratio=ratio), 3.0 / 2
    base = net()
    W = [m.weight.detach().clone() for m in base if isinstance(m, nn.Linear)]
    A, B = (
        [layer.params[role].detach().clone().requires_grad_() for layer in adapted_layers(start).values()]
        for role in "AB"
    )
    x, y = data(base)
    optimizer = make([*A, *B], **settings)
    for t in range(STEPS):
        optimizer.zero_grad()
        h = x
        for i, bias in enumerate((base[0].bias, None, base[4].bias)):
            h = h @ W[i].T + s * h @ A[i].T @ B[i].T + (0 if bias is None else bias)
            h = h if i == 2 else h.tanh()
        (h - y).square().mean().backward()
        if clip:
            nn.utils.clip_grad_norm_([*A, *B], clip)
        before = [(b @ a).detach() for a, b in zip(A, B, strict=True)]
        optimizer.step()
        if t > K:
            W = [w + ratio * s * ((b @ a).detach() - was) for w, a, b, was in zip(W, A, B, before, strict=True)]
    return [w + s * (b @ a).detach() for w, a, b in zip(W, A, B, strict=True)]


def weights(model: nn.Module) -> list[Tensor]:
    """The effective weight of every layer."""
    return [layer.merged()[0] for layer in adapted_layers(model).values()]


# --- the start --------------------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("start", [-1, 0, 3])
def test_at_the_start_the_layer_is_its_base_and_learns_as_lora(make: Any, x: Any, start: int) -> None:
    layer, inputs = attached(make(), "delta-lora", start=start), x()
    assert torch.equal(layer(inputs), layer.base(inputs))
    one, other = ("A", "B") if layer.site.kind == "embedding" else ("B", "A")
    given = {"A_K": "none", "B_K": "none", "lam": "none"} if start >= 0 else {}
    assert signature(layer, inputs) == {one: "some", other: "zero"} | given


def test_what_a_rule_gives_is_zero_and_does_not_train() -> None:
    layer = attached(nn.Linear(5, 4), "delta-lora", start=3)
    assert set(layer.params) == {"A", "B", "A_K", "B_K", "lam"}
    for role in ("A_K", "B_K", "lam"):
        assert not layer.params[role].requires_grad
        assert not layer.params[role].any()
    assert set(attached(nn.Linear(5, 4), "delta-lora", start=-1).params) == {"A", "B"}


# --- the closed form --------------------------------------------------------------------------------------------------


@EACH_OPTIMIZER
@pytest.mark.parametrize("K", [-1, 0, 1, 4])
@pytest.mark.parametrize("mode", ["closed", "paper"])
def test_it_is_the_papers_loop(make: Any, settings: dict[str, Any], K: int, mode: str) -> None:
    """To 1e-12 in double precision, whatever the optimizer makes of gradients and decay."""
    model = train(started(start=K, mode=mode), make, settings)
    for mine, theirs in zip(weights(model), algorithm(make, settings, K), strict=True):
        assert (mine - theirs).abs().max() < 1e-12


@pytest.mark.parametrize("K", [-1, 0, 3])
def test_clipping_sees_the_papers_gradients(K: int) -> None:
    for mode in ("closed", "paper"):
        model = train(started(start=K, mode=mode), *SGD, clip=0.05)
        for mine, theirs in zip(weights(model), algorithm(*SGD, K=K, clip=0.05), strict=True):
            assert (mine - theirs).abs().max() < 1e-12
    far = algorithm(*SGD, K=K)
    assert (weights(model)[0] - far[0]).abs().max() > 1e-4, "nothing was clipped"


def test_gradients_that_keep_their_factor_are_caught() -> None:
    """Without the rule's division SGD steps 1 + lambda times too far."""
    model = started(start=-1)
    x, y = data(model)
    (model(x) - y).square().mean().backward()
    kept = [layer.params["B"].grad.clone() for layer in adapted_layers(model).values()]
    lorary.rules(model, STEPS).after_backward()
    for layer, before in zip(adapted_layers(model).values(), kept, strict=True):
        exactly(layer.params["B"].grad, before / 3)


@pytest.mark.parametrize(("K", "rank"), [(-1, 2), (0, 4), (3, 4)])
def test_the_rank_of_the_update_is_r_or_2r(K: int, rank: int) -> None:
    """The paper calls it unbounded; with a constant ratio it is not."""
    for mode in ("closed", "paper"):
        model = train(started(start=K, mode=mode), *ADAM)
        for W, base in zip(weights(model), (m for m in net() if isinstance(m, nn.Linear)), strict=True):
            sizes = torch.linalg.svdvals(W - base.weight)
            assert (sizes > 1e-9 * sizes[0]).sum() == rank


@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_with_adam_from_the_first_step_it_is_lora_with_a_larger_alpha(ratio: float) -> None:
    settings = {"lr": 0.02, "eps": 1e-30, "weight_decay": 0.0}
    mine = train(started(start=-1, ratio=ratio), torch.optim.AdamW, settings)
    lora = train(started("lora", alpha=3.0 * (1 + ratio)), torch.optim.AdamW, settings)
    for one, other in zip(weights(mine), weights(lora), strict=True):
        assert (one - other).abs().max() < 1e-12
    late = train(started(start=2, ratio=ratio), torch.optim.AdamW, settings)
    assert (weights(late)[0] - weights(lora)[0]).abs().max() > 1e-3


@EACH_OPTIMIZER
def test_before_k_it_is_lora(make: Any, settings: dict[str, Any]) -> None:
    def run(model: nn.Module, steps: int) -> nn.Module:
        optimizer = make(lorary.param_groups(model, settings["lr"], settings["weight_decay"]), **settings)
        rules = lorary.rules(model, 100, optimizer)
        x, y = data(model)
        for _ in range(steps):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            rules.after_backward()
            optimizer.step()
            rules.after_step()
        return model

    lora = run(started("lora"), 5)  # t = 0 ... K
    for mode in ("closed", "paper"):
        mine = run(started(start=4, mode=mode), 5)
        for one, other in zip(weights(mine), weights(lora), strict=True):
            exactly(one, other)
        after = run(started(start=4, mode=mode), 6)
        assert (weights(after)[0] - weights(run(started("lora"), 6))[0]).abs().max() > 1e-4


def test_a_small_ratio_is_nearly_lora_and_none_is_refused() -> None:
    mine, lora = train(started(start=2, ratio=1e-9), *SGD), train(started("lora"), *SGD)
    for one, other in zip(weights(mine), weights(lora), strict=True):
        assert (one - other).abs().max() < 1e-8
    with pytest.raises(MethodError, match="has ratio = 0; it takes a positive finite number"):
        lorary.method("delta-lora", ratio=0)


@EACH
def test_the_gradient_of_the_input_has_the_whole_update(make: Any, x: Any) -> None:
    """A and B learn as if the weight was not theirs; what lies below sees s (1 + lambda) B A."""
    layer, inputs = shake(attached(make(), "delta-lora", start=-1)), x()
    W = layer.kind.matrix(layer.base).detach() + 2.0 * 3 * layer.params["B"].detach() @ layer.params["A"].detach()
    G = dense_gradient(layer, inputs, W)
    got = gradients(layer, inputs)
    exactly(got["B"], 2.0 * 3 * G @ layer.params["A"].detach().T)
    exactly(got["A"], 2.0 * 3 * layer.params["B"].detach().T @ G)
    if inputs.is_floating_point():
        mine, theirs = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
        loss_of(layer(mine)).backward()
        loss_of(layer.kind.run(layer.base, theirs, W, layer.bias)).backward()
        exactly(mine.grad, theirs.grad)


# --- the weights ------------------------------------------------------------------------------------------------------


def test_the_closed_form_writes_no_weight_and_the_papers_loop_does() -> None:
    before = [m.weight.detach().clone() for m in net() if isinstance(m, nn.Linear)]
    for mode in ("closed", "paper"):
        model = train(started(start=1, mode=mode), *ADAM)
        now = [layer.base.weight for layer in adapted_layers(model).values()]
        assert all(torch.equal(w, b) for w, b in zip(now, before, strict=True)) == (mode == "closed")
        assert not any(w.requires_grad for w in now)
        lorary.detach(model)
        back = [m.weight for m in model if isinstance(m, nn.Linear)]
        assert all(torch.equal(w, b) for w, b in zip(back, before, strict=True))


def test_a_written_weight_is_in_no_optimizer() -> None:
    model = started(mode="paper", start=1)
    grouped = {id(p) for group in lorary.param_groups(model, 0.1) for p in group["params"]}
    assert grouped == {id(layer.params[role]) for layer in adapted_layers(model).values() for role in "AB"}


# --- what is left -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"start": -1}, {"start": 3}, {"start": 3, "mode": "paper"}], ids=str)
def test_every_form_of_the_finished_adapter_is_the_same_function(options: dict[str, Any], tmp_path: Path) -> None:
    single = torch.float32
    model = train(started(dtype=single, **options), *ADAM)
    x, _ = data(model)
    y = model(x).detach()
    assert (y - net(single)(x)).abs().max() > 0.1

    def near(other: nn.Module) -> None:
        assert (other(x) - y).abs().max() < 2e-6

    lorary.save(model, tmp_path / "own")
    assert torch.equal(lorary.load(net(single), tmp_path / "own")(x), y)
    near(lorary.merge(copy.deepcopy(model)))
    if "mode" not in options:
        adapter = Adapter.of(model)
        assert {form.A.shape[0] for form in adapter.low_rank().values()} == {4 if options["start"] >= 0 else 2}
        export_peft(adapter, tmp_path / "peft")
        near(lorary.load(net(single), tmp_path / "peft"))


def test_an_interrupted_run_is_the_same_run(tmp_path: Path) -> None:
    for options in ({"start": 2}, {"start": -1}, {"start": 2, "mode": "paper"}):
        straight = train(started(dtype=torch.float32, **options), *ADAM)
        for stop in (2, 3, 5):
            model = started(dtype=torch.float32, **options)
            optimizer = torch.optim.AdamW(lorary.param_groups(model, 0.02))
            rules = lorary.rules(model, STEPS, optimizer)
            x, y = data(model)
            for step in range(STEPS):
                if step == stop:
                    lorary.save(model, tmp_path / "a")
                    state, moments = rules.state_dict(), optimizer.state_dict()
                    model = lorary.load(net(torch.float32), tmp_path / "a", trainable=True)
                    optimizer = torch.optim.AdamW(lorary.param_groups(model, 0.02))
                    optimizer.load_state_dict(moments)
                    rules = lorary.rules(model, STEPS, optimizer, state)
                optimizer.zero_grad()
                (model(x) - y).square().mean().backward()
                rules.after_backward()
                optimizer.step()
                rules.after_step()
            assert torch.equal(model(x), straight(x)), (options, stop)


@pytest.mark.parametrize("stop", [2, 3, 4, 5])
def test_a_run_of_an_older_version_keeps_its_snapshot(stop: int, tmp_path: Path) -> None:
    """It began to follow a step earlier. Resumed after it had begun, it is the run that it was."""
    old = started(dtype=torch.float32, start=2)  # after 3 steps, which was start=3
    straight = train(started(dtype=torch.float32, start=2), *ADAM)
    today = train(started(dtype=torch.float32, start=3), *ADAM)
    optimizer = torch.optim.AdamW(lorary.param_groups(old, 0.02), weight_decay=0.0)
    rules = lorary.rules(old, STEPS, optimizer)
    x, y = data(old)

    def go(model: nn.Module, rules: lorary.Rules, optimizer: Any, to: int) -> nn.Module:
        while rules.step < to:
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            rules.after_backward()
            optimizer.step()
            rules.after_step()
        return model

    go(old, rules, optimizer, stop)
    model = started(dtype=torch.float32, start=3)
    model.load_state_dict(old.state_dict())
    again = torch.optim.AdamW(lorary.param_groups(model, 0.02), weight_decay=0.0)
    again.load_state_dict(optimizer.state_dict())
    go(model, lorary.rules(model, STEPS, again, rules.state_dict()), again, STEPS)
    assert torch.equal(model(x), (straight if stop > 2 else today)(x))
    assert not torch.equal(straight(x), today(x))


# --- what does not go together ----------------------------------------------------------------------------------------


def refusal(*names: str, **options: Any) -> list[str]:
    with pytest.raises(MethodError) as error:
        lorary.method(*names, **options)
    return [problem.what for problem in error.value.problems]


@pytest.mark.parametrize("mode", ["closed", "paper"])
def test_refusals(mode: str) -> None:
    gradient = "Delta-LoRA takes the gradient of B A for that of W, and they differ"
    assert refusal("delta-lora", mode=mode, dropout=0.1) == [f"{gradient} with dropout: set dropout=0"]
    assert refusal("delta-lora", "dora", mode=mode) == [f"{gradient} under MagnitudeDirection"]
    mode_text = "is 'loop'; it takes closed or paper"
    assert refusal("delta-lora", mode="loop") == [mode_text]
    assert refusal("delta-lora", mode="loop", start=-2) == [mode_text, "is -2; it takes a whole number of at least -1"]
    for start in (-2, 2.5, True, "5", None):
        what = f"is {start!r}; it takes a whole number of at least -1"
        assert refusal("delta-lora", start=start, mode=mode) == [what]


def test_a_rule_and_a_delta_of_different_minds_are_refused() -> None:
    said = lorary.method("delta-lora", r=4).rules
    (what,) = refusal("lora", r=4, delta=DeltaLoRADelta(4, 3.0), rules=said)
    assert "goes with DeltaLoRADelta(r, ratio=2.0, late=True)" in what
    (what,) = refusal("lora", r=4, delta=DeltaLoRADelta(4, 2.0, late=False), rules=said)
    assert "late=True" in what
    assert lorary.method("lora", delta=DeltaLoRADelta(4, 2.0), rules=[DeltaLoRARule(2.0, 9)])


@pytest.mark.parametrize("mode", ["closed", "paper"])
def test_a_run_that_ends_before_it_begins_is_refused(mode: str) -> None:
    with pytest.raises(ConfigError) as error:
        lorary.rules(started(start=6, mode=mode), 7)
    assert str(error.value) == (
        "Delta-LoRA does not fit this run:\n"
        "  - rules: the weight would begin to follow after step 7, and the run has 7: it would be LoRA\n"
        "      hint: use a smaller start"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_written_by_nobody(dtype: torch.dtype) -> None:
    """Rounding would lose most of every small change; the closed form takes such a base as it is."""
    model = net(dtype)
    with pytest.raises(PlanError) as error:
        lorary.plan(model, lorary.method("delta-lora", mode="paper"), "0")
    name = str(dtype).removeprefix("torch.")
    assert str(error.value) == (
        "invalid plan:\n"
        f"  - 0.weight: is {name}, and DeltaLoRAPaperRule adds small changes to it: rounding would lose most of them\n"
        "      hint: load the base in float32"
    )
    assert lorary.plan(model, lorary.method("delta-lora"), "0").trainable == 16 * (6 + 8)


def test_a_weight_that_two_layers_hold_is_not_written() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(PlanError, match="is shared with another layer, and DeltaLoRAPaperRule writes it"):
        lorary.plan(model, lorary.method("delta-lora", mode="paper"), "0")
    assert lorary.plan(model, lorary.method("delta-lora"), "0")


def test_weights_that_turn_coarse_after_the_plan_are_not_written() -> None:
    """Planned in 32 bits, and then the base, or the model, is one of 16."""
    method = lorary.method("delta-lora", r=2, start=-1, mode="paper")
    plan = lorary.plan(tiny.llama(), method, ["q_proj"])
    with pytest.raises(PlanError, match=r"q_proj.weight: is bfloat16, and DeltaLoRAPaperRule adds small changes to it"):
        lorary.attach(tiny.llama().bfloat16(), plan)
    model = lorary.attach(tiny.llama(), plan).bfloat16()
    with pytest.raises(ConfigError, match=r"q_proj: is torch.bfloat16 by now: rounding would lose most"):
        lorary.rules(model, 5)
