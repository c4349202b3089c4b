"""attach, detach and disabled: what is done to a model, and the way back, bit for bit."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.adapters.adapter import Adapter
from lorary.errors import StateError
from lorary.layers.adapted import adapted_layers
from lorary.layers.quantized_weight import is_quantized
from lorary.model.state import state_of
from tests import tiny


def refused(action: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(StateError) as refusal:
        action(*arguments, **options)
    return str(refusal.value)


# --- attach and detach ------------------------------------------------------------------------------------------------


_BIASED = ("GPT2LMHeadModel", "BertForSequenceClassification", "MobileNetV2ForImageClassification")
CASES = [
    *[(name, ("lora",), dtype) for name in tiny.MODELS for dtype in (torch.float32, torch.bfloat16)],
    *[(name, ("lora-fa",), torch.float32) for name in tiny.MODELS],
    *[(name, ("full",), torch.bfloat16) for name in tiny.MODELS],
    *[(name, names, torch.float32) for name in _BIASED for names in (("bitfit",), ("lora", "bitfit"))],
]


@pytest.mark.parametrize(("name", "names", "dtype"), CASES)
def test_detach_gives_the_very_base_back(name: str, names: tuple[str, ...], dtype: torch.dtype) -> None:
    model = tiny.model(name).to(dtype).train()
    next(iter(model.parameters())).requires_grad_(False)  # flags are the user's, too
    next(m for m in model.modules() if isinstance(m, nn.Dropout | nn.Embedding | nn.Conv2d)).eval()
    before, values = tiny.everything(model), tiny.frozen_copy(model)
    targets = [t for t in tiny.MODELS[name] if names != ("lora-fa",) or t != "embedding"]  # A starts at zero there
    lorary.attach(model, lorary.plan(model, lorary.method(*names), targets))
    assert tiny.everything(model) != before
    tiny.shaken(model)
    assert not tiny.same(tiny.frozen_copy(model), values)
    assert lorary.detach(model) is model
    assert tiny.everything(model) == before
    assert tiny.same(tiny.frozen_copy(model), values)
    assert state_of(model) is None


def test_attach_freezes_everything_else() -> None:
    model = tiny.llama()
    plan = lorary.plan(model, lorary.method("lora-fa", r=2, full="norm"), "q_proj")
    lorary.attach(model, plan)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "model.layers.0.self_attn.q_proj.params.B",
        "model.layers.1.self_attn.q_proj.params.B",
        "model.norm.weight",
    }


def test_attach_returns_the_model_and_nothing_moves() -> None:
    model = tiny.llama()
    expected = tiny.logits(model)
    assert lorary.attach(model, lorary.plan(model, tiny.LORA)) is model
    assert torch.equal(tiny.logits(model), expected)


def test_the_start_depends_on_the_seed_and_the_sites_name_only() -> None:
    def start(seed: int, *targets: str) -> dict[str, Tensor]:
        model = tiny.llama()
        torch.manual_seed(len(targets))  # whatever else has been drawn
        lorary.attach(model, lorary.plan(model, tiny.LORA, list(targets)), seed=seed)
        return {name: layer.params["A"].detach() for name, layer in adapted_layers(model).items()}

    one, more, other = start(0, "q_proj"), start(0, "v_proj", "q_proj"), start(1, "q_proj")
    name = "model.layers.0.self_attn.q_proj"
    assert torch.equal(one[name], more[name])
    assert not torch.equal(one[name], other[name])
    assert not torch.equal(one[name], one[name.replace("0", "1")])


def test_attaching_draws_nothing_from_the_global_generator() -> None:
    model = tiny.llama()
    state = torch.get_rng_state()
    lorary.attach(model, lorary.plan(model, tiny.LORA))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_precision_of_what_is_learned(dtype: torch.dtype) -> None:
    model = tiny.trained(tiny.llama().to(torch.bfloat16), dtype=dtype)
    assert {p.dtype for layer in adapted_layers(model).values() for p in layer.params.values()} == {dtype}
    assert tiny.logits(model).dtype == torch.bfloat16


def test_attaching_twice() -> None:
    model = tiny.llama()
    plan = lorary.plan(model, tiny.LORA)
    lorary.attach(model, plan)
    before = tiny.everything(model)
    assert refused(lorary.attach, model, plan) == (
        "cannot attach:\n  - model: something is attached already\n      hint: detach it first, or use lorary.switch"
    )
    assert tiny.everything(model) == before


@pytest.mark.parametrize(
    ("action", "verb"),
    [
        (lorary.detach, "detach"),
        (lorary.merge, "merge"),
        (lambda model: lorary.disabled(model).__enter__(), "disable"),
        (lambda model: lorary.param_groups(model, lr=1e-3), "train"),
        (lambda model: lorary.rules(model, 3), "train"),
        (Adapter.of, "take from the model"),
    ],
)
def test_nothing_is_attached(action: Any, verb: str) -> None:
    assert refused(action, tiny.llama()) == (
        f"nothing to {verb}:\n  - model: no adapter is attached\n      hint: attach one first"
    )


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_the_models_before_and_after(training: bool) -> None:
    model = tiny.llama().train(training)
    lorary.attach(model, lorary.plan(model, lorary.method(dropout=0.5), "q_proj"))
    assert {m.training for m in model.modules()} == {training}
    model.train(not training)
    lorary.detach(model)
    assert {m.training for m in model.modules()} == {not training}


def test_a_gradient_of_another_value_does_not_stay() -> None:
    model = tiny.trained(tiny.model("BertForSequenceClassification"), lorary.method("bitfit"))
    model(input_ids=tiny.ids(), labels=torch.tensor([0, 1])).loss.backward()
    assert model.classifier.bias.grad is not None
    lorary.detach(model)
    assert all(p.grad is None for p in model.parameters())


# --- shared layers and copies ----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["a", "inner.0"])
def test_a_shared_layer_is_adapted_wherever_it_is_used(target: str) -> None:
    model, x = tiny.Twice(), torch.randn(2, 4)
    before = tiny.everything(model)
    tiny.trained(model, targets=target)
    assert model.a is model.inner[0]
    layer = adapted_layers(model)["a"]
    delta = layer(x) - layer.base(x)
    base = layer.base(x)
    torch.testing.assert_close(model(x), 11 * (base + delta) + 100 * base)
    lorary.detach(model)
    assert tiny.everything(model) == before


def test_a_copy_of_an_attached_model_is_one_of_its_own() -> None:
    model = tiny.trained(tiny.llama(tie_word_embeddings=True), lorary.method("lora", r=2, full="norm"))
    twin = copy.deepcopy(model)
    expected = tiny.logits(model)
    assert torch.equal(tiny.logits(twin), expected)
    lorary.detach(model)
    assert torch.equal(tiny.logits(twin), expected)
    lorary.detach(twin)
    assert torch.equal(tiny.logits(twin), tiny.logits(model))
    assert twin.lm_head.weight is twin.model.embed_tokens.weight is not model.lm_head.weight


def test_an_attached_model_can_be_pickled() -> None:
    model = tiny.trained(tiny.ConvNet(), targets=["conv", "all-linear"]).eval()
    x = torch.randn(2, 3, 8, 8)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(x), model(x))
    lorary.detach(again)
    assert not adapted_layers(again)


# --- methods that join, start or learn in another way -----------------------------------------------------------------

METHODS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "dora": (("dora",), {}),
    "dora, exact": (("dora",), {"exact": True}),
    "pissa": (("pissa",), {}),
    "pissa, fast": (("pissa", "lora-fa"), {"niter": 1}),
    "olora, dora": (("olora", "dora", "rslora"), {}),
    "vera": (("vera",), {}),
    "vera, dora": (("vera", "dora"), {}),
    "melora": (("melora",), {"n": 1}),
    "multilora": (("multilora",), {"n": 2}),
}
MOVING = ["pissa", "pissa, fast", "olora, dora"]


def method(name: str) -> lorary.Method:
    names, options = METHODS[name]
    return lorary.method(*names, r=1, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", tiny.MODELS)
@pytest.mark.parametrize("which", METHODS)
def test_detach_gives_the_very_base_back_whatever_the_method(which: str, name: str, dtype: torch.dtype) -> None:
    model = tiny.model(name).to(dtype).train()
    before, values = tiny.everything(model), tiny.frozen_copy(model)
    tied = getattr(model.config, "tie_word_embeddings", None)
    tiny.trained(model, method(which), tiny.MODELS[name])
    assert not tiny.same(tiny.frozen_copy(model), values)
    lorary.detach(model)
    assert tiny.everything(model) == before
    assert tiny.same(tiny.frozen_copy(model), values)
    assert getattr(model.config, "tie_word_embeddings", None) == tied


@pytest.mark.parametrize("which", METHODS)
def test_disabled_is_the_base_whatever_the_method(which: str) -> None:
    model = tiny.model("GPT2LMHeadModel")
    base = tiny.logits(model)
    tiny.trained(model, method(which), ["attention-qv", "mlp", "embedding", "lm_head"])
    tuned, values = tiny.logits(model), tiny.frozen_copy(model)
    assert not torch.allclose(tuned, base, rtol=1e-3)
    with lorary.disabled(model):
        assert torch.equal(tiny.logits(model), base)
        with lorary.disabled(model):
            assert torch.equal(tiny.logits(model), base)
        assert torch.equal(tiny.logits(model), base)
    assert torch.equal(tiny.logits(model), tuned)
    assert tiny.same(tiny.frozen_copy(model), values)


@pytest.mark.parametrize("which", METHODS)
def test_a_reference_between_a_policy_and_its_gradients(which: str) -> None:
    """Weights that were swapped meanwhile are back when the backward pass reads them."""
    model = tiny.trained(tiny.llama(), method(which))

    def gradients(disable: bool) -> dict[str, Tensor]:
        policy = model(input_ids=tiny.ids()).logits
        if disable:
            with torch.no_grad(), lorary.disabled(model):
                model(input_ids=tiny.ids())
        policy.square().mean().backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    expected, found = gradients(False), gradients(True)
    assert expected.keys() == found.keys() != set()
    assert all(torch.equal(expected[n], found[n]) for n in expected)


@pytest.mark.parametrize("which", METHODS)
def test_copies_and_pickles_whatever_the_method(which: str) -> None:
    model = tiny.llama(tie_word_embeddings=True)
    base = tiny.logits(model)
    tiny.trained(model, method(which), ["all-linear", "embedding"])
    expected = tiny.logits(model)
    twin, again = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    lorary.detach(model)
    assert torch.equal(tiny.logits(model), base)
    for other in (twin, again):
        assert torch.equal(tiny.logits(other), expected)
        lorary.detach(other)
        assert torch.equal(tiny.logits(other), base)
        assert other.lm_head.weight is other.model.embed_tokens.weight is not model.lm_head.weight


@pytest.mark.parametrize("which", MOVING)
def test_a_moved_base_changes_its_precision(which: str) -> None:
    """Detached, it has the pristine weights of the new precision, not what rounding has left of W - s B0 A0."""
    model = tiny.llama(tie_word_embeddings=True)
    plain = copy.deepcopy(model).to(torch.bfloat16)
    tiny.trained(model, method(which), ["all-linear", "embedding"])
    model.to(torch.bfloat16)
    assert tiny.logits(model).dtype == torch.bfloat16
    with lorary.disabled(model):
        assert torch.equal(tiny.logits(model), tiny.logits(plain))
    lorary.detach(model)
    assert tiny.same(tiny.frozen_copy(model), tiny.frozen_copy(plain))


TABLES: list[Any] = ["embedding", "lm_head", ["embedding", "lm_head"], ["lm_head", "embedding"]]


@pytest.mark.parametrize("targets", TABLES, ids=str)
@pytest.mark.parametrize("which", MOVING)
def test_tied_tables_that_give_up_a_part(which: str, targets: Any) -> None:
    """Each gives up its own part of one weight; disabled and detached they share the very weight again."""
    model = tiny.llama(tie_word_embeddings=True)
    base, before, values = tiny.logits(model), tiny.everything(model), tiny.frozen_copy(model)
    lorary.attach(model, lorary.plan(model, method(which), targets))
    torch.testing.assert_close(tiny.logits(model), base, rtol=1e-4, atol=1e-5)
    tiny.shaken(model)
    tuned = tiny.logits(model)
    with lorary.disabled(model):
        assert torch.equal(tiny.logits(model), base)
    assert torch.equal(tiny.logits(model), tuned)
    model.tie_weights()  # as libraries do that place or load a model: nothing may be tied over a part given up
    assert torch.equal(tiny.logits(model), tuned)
    lorary.detach(model)
    assert tiny.everything(model) == before
    assert tiny.same(tiny.frozen_copy(model), values)
    assert model.config.tie_word_embeddings
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_attach_that_fails_half_way_gives_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llama(tie_word_embeddings=True)
    before, values = tiny.everything(model), tiny.frozen_copy(model)
    plan = lorary.plan(model, lorary.method("pissa", "dora", r=2), ["embedding", "all-linear", "lm_head"])
    initialise = lorary.Adapted.initialise

    def fails(layer: lorary.Adapted, seed: int) -> None:
        if layer.site.name.endswith("layers.1.mlp.up_proj"):
            raise KeyboardInterrupt
        initialise(layer, seed)

    monkeypatch.setattr(lorary.Adapted, "initialise", fails)
    with pytest.raises(KeyboardInterrupt):
        lorary.attach(model, plan)
    assert tiny.everything(model) == before
    assert tiny.same(tiny.frozen_copy(model), values)
    assert model.config.tie_word_embeddings


def test_on_the_meta_device_nothing_is_decomposed() -> None:
    for which in METHODS:
        model = tiny.model("LlamaForCausalLM", device="meta")
        lorary.attach(model, lorary.plan(model, method(which)))
        assert model(input_ids=tiny.ids().to("meta")).logits.is_meta
        lorary.detach(model)
        assert not adapted_layers(model)


# --- disabled ---------------------------------------------------------------------------------------------------------


def test_disabled_is_the_base() -> None:
    model = tiny.model("BertForSequenceClassification")
    base = tiny.logits(model)
    tiny.trained(model, lorary.method("lora", "bitfit", r=2))
    tuned = tiny.logits(model)
    assert not torch.equal(tuned, base)
    with lorary.disabled(model) as same:
        assert same is model
        assert torch.equal(tiny.logits(model), base)
        with lorary.disabled(model):
            assert torch.equal(tiny.logits(model), base)
        assert torch.equal(tiny.logits(model), base)
    assert torch.equal(tiny.logits(model), tuned)


def test_an_exception_ends_it() -> None:
    model = tiny.trained(tiny.model("BertForSequenceClassification"), lorary.method("lora", "bitfit", r=2))
    tuned = tiny.logits(model)
    with pytest.raises(ZeroDivisionError), lorary.disabled(model), lorary.disabled(model):
        raise ZeroDivisionError
    assert torch.equal(tiny.logits(model), tuned)
    lorary.detach(model)


def test_disabled_touches_no_parameter() -> None:
    model = tiny.trained(tiny.model("BertForSequenceClassification"), lorary.method("lora", "bitfit", r=2))
    before = tiny.everything(model)
    values = tiny.frozen_copy(model)
    optimizer = torch.optim.SGD(lorary.param_groups(model, lr=0.1))
    with lorary.disabled(model):
        tiny.logits(model)
    assert tiny.everything(model) == before
    assert tiny.same(tiny.frozen_copy(model), values)
    model(input_ids=tiny.ids(), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    assert not tiny.same(tiny.frozen_copy(model), values)


def test_a_reference_and_a_policy_in_one_step() -> None:
    """What preference tuning does: the base's answers without gradients between those of the adapter with them."""
    model = tiny.trained(tiny.llama())
    policy = model(input_ids=tiny.ids()).logits
    with torch.no_grad(), lorary.disabled(model):
        reference = model(input_ids=tiny.ids()).logits
    (policy - reference).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("action", "verb"),
    [
        (lorary.detach, "detach"),
        (lorary.merge, "merge"),
        (Adapter.of, "take from the model"),
        (lambda model: lorary.param_groups(model, lr=1e-3), "train"),
        (lambda model: lorary.switch(model, None), "switch"),
    ],
)
def test_nothing_is_taken_or_changed_meanwhile(action: Any, verb: str) -> None:
    model = tiny.trained(tiny.model("BertForSequenceClassification"), lorary.method("lora", "bitfit", r=2))
    tuned = tiny.logits(model)
    with lorary.disabled(model):
        assert refused(action, model) == (
            f"cannot {verb}:\n"
            "  - model: the adapter is disabled, and the model has the base's values\n"
            "      hint: leave the `disabled` block first"
        )
    assert torch.equal(tiny.logits(model), tuned)


