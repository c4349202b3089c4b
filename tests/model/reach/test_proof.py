"""What a plan says of layers that the model calls, reads past, or leaves out."""

from __future__ import annotations

import copy
import random
from collections import UserDict
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.errors import PlanError
from lorary.model.scan import scan
from lorary.model.targets import exclusions
from tests import tiny

from . import nets

X = torch.randn(3, 4)
NEVER = "reads its weight and never calls it: an adapter there would do nothing"
SOMETIMES = "also reads its weight without calling it: an adapter would act on some paths only"


def sites(plan: lorary.Plan) -> list[str]:
    return [p.site.name for p in plan.sites]


def refusal(model: nn.Module, targets: Any = "dead", **options: Any) -> list[str]:
    with pytest.raises(PlanError) as refused:
        lorary.plan(model, tiny.LORA, targets, **options)
    return [str(problem) for problem in refused.value.problems]


@pytest.mark.parametrize("example", [None, X])
def test_a_layer_that_is_never_called_is_refused_by_name_and_left_out_of_presets(example: Any) -> None:
    hint = "\n      hint: name layers that an adapter can reach"
    assert refusal(nets.Bypassed(), example=example) == [f"dead: Bypassed {NEVER}{hint}"]
    plan = lorary.plan(nets.Bypassed(), tiny.LORA, "all-linear", example=example)
    assert sites(plan) == ["live"]
    assert f"`all-linear` leaves out dead: Bypassed {NEVER}" in plan.notes


def test_a_helper_that_reads_the_weight_shows_in_a_dry_forward() -> None:
    assert sites(lorary.plan(nets.Hidden(), tiny.LORA)) == ["live", "dead"]  # not in the source
    (problem,) = refusal(nets.Hidden(), example=X)
    assert problem.startswith("dead: other code reads its weight and never calls it")
    assert sites(lorary.plan(nets.Hidden(), tiny.LORA, example=X)) == ["live"]


def test_an_example_that_forward_does_not_take_is_refused() -> None:
    with pytest.raises(PlanError, match="example: the model does not take it: TypeError"):
        lorary.plan(nets.Hidden(), tiny.LORA, "live", example={"nope": X})


@pytest.mark.parametrize("example", [None, X])
def test_a_kernel_that_is_missing_here_counts(example: Any) -> None:
    """Case 16: on a GPU the kernel is there, and bypasses more layers than the CPU shows."""
    (problem,) = refusal(nets.Kernel(), example=example)
    assert problem.startswith(f"dead: Kernel {SOMETIMES}")


def test_a_path_that_is_not_taken_is_refused_until_an_example_shows_it() -> None:
    (problem,) = refusal(nets.Conditional())
    assert problem.startswith(f"dead: Conditional {SOMETIMES}")
    plan = lorary.plan(nets.Conditional(), tiny.LORA, "dead", example=X)
    assert sites(plan) == ["dead"]
    assert (
        plan.notes[0]
        == "dead: Conditional reads the weight without calling the layer, on a path that no dry forward took"
    )
    (problem,) = refusal(nets.Conditional(), example={"x": X, "states": X})
    assert problem.startswith(f"dead: Conditional {NEVER}")


def test_settings_that_rule_a_path_out_are_read() -> None:
    assert sites(lorary.plan(nets.Switched(), tiny.LORA, "dead")) == ["dead"]
    (problem,) = refusal(nets.Switched(slices=2))
    assert SOMETIMES in problem


@pytest.mark.parametrize("net", [nets.Asked, nets.Direct])
@pytest.mark.parametrize("example", [None, X])
def test_what_only_looks_like_a_bypass(net: Any, example: Any) -> None:
    plan = lorary.plan(net(), tiny.LORA, example=example)
    assert sites(plan) == ["live", "dead"]
    assert not plan.notes
    assert plan.unproved == (() if example is not None else ("live", "dead"))


def test_a_module_that_holds_the_weight_as_its_own_may_read_it() -> None:
    plan = lorary.plan(nets.Tied(), tiny.LORA, ["embed", "live", "head"], example=torch.zeros(2, 3, dtype=torch.long))
    assert sites(plan) == ["embed", "live", "head"]
    assert plan.unproved == ()


def test_what_did_not_run_is_said_and_not_refused() -> None:
    plan = lorary.plan(nets.Experts(), tiny.LORA, example=(X,))
    assert sites(plan) == ["experts.0", "experts.1", "experts.2", "experts.3", "unused"]
    assert plan.notes == ("unused did not run in a dry forward: used by other inputs only, or by nothing",)
    assert set(plan.unproved) == {"experts.0", "experts.2", "experts.3", "unused"}


