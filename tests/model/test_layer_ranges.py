"""Regular expressions and layer ranges in a plan: the same layers as PEFT's, and every refusal in full."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import lorary
from lorary.errors import PlanError
from lorary.model.layer_ranges import normalised_layers
from lorary.model.scan import scan
from tests import tiny

METHOD = lorary.method("lora", r=2)


def llama(layers: int = 4) -> nn.Module:
    return tiny.llama(num_hidden_layers=layers)


def t5() -> nn.Module:
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=40, **sizes))


class Experts(nn.Module):
    """Two blocks of three experts, and a projection that is in no block."""

    def __init__(self) -> None:
        super().__init__()
        self.projector = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.layers = nn.ModuleList([nn.ModuleDict({"experts": self._experts()}) for _ in range(2)])

    @staticmethod
    def _experts() -> nn.ModuleList:
        return nn.ModuleList([nn.ModuleDict({"w1": nn.Linear(4, 4)}) for _ in range(3)])


def sites(model: nn.Module, targets: Any = "all-linear", **options: Any) -> list[str]:
    return [site.site.name for site in lorary.plan(model, METHOD, targets, **options).sites]


def refused(model: nn.Module, targets: Any = "all-linear", **options: Any) -> str:
    with pytest.raises(PlanError) as refusal:
        lorary.plan(model, METHOD, targets, **options)
    return str(refusal.value).removeprefix("invalid plan:\n")


# --- the same layers as PEFT's ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "expression", [r".*\.(q|v)_proj", r"model\.layers\.[0-2]\..*(up|down)_proj", ".*self_attn.*", r".*\.1\.mlp\.\w+"]
)
def test_an_expression_names_what_it_names_in_peft(expression: str) -> None:
    model = llama()
    config = LoraConfig(target_modules=expression)
    layers = scan(model).layers
    theirs = [path for path in layers if path and check_target_module_exists(config, path)]
    assert theirs
    assert sites(model, f"re:{expression}") == theirs
    assert sites(model, [f"re:{expression}"], exclude=f"re:{expression[:-1] or 'x'}NOTHING|.*k_proj") == [
        path for path in theirs if not path.endswith("k_proj")
    ]


@pytest.mark.parametrize("layers", [[0], [1, 3], 2])
def test_layers_are_those_of_layers_to_transform(layers: Any) -> None:
    for model in (llama(), Experts()):
        chosen = layers if not isinstance(model, Experts) else 1
        names = ["q_proj", "w1"]
        config = LoraConfig(target_modules=names, layers_to_transform=chosen)
        theirs = [path for path in scan(model).layers if check_target_module_exists(config, f"model.{path}")]
        assert theirs
        assert sites(model, "q_proj" if not isinstance(model, Experts) else "w1", layers=chosen) == theirs


def test_ranks_and_alphas_take_expressions() -> None:
    options: dict[str, Any] = {"ranks": {r"re:.*\.[01]\..*": 3, "q_proj": 5}, "alphas": {r"re:.*v_proj": 9.0}}
    plan = lorary.plan(llama(), METHOD, ["q_proj", "v_proj"], **options)
    found = {p.site.name.removeprefix("model.layers."): (p.r, p.alpha) for p in plan.sites}
    assert found["0.self_attn.q_proj"] == (3, 32.0)
    assert found["3.self_attn.q_proj"] == (5, 32.0)
    assert found["3.self_attn.v_proj"] == (2, 9.0)


# --- ranges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("0-1", [0, 1]), ("0,2-3", [0, 2, 3]), (-1, [3]), ("-2--1", [2, 3]), ([0, "2-3"], [0, 2, 3]), ("1--2", [1, 2])],
)
def test_ranges(layers: Any, expected: list[int]) -> None:
    assert sites(llama(), "q_proj", layers=layers) == [f"model.layers.{i}.self_attn.q_proj" for i in expected]


def test_the_first_number_that_counts_a_module_list_is_the_layer() -> None:
    assert sites(Experts(), "w1", layers=1) == [f"layers.1.experts.{i}.w1" for i in range(3)]
    assert sites(Experts(), "w1", layers={"experts": 1}) == ["layers.0.experts.1.w1", "layers.1.experts.1.w1"]
    plain = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    assert sites(plain, layers=-1) == ["2"]


def test_a_stack_is_named_where_there_are_several() -> None:
    assert sites(t5(), "q", layers={"decoder.block": "0,2"}) == [
        f"decoder.block.{i}.layer.{j}.{kind}.q"
        for i in (0, 2)
        for j, kind in ((0, "SelfAttention"), (1, "EncDecAttention"))
    ]
    both = sites(t5(), "SelfAttention.q", layers={"encoder.block": 0, "re:decoder.*": -1})
    assert both == ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.2.layer.0.SelfAttention.q"]


def test_what_is_in_no_stack_is_left_out_and_noted() -> None:
    plan = lorary.plan(Experts(), METHOD, layers=0)
    assert [p.site.name for p in plan.sites] == [f"layers.0.experts.{i}.w1" for i in range(3)]
    assert "`layers` leaves out projector.0: not in the stack that it counts in" in plan.notes


# --- refusals --------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (t5, {"layers": "0-1"}, """\
  - layers: `0-1` could count in any of 2 stacks: `encoder.block` (0 to 1), `decoder.block` (0 to 2)
      hint: name the stack, as in {encoder.block: 0-1}"""),
    (llama, {"layers": "2-4"}, """\
  - layers: `2-4` is not in `model.layers`, which has the layers 0 to 3"""),
    (llama, {"layers": -5}, """\
  - layers: `-5` is not in `model.layers`, which has the layers 0 to 3"""),
    (llama, {"layers": "3-1"}, """\
  - layers: holds `3-1`, which ends before it begins"""),
    (llama, {"layers": "first"}, """\
  - layers: holds `first`: write numbers and ranges, such as 0-15 or 0-3,8,-1"""),
    (llama, {"layers": []}, """\
  - layers: is []: write numbers and ranges, such as 0-15 or 0-3,8,-1"""),
    (llama, {"layers": [True]}, """\
  - layers: holds True: write numbers and ranges, such as 0-15 or 0-3,8,-1"""),
    (llama, {"layers": {"model.layer": "0"}}, """\
  - layers: `model.layer` is not a stack of layers with a target in it
      hint: did you mean `model.layers`?"""),
    (llama, {"targets": ["q_proj", "lm_head"], "layers": 0}, """\
  - layers: leaves nothing of `lm_head`: lm_head
      hint: leave one of the two out"""),
    (llama, {"targets": "re:(.*_proj"}, """\
  - targets: `re:(.*_proj`: not a regular expression: missing ), unterminated subpattern at position 0"""),
    (llama, {"exclude": ["re:[", "re:(?i)q"]}, """\
  - exclude: `re:[`: not a regular expression: unterminated character set at position 0
  - exclude: `re:(?i)q`: flags inside a pattern are not supported"""),
    (llama, {"targets": "re:(?:.|..|...)*[B!]"}, """\
  - targets: `re:(?:.|..|...)*[B!]`: takes too much time to match"""),
    (llama, {"ranks": {"re:.*qproj": 3}}, """\
  - ranks: `re:.*qproj` matches no adapted site
      hint: did you mean `q_proj` or `v_proj` or `o_proj`?"""),
    (llama, {"targets": r".*\.q_proj"}, """\
  - targets: `.*\\.q_proj` matches no layer
      hint: a regular expression begins with `re:`: 're:.*\\.q_proj'"""),
]  # fmt: skip


@pytest.mark.parametrize(("model", "options", "message"), REFUSED)
def test_refusals(model: Any, options: dict[str, Any], message: str) -> None:
    assert refused(model(), **options) == message


def test_layers_are_normalised_once() -> None:
    assert normalised_layers([0, 1, "4-7"]) == "0,1,4-7"
    assert normalised_layers({"h": -1}) == {"h": "-1"}
    with pytest.raises(ValueError, match="names no stack"):
        normalised_layers({})
