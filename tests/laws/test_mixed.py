"""Every law over models with two methods, each on a layer of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.adapters.peft.export import export_peft
from lorary.errors import MethodError
from lorary.layers.adapted import adapted_layers
from tests.train.runs import llama

from . import laws
from .cases import Case, Kind, made_of, seed


class TwoLayers(nn.Module):
    """Two layers of the same sizes, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.second = nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.layer(x))


SQUARE = Kind("two linear", lambda: nn.Linear(24, 24), lambda: torch.randn(3, 5, 24), 24, 24)


@dataclass(frozen=True)
class Mixed(Case):
    """A case with a second method on the second layer."""

    second: lorary.Method = field(default_factory=lambda: made_of("lora"))

    def base(self) -> Any:
        seed(1)
        return TwoLayers().to(self.dtype)

    @cached_property
    def plan(self) -> lorary.Plan:
        return lorary.plan(self.base(), {"layer": self.method, "second": self.second})


PAIRS: dict[str, tuple[lorary.Method, lorary.Method]] = {
    "lora and vera": (made_of("lora"), made_of("vera")),
    "vera and lora": (made_of("vera"), made_of("lora")),
    "adalora and dora": (made_of("adalora"), made_of("dora")),
    "dora and adalora": (made_of("dora"), made_of("adalora")),
    "pissa and lora-fa": (made_of("pissa"), made_of("lora-fa")),
    "lora+ and delta-lora": (made_of("lora+"), made_of("delta-lora")),
    "delta-lora, written, and lora": (made_of("delta-lora", mode="paper"), made_of("rslora")),
    "o-lora and olora": (made_of("o-lora"), made_of("olora")),
    "melora and multilora": (made_of("melora"), made_of("multilora")),
    "glora and lora": (made_of("glora"), made_of("lora")),
    "qlora and dora": (made_of("qlora"), made_of("dora", "qlora")),
}


def case_of(name: str, dtype: torch.dtype = torch.float32) -> Mixed:
    first, second = PAIRS[name]
    return Mixed(first, SQUARE, dtype, second)


@pytest.mark.parametrize("name", PAIRS)
def test_every_law_holds_of_two_methods(name: str, tmp_path: Path) -> None:
    laws.hold(case_of(name), tmp_path / "adapter")


@pytest.mark.parametrize("name", PAIRS)
def test_two_methods_come_back_from_a_file_and_from_a_merge(name: str, tmp_path: Path) -> None:
    case = case_of(name)
    model, x = case.finished, case.x()
    lorary.save(model, tmp_path / "adapter")
    adapter = lorary.load_adapter(tmp_path / "adapter")
    assert [s.method for s in adapter.sites] == [s.method for s in lorary.attached(model).sites]
    other = lorary.switch(case.base(), adapter)
    lorary.switch(other, None)
    assert not adapted_layers(other)
    lorary.switch(other, adapter)
    y = other(x)
    lorary.merge(other, keep=True)
    laws.close(other(x), y, case.dtype)
    lorary.unmerge(other)
    assert torch.equal(other(x), y)


def test_both_methods_are_those_of_a_model_that_has_one_of_them_alone() -> None:
    """The tensors at a site, its scale and its rates do not depend on the other method."""
    first, second = made_of("lora+"), made_of("vera")
    both = lorary.attach(llama(), lorary.plan(llama(), {"attention": first, "mlp": second}))
    for method, targets in ((first, "attention"), (second, "mlp")):
        alone = lorary.attach(llama(), lorary.plan(llama(), method, targets))
        for name, layer in adapted_layers(alone).items():
            mine = adapted_layers(both)[name]
            assert mine.method == layer.method
            assert all(torch.equal(t, mine.tensors[role]) for role, t in layer.tensors.items())
    groups = {group["name"]: len(group["params"]) for group in lorary.param_groups(both, lr=1.0)}
    assert groups == {"A b d": 8 + 2 * 6, "B x16": 8}


def test_a_rule_sees_the_layers_of_its_method_alone() -> None:
    methods = {"attention": made_of("adalora"), "mlp": made_of("delta-lora")}
    model = lorary.attach(llama(), lorary.plan(llama(), methods))
    optimizer = torch.optim.AdamW(lorary.param_groups(model, lr=1e-2))
    rules = lorary.rules(model, 6, optimizer)
    assert [{layer.site.name.split(".")[3] for layer in group} for group in rules.groups] == [
        {"self_attn"},
        {"self_attn"},
        {"mlp"},
    ]
    x = torch.arange(12)[None]
    for _ in range(6):
        (model(input_ids=x, labels=x).loss + rules.penalty()).backward()
        rules.after_backward()
        optimizer.step()
        rules.after_step()
        optimizer.zero_grad()
    report = rules.report()
    assert report["rank_budget"] == 2 * 8
    assert len(report["ranks"]) == 8
    followed = [layer for layer in adapted_layers(model).values() if "lam" in layer.params]
    assert len(followed) == 6
    assert all(bool(layer.params["lam"].any()) for layer in followed)
    again = lorary.attach(llama(), lorary.plan(llama(), methods))
    assert set(rules.state_dict()) == set(lorary.rules(again, 6, optimizer).state_dict())


