"""param_groups and rules: every trained tensor in one group, and rules that meet any training loop."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.adapters.adapter import Adapter
from lorary.errors import ConfigError, StateError
from lorary.layers.adapted import adapted_layers
from lorary.spec import interfaces
from lorary.spec.interfaces import Layer, Rule
from tests import tiny


def attached(*names: str, targets: Any = "all-linear", model: Any = None, **options: Any) -> Any:
    model = model or tiny.seeded("LlamaForCausalLM")
    return lorary.attach(model, lorary.plan(model, lorary.method(*names, **options), targets))


def step(model: Any, optimizer: torch.optim.Optimizer, rules: lorary.Rules | None = None) -> float:
    """One step of a loop: forward, penalty, backward, rules, optimizer, rules."""
    loss = model(input_ids=tiny.ids(), labels=tiny.ids()).loss + (rules.penalty() if rules else 0.0)
    loss.backward()
    if rules:
        rules.after_backward()
    optimizer.step()
    if rules:
        rules.after_step()
    optimizer.zero_grad()
    return loss.item()


# --- groups -----------------------------------------------------------------------------------------------------------

SETTINGS: list[tuple[tuple[str, ...], dict[str, Any], Any, dict[str, tuple[float, float]]]] = [
    (("lora",), {}, "all-linear", {"A B decayed": (1, 0.1)}),
    (("lora-fa",), {}, "mlp", {"B decayed": (1, 0.1)}),
    (("lora+",), {"ratio": 4}, ["embedding", "q_proj"], {"A decayed": (1, 0.1), "B x4 decayed": (4, 0.1)}),
    (("lora",), {"lr": {"A": 0.5}}, "q_proj", {"A x0.5 decayed": (0.5, 0.1), "B decayed": (1, 0.1)}),
    (("lora",), {"full": "norm"}, "q_proj", {"A B decayed": (1, 0.1), "full": (1, 0.0)}),
    (
        ("lora+",),
        {"full": ("norm", "lm_head")},
        "q_proj",
        {"A full decayed": (1, 0.1), "B x16 decayed": (16, 0.1), "full": (1, 0.0)},
    ),
    (("full",), {}, "all-linear", {"full decayed": (1, 0.1), "full": (1, 0.0)}),
]


@pytest.mark.parametrize(("names", "options", "targets", "expected"), SETTINGS)
def test_groups_cover_what_trains_exactly(
    names: tuple[str, ...], options: dict[str, Any], targets: Any, expected: dict[str, tuple[float, float]]
) -> None:
    model = attached(*names, targets=targets, **options)
    rows = lorary.param_groups(model, lr=0.002, weight_decay=0.1)
    assert {row["name"]: (row["lr"] / 0.002, row["weight_decay"]) for row in rows} == expected
    grouped = [id(p) for row in rows for p in row["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}
    for row in rows:
        assert all((p.dim() > 1) == (row["weight_decay"] > 0) for p in row["params"])


@pytest.mark.parametrize(
    ("names", "options", "expected"),
    [
        (("adalora",), {"target": 2}, {"P Q decayed": 0.1, "E decayed": 0.1}),
        (("adalora", "lora+"), {"target": 2, "ratio": 4}, {"P x4 decayed": 0.1, "E decayed": 0.1, "Q decayed": 0.1}),
        (("glora",), {"A": "vector", "B": "scalar"}, {"Ad Bd E decayed": 0.1, "Cd Cu decayed": 0.1}),
        (("dora",), {}, {"A B decayed": 0.1, "m": 0.0}),
        (("vera",), {}, {"b d": 0.0}),
        (("multilora",), {}, {"A B decayed": 0.1, "gamma": 0.0}),
        (("lora",), {"full": "norm"}, {"A B decayed": 0.1, "full": 0.0}),
    ],
)
def test_vectors_decay_where_they_do_in_the_authors_code(
    names: tuple[str, ...], options: dict[str, Any], expected: dict[str, float]
) -> None:
    rows = lorary.param_groups(attached(*names, targets="q_proj", **options), lr=0.002, weight_decay=0.1)
    assert {row["name"]: row["weight_decay"] for row in rows} == expected


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_optimizers_take_them_as_they_are(make: Any) -> None:
    model = attached("lora+", full="norm")
    optimizer = make(lorary.param_groups(model, lr=0.01, weight_decay=0.1))
    before = tiny.frozen_copy(model)
    for _ in range(3):
        step(model, optimizer)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == trained


def test_without_decay_there_is_one_group_per_rate() -> None:
    model = attached("lora+", full=("norm", "lm_head"))
    assert [row["name"] for row in lorary.param_groups(model, lr=1e-3)] == ["A full", "B x16"]
    assert all(row["weight_decay"] == 0 for row in lorary.param_groups(model, lr=1e-3))


def test_groups_do_not_share_anything_with_the_next_call() -> None:
    model = attached("lora")
    one, other = lorary.param_groups(model, lr=1e-3), lorary.param_groups(model, lr=1e-3)
    one[0]["params"].clear()
    one[0]["lr"] = 5
    assert len(other[0]["params"]) == 28
    assert other[0]["lr"] == 1e-3


def test_a_stray_parameter_is_refused() -> None:
    model = attached("lora", targets="q_proj")
    model.lm_head.weight.requires_grad_(True)
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(StateError) as refusal:
        lorary.param_groups(model, lr=1e-3)
    assert str(refusal.value) == (
        "the parameter groups do not match the trainable parameters:\n"
        "  - model.norm.weight: requires a gradient, but no plan trains it\n"
        "      hint: freeze it, or name it in `full`\n"
        "  - lm_head.weight: requires a gradient, but no plan trains it\n"
        "      hint: freeze it, or name it in `full`"
    )


def test_what_was_frozen_by_hand_is_left_out() -> None:
    model = attached("lora", full="norm", targets="q_proj")
    layers = list(adapted_layers(model).values())
    layers[0].params["A"].requires_grad_(False)
    model.model.norm.weight.requires_grad_(False)
    (row,) = lorary.param_groups(model, lr=1e-3)
    assert len(row["params"]) == 3


def test_nothing_to_train() -> None:
    model = tiny.seeded("LlamaForCausalLM")
    lorary.switch(model, Adapter.of(attached("lora", full="norm")))
    with pytest.raises(StateError) as refusal:
        lorary.param_groups(model, lr=1e-3)
    assert str(refusal.value) == (
        "nothing to train:\n"
        "  - model: no parameter requires a gradient\n"
        "      hint: load the adapter with trainable=True"
    )


@pytest.mark.parametrize(
    ("lr", "decay", "message"),
    [
        (0, 0, "lr: 0 is not a positive finite number"),
        (-1e-3, 0, "lr: -0.001 is not a positive finite number"),
        (float("nan"), 0, "lr: nan is not a positive finite number"),
        (float("inf"), 0, "lr: inf is not a positive finite number"),
        (1e-3, -1, "weight_decay: -1 is not a finite number of at least 0"),
        (1e-3, float("nan"), "weight_decay: nan is not a finite number of at least 0"),
        (
            0,
            float("inf"),
            "lr: 0 is not a positive finite number\n  - weight_decay: inf is not a finite number of at least 0",
        ),
    ],
)
def test_settings_that_are_none(lr: float, decay: float, message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        lorary.param_groups(attached("lora", targets="q_proj"), lr=lr, weight_decay=decay)
    assert str(refusal.value) == f"invalid optimizer settings:\n  - {message}"


def test_a_decay_moves_factors_that_have_no_gradient_yet() -> None:
    """At step 0 the gradient of A is zero; decoupled decay moves A all the same, and no decay leaves it."""
    for decay, moves in ((0.0, False), (0.1, True)):
        model = attached("lora", targets="q_proj")
        A = next(iter(adapted_layers(model).values())).params["A"]
        before = A.clone()
        step(model, torch.optim.AdamW(lorary.param_groups(model, lr=0.01, weight_decay=decay)))
        assert torch.equal(A, before) is not moves


# --- rules ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pull(Rule):
    """A rule for tests: pulls B to `to`, scales gradients of B by `factor`, and counts what it saw.

    penalty: weight * sum (B - to)^2, the weight growing with the steps done.
    """

    to: float = 1.0
    factor: float = 0.5
    needs = frozenset({"B"})

    def start(self, layers: Sequence[Layer], steps: int) -> dict[str, Tensor]:
        return {"seen": torch.zeros(3, dtype=torch.int64), "weight": torch.tensor(1.0 / steps)}

    def penalty(self, layers: Sequence[Layer], state: dict[str, Tensor]) -> Tensor:
        state["seen"][0] += 1
        return state["weight"] * sum(((layer.params["B"] - self.to) ** 2).sum() for layer in layers)

    def after_backward(self, layers: Sequence[Layer], state: dict[str, Tensor], step: int) -> None:
        state["seen"][1] = step
        for layer in layers:
            layer.params["B"].grad.mul_(self.factor)

    def after_step(self, layers: Sequence[Layer], state: dict[str, Tensor], step: int, run: Any) -> None:
        state["seen"][2] = step
        assert all(layer.params["B"].grad is not None for layer in layers)
        state["weight"] *= 2
        for layer in layers:
            layer.params["B"].clamp_(max=0.9 * self.to)


@pytest.fixture
def _known() -> Iterator[None]:
    interfaces.component(Pull)
    yield
    del interfaces.COMPONENTS["Pull"]


pulled = pytest.mark.usefixtures("_known")


@pulled
def test_a_rule_at_work() -> None:
    model = attached("lora", rules=[Pull()], r=2, targets="q_proj")
    rules = lorary.rules(model, steps=10)
    layers = list(adapted_layers(model).values())
    numbers = sum(layer.params["B"].numel() for layer in layers)
    assert rules.penalty().item() == pytest.approx(numbers / 10)  # B = 0
    optimizer = torch.optim.SGD(lorary.param_groups(model, lr=1e-9))
    model(input_ids=tiny.ids(), labels=tiny.ids()).loss.backward()
    plain = [layer.params["B"].grad.clone() for layer in layers]
    for layer, grad in zip(layers, plain, strict=True):
        layer.params["B"].grad = grad.clone()
    rules.after_backward()
    for layer, grad in zip(layers, plain, strict=True):
        assert torch.equal(layer.params["B"].grad, grad / 2)
    optimizer.step()
    rules.after_step()
    assert rules.step == 1
    assert rules.states[0]["seen"].tolist() == [1, 1, 1]
    assert rules.states[0]["weight"].item() == pytest.approx(0.2)


@pulled
def test_a_rule_changes_where_training_goes() -> None:
    model = attached("lora", rules=[Pull(to=2.0)], r=2, targets="q_proj")
    rules, optimizer = lorary.rules(model, steps=1), torch.optim.SGD(lorary.param_groups(model, lr=0.2))
    for _ in range(8):
        step(model, optimizer, rules)
    for layer in adapted_layers(model).values():
        torch.testing.assert_close(layer.params["B"].detach(), torch.full((16, 2), 1.8))  # pulled to 2, held at 90 %


@pulled
def test_several_rules_add_up_and_keep_to_themselves() -> None:
    model = attached("lora", rules=[Pull(), Pull(to=3.0)], r=2, targets="q_proj")
    rules = lorary.rules(model, steps=10)
    assert rules.penalty().item() == pytest.approx(sum(p.numel() for p in _factors(model)) * (1 + 9) / 10)
    rules.states[0]["weight"].zero_()
    assert rules.penalty().item() == pytest.approx(sum(p.numel() for p in _factors(model)) * 9 / 10)


def _factors(model: nn.Module) -> list[Tensor]:
    return [layer.params["B"] for layer in adapted_layers(model).values()]


@pulled
def test_a_run_that_is_interrupted_goes_on_as_if_it_was_not() -> None:
    def start() -> tuple[Any, torch.optim.Optimizer, lorary.Rules]:
        model = attached("lora", "lora+", rules=[Pull(to=0.1)], r=2, targets="q_proj")
        return model, torch.optim.AdamW(lorary.param_groups(model, lr=0.01)), lorary.rules(model, steps=100)

    model, optimizer, rules = start()
    whole = [step(model, optimizer, rules) for _ in range(6)]
    model, optimizer, rules = start()
    first = [step(model, optimizer, rules) for _ in range(3)]
    kept = [tiny.frozen_copy(model), optimizer.state_dict(), {k: v.clone() for k, v in rules.state_dict().items()}]
    model, optimizer, rules = start()
    model.load_state_dict(kept[0])
    optimizer.load_state_dict(kept[1])
    rules.load_state_dict(kept[2])
    assert rules.step == 3
    assert first + [step(model, optimizer, rules) for _ in range(3)] == whole
    model, optimizer, rules = start()  # without the rules' state it is another run
    model.load_state_dict(kept[0])
    optimizer.load_state_dict(kept[1])
    assert first + [step(model, optimizer, rules) for _ in range(3)] != whole


@pulled
def test_a_run_that_goes_on_does_not_begin_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a rule does before the first step would be done twice."""
    begun: list[int] = []
    monkeypatch.setattr(Pull, "before_step", lambda self, layers, state, step: begun.append(step))
    model = attached("lora", rules=[Pull()], r=2, targets="q_proj")
    rules = lorary.rules(model, steps=10)
    lorary.rules(model, 10, state=rules.state_dict() | {"step": torch.tensor(4)})
    assert begun == [1, 5]


