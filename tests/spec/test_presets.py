"""Presets: papers' names for components, how they unite, and their options."""

from __future__ import annotations

from typing import Any

import pytest

import lorary
from lorary.errors import MethodError
from lorary.methods.lora import Add, AlphaOverRank, ConstantScale, Gaussian, Kaiming, LowRank
from lorary.methods.rslora import AlphaOverSqrtRank
from lorary.spec import presets
from lorary.spec.method import Method


def test_lora_is_the_default() -> None:
    expected = Method(LowRank(16), Kaiming(), AlphaOverRank(32.0), Add())
    assert lorary.method() == lorary.method("lora") == expected


@pytest.mark.parametrize(
    ("names", "components"),
    [
        (("rslora",), {"scale": AlphaOverSqrtRank(32.0)}),
        (("lora-fa",), {"frozen": {"A"}}),
        (("lora+",), {"lr": {"B": 16.0}}),
        (("lora+", "rslora"), {"lr": {"B": 16.0}, "scale": AlphaOverSqrtRank(32.0)}),
        (("lora", "lora-fa", "rslora"), {"frozen": {"A"}, "scale": AlphaOverSqrtRank(32.0)}),
        (("bitfit", "lora"), {"full": ("bias",)}),
    ],
)
def test_presets_unite(names: tuple[str, ...], components: dict[str, Any]) -> None:
    assert lorary.method(*names) == lorary.method("lora").replace(**components)
    assert lorary.method(*reversed(names)) == lorary.method(*names)


def test_presets_without_a_delta() -> None:
    assert lorary.method("bitfit") == Method(full=("bias",))
    assert lorary.method("full") == Method(full=("*",))
    assert lorary.method("full").trained == frozenset()


@pytest.mark.parametrize("alias", ["LoRA+", "lora_plus", "Lora Plus", "loraplus", "LORA+"])
def test_aliases_and_spelling(alias: str) -> None:
    assert lorary.method(alias) == lorary.method("lora+")


@pytest.mark.parametrize(
    ("alias", "name"), [("full fine-tuning", "full"), ("FFT", "full"), ("LoRA_FA", "lora-fa"), ("rsLoRA", "rslora")]
)
def test_more_aliases(alias: str, name: str) -> None:
    assert lorary.method(alias) == lorary.method(name)


@pytest.mark.parametrize("said", ["O-LoRA", " o-lora", "o_lora ", "o-lora\n"])
def test_o_lora_is_not_olora_whatever_stands_around_it(said: str) -> None:
    assert lorary.method(said) == lorary.method("o-lora") != lorary.method("olora")


def test_saying_a_preset_twice_changes_nothing() -> None:
    assert lorary.method("rslora", "rsLoRA", "lora", "lora") == lorary.method("rslora")


def test_options_reach_every_preset_that_has_them() -> None:
    method = lorary.method("lora+", "rslora", r=4, alpha=7, dropout=0.25, ratio=3)
    assert method == Method(LowRank(4), Kaiming(), AlphaOverSqrtRank(7), Add(), lr={"B": 3}, dropout=0.25)


def test_components_are_passed_like_options() -> None:
    assert lorary.method("lora", init=Gaussian()).init == Gaussian()
    assert lorary.method("lora", scale=ConstantScale(0.5)).scale == ConstantScale(0.5)
    assert lorary.method("bitfit", full=("norm",)).full == ("bias", "norm")


def test_every_preset_says_what_it_is() -> None:
    names = list(lorary.presets())
    assert names[:4] == ["lora", "rslora", "lora+", "lora-fa"]  # the order of the files that are read one by one
    assert {"dora", "pissa", "olora", "vera", "melora", "multilora"} < set(names)
    assert names[-2:] == ["bitfit", "full"]
    for name, known in lorary.presets().items():
        assert known.name == name
        assert known.summary
        assert known.citation
        assert known.lr > 0
    assert lorary.presets()["lora"].parameters == {"r": 16, "alpha": 32.0, "dropout": 0.0, "lora_bias": False}
    assert lorary.presets()["rslora"].parameters == {"alpha": 32.0}
    assert lorary.presets()["lora"].summary == "y = W x + b + (alpha / r) B A x"


@pytest.mark.parametrize("name", [*lorary.presets(), *presets.FUNCTIONS])
def test_every_file_begins_with_its_equation_and_cites_its_paper(name: str) -> None:
    """Line 1 is `Title: equation.`, a paragraph of meaning follows, then the citation with a part of the paper."""
    found = lorary.presets().get(name) or presets.FUNCTIONS[name]
    line, _, rest = found.about.partition("\n\n")
    assert line.startswith(f"{found.title}: ")
    assert "=" in line
    assert line.endswith(".")
    if found.year is not None:
        assert f"{found.citation}" in " ".join(rest.split())


def test_a_restriction_may_be_its_sentence_alone() -> None:
    note = lorary.presets()["melora"].restrictions["rslora"]
    assert note == presets.Restriction(note.why)
    assert note.advised
    assert lorary.presets()["o-lora"].restrictions["lora-fa"].options == {"hard": True}


def test_the_table_of_presets_is_a_copy() -> None:
    lorary.presets().clear()
    assert "lora" in lorary.presets()


def test_speakers_put_lora_first_where_anything_adapts() -> None:
    assert [p.name for p in presets.resolve_presets(["lora+", "rslora"])] == ["lora", "lora+", "rslora"]
    assert [p.name for p in presets.resolve_presets(["bitfit"])] == ["bitfit"]
    assert [p.name for p in presets.resolve_presets([])] == ["lora"]
    with pytest.raises(MethodError, match="did you mean `rslora`"):
        presets.resolve_presets(["rslorra"])


@pytest.mark.parametrize("name", ["lora", "LoRA", "lora_fa", "LoRA-drop"])
def test_a_preset_whose_name_finds_another_one_is_not_registered(name: str) -> None:
    with pytest.raises(TypeError, match=f"the preset {name} is already registered"):
        presets.preset(name, citation="nobody")(lambda: {})
    assert name not in lorary.presets() or name == "lora"


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("rank", "use `r`"),
        ("target", "it belongs to the plan: lorary.plan(model, method, targets=...)"),
        ("rank_pattern", "it belongs to the plan: lorary.plan(model, method, ranks=...)"),
        ("layers_to_transform", "it belongs to the plan: lorary.plan(model, method, layers=...)"),
        ("learning_rate", "it belongs to the optimizer: lorary.param_groups(model, lr=...)"),
        ("modules_to_save", 'use the axis `full`: full=("lm_head.weight",)'),
        ("init_lora_weights", 'name the preset: lorary.method("pissa", ...)'),
    ],
)
def test_words_of_peft_are_answered_with_their_place(option: str, hint: str) -> None:
    with pytest.raises(MethodError) as refusal:
        lorary.method("lora", **{option: 8})
    assert str(refusal.value) == f"invalid method:\n  - {option}: is not an option of lora\n      hint: {hint}"