@pytest.mark.parametrize(("name", "share"), [("vera", ""), ("lora", "linear")])
def test_what_layers_share_lies_on_one_device(name: str, share: str) -> None:
    """The bank of all layers, or the tensors that some of them train in common."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))
    plan = lorary.plan(model, lorary.method(name, r=2))
    plan = dataclasses.replace(plan, sites=tuple(dataclasses.replace(p, share=share) for p in plan.sites))
    with pytest.raises(lorary.errors.PlanError) as refused:
        lorary.attach(model, plan)
    assert str(refused.value) == (
        "the plan does not fit this model:\n"
        "  - model: its layers lie on cpu, meta, and share tensors of one device\n"
        "      hint: adapt the layers of one device, or use another method"
    )
    assert state_of(model) is None


def test_layers_that_share_tensors_are_all_quantised() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    plan = lorary.plan(model, lorary.method("qlora", r=2))
    plan = dataclasses.replace(plan, sites=tuple(dataclasses.replace(p, share="linear") for p in plan.sites))
    lorary.attach(model, plan)
    layers = adapted_layers(model)
    assert {*plan.quantized} == {"0", "1", "2"} == layers.keys()
    assert all(is_quantized(layer.base) for layer in layers.values())
    assert len({id(layer.params) for layer in layers.values()}) == 1