@pulled
def test_the_state_is_flat_tensors_and_not_shared_with_a_checkpoint() -> None:
    model = attached("lora", rules=[Pull(), Pull(to=3.0)], r=2, targets="q_proj")
    rules = lorary.rules(model, steps=10)
    flat = {key: value.clone() for key, value in rules.state_dict().items()}
    assert list(flat) == ["0.seen", "0.weight", "1.seen", "1.weight", "step"]
    other = lorary.rules(model, steps=10)
    other.load_state_dict(flat)
    other.states[0]["weight"].fill_(7)
    assert flat["0.weight"] != 7
    assert rules.states[0]["weight"] != 7


@pulled
@pytest.mark.parametrize(
    ("change", "keys"),
    [
        (lambda flat: flat.pop("1.seen"), ["1.seen"]),
        (lambda flat: flat.update({"2.seen": torch.ones(1)}), ["2.seen"]),
        (lambda flat: flat.update({"0.seen": torch.ones(2)}), ["0.seen"]),
        (lambda flat: (flat.pop("step"), flat.update({"0.weight": torch.ones(2)})), ["step", "0.weight"]),
    ],
)
def test_another_methods_state_is_refused(change: Any, keys: list[str]) -> None:
    model = attached("lora", rules=[Pull(), Pull(to=3.0)], r=2, targets="q_proj")
    rules = lorary.rules(model, steps=10)
    flat = {key: value.clone() for key, value in rules.state_dict().items()}
    change(flat)
    before = {key: value.clone() for key, value in rules.state_dict().items()}
    with pytest.raises(StateError) as refusal:
        rules.load_state_dict(flat)
    problems = "".join(f"\n  - {key}: is missing, unknown or of another shape" for key in keys)
    assert str(refusal.value) == f"the training state belongs to another method:{problems}"
    assert tiny.same(rules.state_dict(), before)