def test_a_preset_of_which_nothing_is_left_is_refused_with_the_reasons() -> None:
    class Only(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1d = nn.Conv1d(2, 2, 3)
            self.out = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv1d.weight.sum() + self.out(x)

    first, second = refusal(Only(), "conv")
    assert first == f"conv1d: Only {NEVER}"
    assert second.startswith("targets: `conv` names only layers that no adapter can reach")


def test_an_example_that_fails_leaves_it_to_the_first_forward() -> None:
    plan = lorary.plan(nets.Direct(), tiny.LORA, example=torch.randn(3, 5))
    assert plan.unproved == ("dead",)
    (note,) = plan.notes
    assert note.startswith("no dry forward is possible (RuntimeError: ")
    assert note.endswith("): the first training forward shows whether every site runs")


@pytest.mark.parametrize("example", [X, (X,), [X, None], {"x": X}, UserDict(x=X, states=None)])
def test_examples_of_every_form(example: Any) -> None:
    assert lorary.plan(nets.Conditional(), tiny.LORA, "dead", example=example).unproved == ()


@pytest.mark.parametrize("offload", [False, True])
def test_models_that_accelerate_has_spread_over_devices(offload: bool, tmp_path: Path) -> None:
    """Its hooks move inputs and weights, and a dry forward has neither."""
    model = tiny.llama()
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk" if offload else "cpu"}
    accelerate.dispatch_model(model, places, "cpu", offload_dir=tmp_path, force_hooks=True)
    assert lorary.plan(model, tiny.LORA).unproved == ()
    assert tiny.logits(model).isfinite().all()


def test_a_model_under_gradient_checkpointing() -> None:
    model = tiny.llama().train()
    model.activation_checkpointing_enable()
    model.enable_input_require_grads()
    assert lorary.plan(model, tiny.LORA).unproved == ()


def test_a_dry_forward_changes_nothing() -> None:
    model = nets.Odd().train()
    model.live.eval()
    model.live.weight.grad = torch.ones(4, 4)
    model.register_forward_hook(lambda *_: pytest.fail("the user's hooks are not for a dry forward"))
    before, state, attributes = tiny.everything(model), tiny.frozen_copy(model), copy.deepcopy(model.calls)
    numbers = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    plan = lorary.plan(model, tiny.LORA, example=X)
    assert plan.unproved == ()
    assert tiny.everything(model) == before
    assert tiny.same(model.state_dict(), state)
    assert (model.calls, model.cache) == (attributes, None)
    assert torch.equal(torch.get_rng_state(), numbers[0])
    assert random.getstate() == numbers[1]
    assert (np.random.get_state()[1] == numbers[2]).all()


@pytest.mark.parametrize("change", ["meta", "quantised", "inference", "half"])
def test_models_in_every_state(change: str) -> None:
    model = tiny.model("LlamaForCausalLM", "meta" if change == "meta" else "cpu")
    if change == "quantised":
        lorary.quantize(model)
    if change == "half":
        model = model.to(torch.bfloat16)
    with torch.inference_mode(change == "inference"):
        plan = lorary.plan(model, lorary.method("lora", r=2))
    assert plan.unproved == ()
    assert not any("dry forward" in note for note in plan.notes)


def test_a_method_without_adapters_needs_no_dry_forward() -> None:
    plan = lorary.plan(nets.Bypassed(), lorary.method("bitfit"), example=X)
    assert not any("leaves out" in note or "dry forward" in note for note in plan.notes)


def test_the_hint_leaves_out_these_layers_and_no_other() -> None:
    layers = [f"layers.{i}.{name}" for i in range(2) for name in ("mixer.conv1d", "attn.out", "mlp.out")]
    assert exclusions(["layers.0.mixer.conv1d", "layers.1.mixer.conv1d"], layers) == 'exclude=["conv1d"]'
    assert exclusions(["layers.0.attn.out", "layers.1.attn.out"], layers) == 'exclude=["attn.out"]'
    assert exclusions(["layers.1.attn.out"], layers) == 'exclude=["layers.1.attn.out"]'
    assert exclusions(["0", "1"], ["0", "1", "last"]) == 'exclude=["0", "1"]', "not `*`"


class OwnAttention(nn.MultiheadAttention):
    """An attention with a forward of its own, which lorary does not know."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return nn.functional.linear(x, self.out_proj.weight, self.out_proj.bias)


def test_a_scan_names_the_nearest_reader() -> None:
    found = scan(nn.ModuleDict({"inner": OwnAttention(8, 2)})).modules
    assert str(found["inner.out_proj"].bypass) == f"OwnAttention {NEVER}"
    assert "inner.in_proj_weight" not in found
    found = scan(nn.TransformerEncoderLayer(8, 2, 16)).modules
    assert found["self_attn.out_proj"].bypass is None, "neither reads it once an adapter is there"
    assert str(found["linear1"].bypass) == f"nn.TransformerEncoderLayer {SOMETIMES}"
    assert found["self_attn"].bypass is None


@pytest.mark.parametrize("where", ["", "live"])
def test_a_function_around_the_model_itself_does_not_run(where: str) -> None:
    """Deep copies share functions: the copy's forward would be the model's own, which would keep meta tensors."""
    model = nets.Counting()
    module = model.get_submodule(where)
    forward = module.forward

    def around(*args: Any, **kwargs: Any) -> Tensor:
        model.seen.append(args[0])
        y: Tensor = forward(*args, **kwargs)
        return y

    module.forward = around  # type: ignore[method-assign]
    plan = lorary.plan(model, tiny.LORA, example=X)
    assert model.seen == []
    assert plan.unproved == ("live",)
    name = "live.forward" if where else "forward"
    assert any(f"{name} is a function around the model itself" in note for note in plan.notes)


def test_models_that_differ_in_a_list_have_verdicts_of_their_own() -> None:
    assert sites(lorary.plan(nets.ByList([0]), tiny.LORA)) == ["layers.1"]
    assert sites(lorary.plan(nets.ByList([1]), tiny.LORA)) == ["layers.0"]