@pytest.mark.parametrize("name", ["lora and vera", "adalora and dora", "pissa and lora-fa", "lora+ and delta-lora"])
def test_two_methods_are_one_plain_lora_for_peft(name: str, tmp_path: Path) -> None:
    """Exactly, where PEFT can hold both: a DoRA beside another method it has at all layers or at none."""
    first, second = PAIRS[name]
    model = lorary.attach(llama(), lorary.plan(llama(), {"attention": first, "mlp": second}))
    seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.02)
    x, adapter = torch.arange(12)[None], lorary.Adapter.of(model)
    if name == "adalora and dora":
        with pytest.raises((lorary.FileError, MethodError), match="some have DoRA's magnitudes and some not"):
            export_peft(adapter, tmp_path / "peft", model=llama())
        return
    export_peft(adapter, tmp_path / "peft", model=llama())
    theirs = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "peft")).eval()
    torch.testing.assert_close(theirs(x).logits, model.eval()(x).logits, rtol=1e-5, atol=1e-5)


def test_the_plan_shows_each_method_with_its_sites() -> None:
    text = str(lorary.plan(llama(), {"attention": made_of("lora"), "mlp": made_of("vera")}))
    lora, vera = text.index("LowRank"), text.index("SharedProjectionDelta")
    assert text.count("Method\n") == 2
    assert lora < text.index("q_proj") < vera < text.index("gate_proj")


REFUSED: list[tuple[dict[Any, Any], dict[str, Any], str]] = [
    ({"attention": "lora"}, {}, "method: for 'attention' is a str, not a Method"),
    ({}, {}, "method: is empty"),
    ({"mlp": made_of("lora")}, {"targets": "attention"}, "targets: several methods have their targets as keys"),
    ({"mlp": made_of("bitfit")}, {}, "for 'mlp' adapts no layers"),
    ({"q_proj": made_of("lora"), "attention": made_of("vera")}, {}, "LowRank (`q_proj`) and SharedProjectionDelta"),
    (
        {"attention": made_of("vera"), "mlp": made_of("vera", seed=3)},
        {},
        "all layers of a model share one set of projections, and two are asked for",
    ),
    (
        {"attention": made_of("qlora"), "mlp": made_of("delta-lora", mode="paper")},
        {},
        "method for 'mlp': ",
    ),
    ({"attention": made_of("lora"), "mpl": made_of("vera")}, {}, "mpl"),
    ({"attention": made_of("lora"), "mlp": made_of("vera")}, {"alphas": {"*.up_proj": 3}}, "alphas"),
    ({"attention": made_of("lora"), "mlp": made_of("vera")}, {"ranks": {"*.nothing": 3}}, "`*.nothing` matches no"),
]


@pytest.mark.parametrize(("methods", "options", "sentence"), REFUSED, ids=[s[:40] for _, _, s in REFUSED])
def test_methods_that_do_not_go_together_are_refused(
    methods: dict[Any, Any], options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(lorary.PlanError) as caught:
        lorary.plan(llama(), methods, **options)
    assert sentence in str(caught.value)


def test_what_is_the_models_own_comes_from_one_method() -> None:
    plan = lorary.plan(llama(), {"attention": made_of("qlora"), ("up_proj", "down_proj"): made_of("lora")})
    assert {p.method.storage for p in plan.sites} == {made_of("qlora").storage}
    assert len(plan.quantized) == 14
    norms = made_of("lora").replace(full=("norms",))
    plan = lorary.plan(llama(), {"attention": made_of("dora"), "mlp": norms})
    assert {p.method.full for p in plan.sites} == {("norms",)}
    assert any("layernorm" in f.name for f in plan.full)


def test_a_file_whose_sites_say_otherwise_of_the_model_is_refused(tmp_path: Path) -> None:
    model = lorary.attach(llama(), lorary.plan(llama(), {"attention": made_of("lora"), "mlp": made_of("vera")}))
    lorary.save(model, tmp_path)
    path = tmp_path / "lorary.json"
    text = path.read_text()
    at = text.index('"full": []', text.index('"sites"'))
    path.write_text(text[:at] + '"full": ["norms"]' + text[at + len('"full": []') :])
    with pytest.raises(lorary.FileError, match=r"its full is \('norms',\), and the adapter's \(\)"):
        lorary.load_adapter(tmp_path)