def test_without_rules_every_call_does_nothing() -> None:
    model = attached("lora", targets="q_proj")
    rules = lorary.rules(model, steps=10)
    before = tiny.frozen_copy(model)
    assert rules.penalty() == 0.0
    rules.after_backward()
    rules.after_step()
    assert tiny.same(tiny.frozen_copy(model), before)
    assert rules.state_dict() == {"step": torch.tensor(1)}
    rules.load_state_dict({"step": torch.tensor(5)})
    assert rules.step == 5


def test_base_parameters_alone_have_no_layers() -> None:
    rules = lorary.rules(attached("full"), steps=10)
    assert rules.layers == []
    assert rules.penalty() == 0.0


@pulled
def test_rules_are_written_and_read_with_the_method() -> None:
    method = lorary.method("lora", rules=[Pull(to=2.5)])
    assert lorary.Method.from_dict(method.to_dict()) == method
    assert "  rules    Pull(to=2.5, factor=0.5)" in str(method)


# --- what rules do to the optimizer -----------------------------------------------------------------------------------

MASKING = {"r": 4, "target": 2, "start": 2, "final": 3}


def masked(make: Any, *names: str, steps: int = 8, **options: Any) -> tuple[Any, Any, lorary.Rules]:
    """A model under AdaLoRA before its last step, after which the masked directions are removed."""
    model = attached("adalora", *names, **MASKING, **options)
    optimizer = make(lorary.param_groups(model, lr=0.01, weight_decay=0.1))
    rules = lorary.rules(model, steps, optimizer)
    for _ in range(steps - 1):
        step(model, optimizer, rules)
    assert all(layer.params["E"].numel() == 4 for layer in adapted_layers(model).values())
    return model, optimizer, rules


def test_the_optimizer_keeps_its_groups_and_their_order_when_tensors_shrink() -> None:
    model, optimizer, rules = masked(torch.optim.AdamW, "lora+", ratio=4, full=("norm", "lm_head"))
    names = {id(p): name for name, p in model.named_parameters()}
    before = [{**group, "params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups]
    objects = list(optimizer.param_groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 0.5**done)
    untouched = {name: p for name, p in model.named_parameters() if p.requires_grad and ".params." not in name}
    step(model, optimizer, rules)
    schedule.step()
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(now is was for now, was in zip(optimizer.param_groups, objects, strict=True))
    for group, was in zip(optimizer.param_groups, before, strict=True):
        assert [names[id(p)] for p in group["params"]] == was["params"]
        assert group["lr"] == was["lr"] / 2
        assert (group["name"], group["weight_decay"]) == (was["name"], was["weight_decay"])
    assert list(untouched) == ["model.norm.weight", "lm_head.weight"]
    assert all(dict(model.named_parameters())[name] is p for name, p in untouched.items())
    assert sum(layer.params["E"].numel() for layer in adapted_layers(model).values()) == 2 * len(adapted_layers(model))
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        assert p.requires_grad
        assert all(value.shape == p.shape for name, value in optimizer.state[p].items() if name != "step")
    whole = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert whole == sum(p.numel() for group in lorary.param_groups(model, 0.1) for p in group["params"])
    for _ in range(3):
        assert math.isfinite(step(model, optimizer, rules))


def test_sites_that_are_shrunk_say_so_to_whoever_takes_the_adapter() -> None:
    model, optimizer, rules = masked(torch.optim.AdamW)
    step(model, optimizer, rules)
    ranks = rules.report()["ranks"]
    adapter = Adapter.of(model)
    assert {p.site.name: p.delta.kept for p in adapter.sites if p.delta.kept is not None} == {
        name: rank for name, rank in ranks.items() if rank < 4
    }
    assert {name: roles["P"].shape[1] for name, roles in adapter.tensors.items()} == ranks


def test_where_the_optimizer_keeps_sums_over_rows_nothing_shrinks() -> None:
    """Adafactor's state has other shapes than the parameters, and cannot be cut: the masks do the work alone."""
    model, optimizer, rules = masked(torch.optim.Adafactor)
    step(model, optimizer, rules)
    assert all(layer.params["E"].numel() == 4 for layer in adapted_layers(model).values())
    alive = sum(int(layer.params["E"].count_nonzero()) for layer in adapted_layers(model).values())
    assert alive == rules.report()["rank_budget"] == 2 * len(adapted_layers(model))
    small = Adapter.of(model).compact()
    assert {p.site.name: p.delta.R for p in small.sites} == rules.report()["ranks"]


def test_where_several_ranks_may_hold_the_parameters_nothing_shrinks() -> None:
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, optimizer, rules = masked(torch.optim.AdamW)
        step(model, optimizer, rules)
    finally:
        dist.destroy_process_group()
    assert all(layer.params["E"].numel() == 4 for layer in adapted_layers(model).values())
    model, optimizer, rules = masked(torch.optim.AdamW)
    step(model, optimizer, rules)
    assert sum(layer.params["E"].numel() for layer in adapted_layers(model).values()) == 2 * len(adapted_layers(model))


@pytest.mark.parametrize("done", [2, 5, 7])
def test_a_run_goes_on_from_its_state(done: int, tmp_path: Path) -> None:
    """`rules(state=...)`, before the first mask, after the final choice, and later."""

    def begin() -> tuple[Any, Any, lorary.Rules]:
        model = attached("adalora", **MASKING)
        optimizer = torch.optim.AdamW(lorary.param_groups(model, lr=0.01))
        return model, optimizer, lorary.rules(model, 8, optimizer)

    model, optimizer, rules = begin()
    whole = [step(model, optimizer, rules) for _ in range(8)]
    model, optimizer, rules = begin()
    first = [step(model, optimizer, rules) for _ in range(done)]
    lorary.save(model, tmp_path)
    state = {name: t.clone() for name, t in rules.state_dict().items()}
    again = lorary.load(tiny.seeded("LlamaForCausalLM"), tmp_path, trainable=True)
    fresh = torch.optim.AdamW(lorary.param_groups(again, lr=0.01))
    fresh.load_state_dict(optimizer.state_dict())
    resumed = lorary.rules(again, 8, fresh, state)
    assert resumed.step == done
    assert first + [step(again, fresh, resumed) for _ in range(8 - done)] == whole


@pulled
def test_reports_of_all_rules_are_one() -> None:
    assert lorary.rules(attached("lora", targets="q_proj"), 5).report() == {}
    assert lorary.rules(attached("lora", rules=[Pull()], targets="q_proj"), 5).report() == {}
    report = lorary.rules(attached("adalora", **MASKING, targets="q_proj"), 8).report()
    sites = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    assert report == {"rank_budget": 8, "ranks": dict.fromkeys(sites, 4)}


@pytest.mark.parametrize("steps", [-1, 1.5, float("nan"), True, None, "5"])
def test_what_is_no_number_of_steps_is_refused(steps: Any) -> None:
    model = tiny.llama()
    lorary.attach(model, lorary.plan(model, lorary.method("o-lora", r=2)))
    with pytest.raises(ConfigError) as caught:
        lorary.rules(model, steps)
    assert str(caught.value) == f"invalid number of steps:\n  - steps: {steps!r} is not a number of optimizer steps"


@pytest.mark.parametrize("state", [5, {"step": 3}, {"step": torch.tensor(9)}, {"step": torch.tensor(2.5)}])
def test_a_state_that_no_run_of_these_steps_has_is_refused(state: Any) -> None:
    model = tiny.llama()
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2)))
    with pytest.raises(StateError, match=r"invalid training state|the training state belongs to another run"):
        lorary.rules(model, 8, state=state)
