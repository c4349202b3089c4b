"""One adapter from several: a sum is the dense sum, one-hot weights give the adapter back, and errors are told."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from random import Random
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import lorary
from lorary.adapters.content_hash import content_hash
from lorary.adapters.provenance import Parent
from lorary.errors import MethodError
from lorary.layers.adapted import adapted_layers
from tests import tiny
from tests.adapters import models
from tests.adapters.compose.models import PLAIN, X, adapter, base, changes, near, output, products, trained
from tests.laws.cases import made_of

FIVE = ["lora", "vera", "melora", "pissa", "rslora"]


def weighted(values: list[lorary.Adapter], weights: list[float]) -> dict[str, Tensor]:
    """site -> the dense weighted sum of the changes, in 64 bits."""
    total: dict[str, Tensor] = {}
    for value, w in zip(values, weights, strict=True):
        for name, change in changes(value).items():
            total[name] = total.get(name, torch.zeros_like(change)) + w * change
    return total


def drawn(number: int) -> tuple[list[str], list[float]]:
    """Two to five adapters of any methods, and weights of either sign."""
    random = Random(number)
    count = random.randint(2, 5)
    return random.sample(list(PLAIN), count), [random.choice((-1, 1)) * random.uniform(0.1, 2) for _ in range(count)]


@pytest.mark.parametrize("number", range(24))
def test_a_mix_is_the_dense_weighted_sum(number: int) -> None:
    """Whatever the methods, the ranks, the layers and the signs."""
    names, weights = drawn(number)
    values = [adapter(name) for name in names]
    mixed, expected = lorary.mix(values, weights), weighted(values, weights)
    found = products(mixed)
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        near(found[name], change)


def test_five_methods_as_the_issue_names_them() -> None:
    values, weights = [adapter(name) for name in FIVE], [0.7, -0.4, 1.3, -0.2, 0.5]
    mixed, expected = lorary.mix(values, weights), weighted(values, weights)
    for name, product in products(mixed).items():
        near(product, expected[name])
    dense = base()
    layers = {name: dense.get_submodule(name) for name in expected}
    with torch.no_grad():
        for name, layer in layers.items():
            change = expected[name].float()
            shown: Any = layer.weight
            turned = change.T if type(layer).__name__ in ("Conv1D", "Embedding") else change
            shown += turned.reshape(shown.shape)
    model = lorary.switch(base(), mixed)
    torch.testing.assert_close(output(model), output(dense), rtol=1e-4, atol=1e-4)
    assert mixed.notes == ()
    assert {s.method.scale.s for s in mixed.sites} == {1.0}  # type: ignore[union-attr]


@pytest.mark.parametrize("name", [*PLAIN, "dora", "glora"])
@pytest.mark.parametrize("how", ["sum", "slerp"])
def test_one_hot_weights_give_the_adapter_back_bit_for_bit(name: str, how: str) -> None:
    targets = ("plain", "conv1")
    value = adapter(name) if name in PLAIN else trained(made_of(name), targets)
    mixed = lorary.mix([adapter("lora of rank 5"), value], [0, 1], how=how)
    models.same(mixed, value)
    assert content_hash(mixed) == content_hash(value)


@pytest.mark.parametrize("at", models.BASES, ids=str)
def test_a_mix_is_saved_read_merged_and_read_by_peft(at: models.Base, tmp_path: Path) -> None:
    names = ("lora", "rslora", "pissa", "multilora") if at.name == "ConvNet" else FIVE
    special = (*at.targets, at.embedding)

    def value(name: str) -> lorary.Adapter:
        targets = at.targets if name in ("vera", "melora") else special
        return trained(made_of(name, r=2), targets, model=at.model())

    values, weights = [value(name) for name in names], [0.5, -0.3, 0.8, 0.1, -0.6][: len(names)]
    mixed = lorary.mix(values, weights)
    dense = at.model()
    for one, w in zip(values, weights, strict=True):
        for name, change in changes(one, at.model()).items():
            layer: Any = dense.get_submodule(name)
            turned = type(layer).__name__ in ("Conv1D", "Embedding")
            added = w * (change.T if turned else change).reshape(layer.weight.shape).float()
            layer.weight = torch.nn.Parameter(layer.weight.detach() + added)  # not that of a tied head
    y = models.outputs(dense)
    assert not torch.allclose(y, models.outputs(at.model()), atol=1e-2)
    lorary.save_adapter(mixed, tmp_path / "mix")
    again = lorary.load_adapter(tmp_path / "mix")
    models.same(again, mixed)
    assert again.provenance == mixed.provenance
    for found in (
        models.outputs(lorary.switch(at.model(), again)),
        models.by_peft(at, tmp_path / "mix"),
        models.outputs(lorary.merge(lorary.switch(at.model(), mixed))),
    ):
        torch.testing.assert_close(found, y, rtol=0, atol=1e-5 * y.abs().max().item())


def test_the_provenance_names_the_parents() -> None:
    code, chat = adapter("lora"), adapter("vera")
    mixed = lorary.mix({"/data/code": code, "me/chat": chat}, [0.7, -0.3])
    assert mixed.provenance is not None
    assert mixed.provenance.how == "sum"
    assert mixed.provenance.parents == (
        Parent("code", content_hash(code), 0.7),
        Parent("me/chat", content_hash(chat), -0.3),
    )
    assert mixed.provenance.settings == {}


def test_an_adapter_of_weight_zero_adds_no_rank() -> None:
    mixed = lorary.mix([adapter("lora"), adapter("vera"), adapter("rslora")], [1, 0, 1])
    assert {s.r for s in mixed.sites} == {3 + 2, 2 * (3 + 2)}  # q and v are adapted as one


def test_two_equal_tasks_cancel_and_a_third_remains() -> None:
    """Forgetting: the subtracted adapter's update is gone."""
    a, b = adapter("lora"), adapter("lora", number=5)
    both = lorary.mix([a, b])
    left = products(lorary.mix([both, b], [1, -1]))
    for name, change in changes(a).items():
        near(left[name], change, 1e-5)


# --- at a lower rank --------------------------------------------------------------------------------------------------


def test_a_mix_of_lower_rank_is_the_best_approximation_and_tells_its_error() -> None:
    values, weights = [adapter(name) for name in FIVE], [0.7, -0.4, 1.3, -0.2, 0.5]
    mixed, expected = lorary.mix(values, weights, rank=4), weighted(values, weights)
    told: Any = mixed.provenance.settings  # type: ignore[union-attr]
    lost, norms = 0.0, 0.0
    for name, product in products(mixed).items():
        S = torch.linalg.svdvals(expected[name])
        best = float(S[4:].norm())
        assert abs(float((product - expected[name]).norm()) - best) < 1e-5 * float(S.norm())
        assert told["errors"][name] == pytest.approx(best / float(S.norm()), rel=1e-4, abs=1e-9)
        lost, norms = lost + best**2, norms + float(S.norm()) ** 2
    assert told["error"] == pytest.approx((lost / norms) ** 0.5, rel=1e-4)
    assert told["rank"] == 4
    (note,) = mixed.notes
    assert f"off by {told['error']:.2%}" in note
    assert {s.r for s in mixed.sites} <= {1, 2, 3, 4}


def test_an_energy_keeps_that_share_at_every_layer() -> None:
    values = [adapter("lora"), adapter("pissa")]
    mixed, expected = lorary.mix(values, energy=0.9), weighted(values, [1, 1])
    for s in mixed.sites:
        S = torch.linalg.svdvals(expected[s.site.name]).square()
        share = S.cumsum(0) / S.sum()
        assert share[s.r - 1] >= 0.9 - 1e-9
        assert s.r == 1 or share[s.r - 2] < 0.9


def test_a_rank_that_suffices_changes_nothing() -> None:
    values = [adapter("lora"), adapter("rslora")]
    mixed, plain = lorary.mix(values, rank=64), lorary.mix(values)
    assert mixed.tensors.keys() == plain.tensors.keys()
    assert all(torch.equal(t, plain.tensors[n][k]) for n, roles in mixed.tensors.items() for k, t in roles.items())
    assert "error" not in mixed.provenance.settings  # type: ignore[union-attr]


# --- methods with a gain ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("dora",), ("dora", "pissa"), ("glora",)], ids="+".join)
def test_what_has_a_gain_is_refused_and_approximated_with_the_error_told(names: tuple[str, ...]) -> None:
    targets = ("plain", "conv1") if names == ("glora",) else ("plain", "c_attn", "conv1")
    value, plain = trained(made_of(*names), targets), adapter("lora")
    with pytest.raises(MethodError, match="a gain or a shift of its own") as refusal:
        lorary.mix([plain, value], [0.5, 0.5], base=base())
    assert "approximate=True" in str(refusal.value)
    weights, expected = [0.6, -0.7], weighted([plain, value], [0.6, -0.7])
    mixed = lorary.mix([plain, value], weights, base=base(), approximate=True, rank=3)
    told: Any = mixed.provenance.settings  # type: ignore[union-attr]
    for name in changes(value):
        measured = float((products(mixed)[name] - expected[name]).norm() / expected[name].norm())
        assert told["errors"][name] == pytest.approx(measured, rel=1e-3)
        S = torch.linalg.svdvals(expected[name])
        assert measured == pytest.approx(float(S[3:].norm() / S.norm()), rel=1e-3)
    assert told["approximate"] is True
    assert told["errors"]["embed"] < 1e-6  # rank 3 of a LoRA of rank 3: that layer is exact
    whole = lorary.mix([plain, value], weights, base=base(), approximate=True, rank=64)
    for name, product in products(whole).items():
        near(product, expected[name], 1e-5)


def test_on_a_quantised_base_it_is_the_quantised_weight_that_has_a_gain() -> None:
    value = trained(made_of("qlora", "dora"), ("plain",))
    quantised = lorary.quantize(base(), value.method.storage)
    mixed = lorary.mix([value], [0.5], base=quantised, approximate=True, rank=24)
    layer = adapted_layers(lorary.switch(base(), value))["plain"]
    near(products(mixed)["plain"], 0.5 * (layer.merged()[0] - layer.matrix).double(), 1e-5)


def test_a_shift_goes_into_the_bias() -> None:
    """GLoRA's C, D and E: the layer's bias is part of the adapter then."""
    value = trained(made_of("glora"), ("plain", "conv1"))
    mixed = lorary.mix([value], [1.0], base=base(), approximate=True, rank=64)
    expected = output(lorary.switch(base(), value))
    torch.testing.assert_close(output(lorary.switch(base(), mixed)), expected, rtol=1e-3, atol=1e-3)
    assert mixed.full.keys() == {"plain.bias", "conv1.bias"}


def test_a_shift_without_a_bias_is_refused() -> None:
    model = tiny.seeded("LlamaForCausalLM")
    value = trained(made_of("glora"), ("q_proj",), model=model)
    with pytest.raises(MethodError, match="the layer has no bias to hold the shift"):
        lorary.mix([value], [0.5], base=tiny.seeded("LlamaForCausalLM"), approximate=True)


# --- parameters trained in full ---------------------------------------------------------------------------------------


def test_parameters_trained_in_full_are_mixed_as_changes() -> None:
    def value(names: tuple[str, ...], number: int) -> lorary.Adapter:
        method = made_of(*names).replace(full=("embed.weight",)) if names == ("lora",) else made_of(*names)
        return trained(method, ("plain", "conv1"), number)

    def bits(number: int) -> lorary.Adapter:
        return trained(lorary.method("bitfit"), None, number)

    values, weights = [value(("lora",), 3), bits(4), bits(5)], [0.5, -1.0, 0.25]
    mixed = lorary.mix(values, weights, base=base())
    before = dict(base().named_parameters())
    for name, found in mixed.full.items():
        expected = before[name] + sum(
            w * (a.full[name] - before[name]) for a, w in zip(values, weights, strict=True) if name in a.full
        )
        torch.testing.assert_close(found, expected)
    assert {"embed.weight", "plain.bias"} <= mixed.full.keys()
    assert {s.site.name for s in mixed.sites} == {"plain", "conv1"}
    y = output(lorary.switch(base(), mixed))
    attached = lorary.switch(base(), values[1])  # the base's values are known although an adapter is on it
    torch.testing.assert_close(lorary.mix(values, weights, base=attached).full["plain.bias"], mixed.full["plain.bias"])
    assert torch.isfinite(y).all()


def test_classifiers_are_mixed_with_their_heads_and_load_onto_a_base_with_any_head() -> None:
    def classifier(number: int) -> Any:
        """The same base with a head drawn anew, as Transformers loads it."""
        model = tiny.seeded("BertForSequenceClassification")
        torch.nn.init.normal_(model.classifier.weight, generator=torch.Generator().manual_seed(number))
        return model

    one, other = (trained(made_of("lora"), ("attention",), number, classifier(number)) for number in (1, 2))
    mixed = lorary.mix([one, other], [0.25, 0.75], base=classifier(3))
    head = 0.25 * one.full["classifier.weight"] + 0.75 * other.full["classifier.weight"]
    torch.testing.assert_close(mixed.full["classifier.weight"], head)
    model = lorary.switch(classifier(4), mixed)
    torch.testing.assert_close(model.classifier.weight, head)


def test_the_counter_of_a_batch_norm_can_be_mixed(tmp_path: Path) -> None:
    def net() -> torch.nn.Module:
        torch.manual_seed(0)
        return tiny.ConvNet()

    def value(number: int) -> lorary.Adapter:
        model = net()
        method = lorary.method("lora", r=2).replace(full=("norm",))
        lorary.attach(model, lorary.plan(model, method, ["stem"]))
        tiny.shaken(model, seed=number)
        model.train()(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(number)))
        return lorary.Adapter.of(model)

    mixed = lorary.mix([value(1), value(2)], [0.5, 0.5], base=net())
    lorary.save_adapter(mixed, tmp_path / "mix")
    assert lorary.load_adapter(tmp_path / "mix").full["norm.num_batches_tracked"] == 1


def test_a_weight_that_was_written_and_one_that_was_trained_in_full_are_mixed_with_their_updates() -> None:
    """Delta-LoRA as its paper has it changes the base's weight beside its factors."""
    written = trained(made_of("delta-lora", mode="paper"), ("plain",))
    full = trained(lorary.method("full").replace(full=("plain.weight", "conv2.weight")), None)
    values, weights = [written, adapter("lora"), full], [0.5, -0.25, 0.75]
    mixed = lorary.mix(values, weights, base=base())
    expected = weighted(values[:2], weights[:2])
    before = dict(base().named_parameters())
    for name in ("plain", "conv2"):
        moved = full.full[f"{name}.weight"] - before[f"{name}.weight"].detach()
        expected[name] += 0.75 * moved.reshape(expected[name].shape)
    found = changes(mixed)
    for name, change in expected.items():
        near(found[name], change, 1e-5)


# --- what differs between adapters ------------------------------------------------------------------------------------


def test_an_adapter_without_a_fingerprint_is_mixed_and_the_base_is_the_other_s() -> None:
    """PEFT's files know the name of the base alone."""
    known = adapter("lora")
    theirs = dataclasses.replace(adapter("rslora"), base=lorary.Fingerprint(name="org/base"))
    assert lorary.mix([theirs, known]).base == known.base


def test_a_quantised_base_stays_quantised_and_a_mixture_is_noted() -> None:
    quantised = trained(made_of("qlora"), ("plain",))
    both = lorary.mix([quantised, trained(made_of("qlora"), ("plain",), 5)])
    assert both.method.storage == quantised.method.storage
    assert both.notes == ()
    model = lorary.switch(base(), both)
    assert type(lorary.attached(model).method.storage).__name__ == "NF4"  # type: ignore[union-attr]
    (note,) = lorary.mix([quantised, adapter("lora")]).notes
    assert note.startswith("some of these adapters, but not all, were trained on a base quantised to NF4")
    (note,) = lorary.mix([trained(made_of("qlora", "pissa"), ("plain",))], [0.5]).notes
    assert note.startswith("an adapter was trained on the NF4 residual of its base")


def test_tied_sites_get_tensors_of_their_own() -> None:
    value = adapter("lora of rank 5")
    (plain, other) = value.sites
    tied = dataclasses.replace(
        value,
        sites=(
            dataclasses.replace(plain, share="x"),
            dataclasses.replace(plain, share="x", site=dataclasses.replace(plain.site, name="twin")),
        ),
        tensors={"plain": value.tensors["plain"], "twin": value.tensors["plain"]},
    )
    mixed = lorary.mix([tied, value])
    assert {s.share for s in mixed.sites} == {""}
    near(products(mixed)["twin"], products(tied)["twin"])
    near(products(mixed)["plain"], 2 * products(tied)["plain"])
    assert other.site.name in mixed.tensors


def another() -> lorary.Adapter:
    """An adapter of another base with the same layers."""
    model = base()
    with torch.no_grad():
        model.plain.weight += 1
    return trained(made_of("lora"), ("plain",), model=model)


def narrow() -> lorary.Adapter:
    """An adapter of a base with other sizes, without a fingerprint, as in PEFT's files."""
    model = torch.nn.Sequential()
    model.plain = torch.nn.Linear(20, 24)
    return dataclasses.replace(trained(made_of("lora"), ("plain",), model=model), base=lorary.Fingerprint())


def spoiled(value: float) -> lorary.Adapter:
    a = adapter("lora of rank 5")
    tensors = {name: {role: t.clone() for role, t in roles.items()} for name, roles in a.tensors.items()}
    tensors["plain"]["A"][0, 1] = value
    return dataclasses.replace(a, tensors=tensors)


def without_a_role() -> lorary.Adapter:
    a = adapter("lora of rank 5")
    return dataclasses.replace(a, tensors={"plain": a.tensors["plain"], "conv2": {"A": a.tensors["conv2"]["A"]}})


def long_context() -> lorary.Adapter:
    model = tiny.seeded("LlamaForCausalLM")
    method = lorary.method("longlora", r=2, length=4096)
    return trained(method, ("q_proj",), model=model)


def llama() -> lorary.Adapter:
    return trained(made_of("lora"), ("q_proj",), model=tiny.seeded("LlamaForCausalLM"))


def nothing() -> lorary.Adapter:
    """AdaLoRA whose directions have all been pruned."""
    value = adapter("adalora")
    zeros = {
        n: {r: torch.zeros_like(t) if r == "E" else t for r, t in roles.items()} for n, roles in value.tensors.items()
    }
    return dataclasses.replace(value, tensors=zeros).compact()


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "nothing": (list, {}, "adapters: is empty\n      hint: give at least one adapter"),
    "one adapter": (lambda: adapter("lora"), {}, "adapters: is a Adapter, not a sequence of adapters"),
    "a path": (
        lambda: ["out/adapter"],
        {},
        "adapters[0]: is a str, not an Adapter\n      hint: read one with lorary.load_adapter",
    ),
    "too few weights": (lambda: [adapter("lora")] * 2, {"weights": [1]}, "weights: has 1 numbers for 2 adapters"),
    "NaN": (lambda: [adapter("lora")], {"weights": [float("nan")]}, "weights[0]: is nan, not a finite number"),
    "infinite": (
        lambda: [adapter("lora")] * 2,
        {"weights": [1, -float("inf")]},
        "weights[1]: is -inf, not a finite number",
    ),
    "a word": (lambda: [adapter("lora")], {"weights": ["one"]}, "weights[0]: is 'one', not a finite number"),
    "weights as text": (lambda: [adapter("lora")], {"weights": "1"}, "weights: is '1', not a sequence of numbers"),
    "all zero": (lambda: [adapter("lora")], {"weights": [0]}, "weights: are all 0, which leaves the base as it is"),
    "a typing error": (
        lambda: [adapter("lora")],
        {"how": "tie"},
        "how: 'tie' is not a way to mix\n      hint: did you mean `ties`",
    ),
    "no effect": (
        lambda: [adapter("lora")],
        {"density": 0.5},
        "density: has no effect with sum: it keeps every element",
    ),
    "a density": (
        lambda: [adapter("lora")],
        {"how": "ties", "density": 0},
        "density: is 0, not a share above 0 and at most 1",
    ),
    "a rank": (lambda: [adapter("lora")], {"rank": 0}, "rank: is 0, not a whole number from 1 to 65,536"),
    "an energy": (lambda: [adapter("lora")], {"energy": 1.5}, "energy: is 1.5, not a share above 0 and at most 1"),
    "both": (
        lambda: [adapter("lora")],
        {"rank": 2, "energy": 0.5},
        "rank or energy: one of them says how much to keep; given: rank, energy",
    ),
    "a seed": (lambda: [adapter("lora")], {"how": "dare", "seed": 0.5}, "seed: is 0.5, not a whole number"),
    "an arc of three": (
        lambda: [adapter("lora")] * 3,
        {"how": "slerp", "weights": [1, 0, 0]},
        "adapters: are 3, and slerp interpolates between two",
    ),
    "an arc beyond its ends": (
        lambda: [adapter("lora")] * 2,
        {"how": "slerp", "weights": [1.5, -0.5]},
        "weights: are 1.5 and -0.5; those of slerp are 1 - t and t",
    ),
    "another base": (lambda: {"a": adapter("lora"), "b": another()}, {}, "b: other weights: "),
    "another architecture": (
        lambda: [adapter("lora"), llama()],
        {},
        "adapters[1]: another architecture: LlamaForCausalLM when it was trained, Net for adapters[0]",
    ),
    "another base given": (
        lambda: [adapter("lora")],
        {"base": torch.nn.Sequential(torch.nn.Linear(2, 2))},
        "adapters[0]: another architecture: Net when it was trained, Sequential in the base given",
    ),
    "other sizes": (
        lambda: [adapter("lora"), narrow()],
        {},
        "plain: is linear [24, 24] in adapters[0], and linear [24, 20] in adapters[1]",
    ),
    "other contexts": (
        lambda: [llama(), long_context()],
        {"force": True},
        "context: they use different RoPE scaling or attention",
    ),
    "a NaN in a tensor": (
        lambda: [spoiled(float("nan"))],
        {},
        "adapters[0]: 'plain: A': 1 of 120 values are NaN or infinite, the first at [0, 1]",
    ),
    "a lost tensor": (
        lambda: [without_a_role()],
        {"weights": [2]},
        "adapters[0]: conv2: B is missing, expected (6, 5)",
    ),
    "no base": (lambda: [trained(lorary.method("bitfit"), None)] * 2, {}, "base: adapters[0] trains"),
    "DoRA without a base": (
        lambda: [trained(made_of("dora"), ("plain",))],
        {"weights": [0.5], "approximate": True},
        "plain: adapters[0] depends on the base's weight there (MagnitudeDirection), and no base is given",
    ),
    "a base without values": (
        lambda: [adapter("lora")],
        {"base": base().to("meta")},
        "base: is on the meta device and has no values",
    ),
    "weights of bytes": (lambda: [adapter("lora")], {"weights": b"1"}, "weights: is b'1', not a sequence of numbers"),
    "a weight of 400 digits": (lambda: [adapter("lora")], {"weights": [10**400]}, "0, not a finite number"),
    "a weight beyond 32 bits": (
        lambda: [adapter("lora"), adapter("pissa")],
        {"weights": [1e39, 1]},
        "embed: the weighted update there is NaN, or too large for 32-bit numbers\n      hint: use weights nearer to 1",
    ),
    "a density beyond 32 bits": (
        lambda: [adapter("lora of rank 5")],
        {"how": "dare", "density": 1e-300},
        "plain: the weighted update there is NaN, or too large for 32-bit numbers",
    ),
    "no direction left": (lambda: [nothing()], {"weights": [2]}, "adapters: change nothing: every update has rank 0"),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_what_cannot_be_mixed_is_refused_with_the_reason(case: str) -> None:
    make, options, sentence = BAD[case]
    with pytest.raises(MethodError) as refusal:
        lorary.mix(make(), **options)
    assert str(refusal.value).startswith("cannot mix these adapters:\n  - ")
    assert sentence in str(refusal.value)


def test_every_reason_is_given_at_once() -> None:
    with pytest.raises(MethodError) as refusal:
        lorary.mix({"a": adapter("lora"), "b": another()}, how="sum", density=2, rank=-1)
    assert [p.where for p in refusal.value.problems] == ["density", "rank", "density", "b"]


def test_force_mixes_adapters_of_different_bases() -> None:
    mixed = lorary.mix([adapter("lora"), another()], force=True)
    assert mixed.base == adapter("lora").base


def test_a_base_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(MethodError, match=r"base: is a str, not a torch\.nn\.Module"):
        lorary.mix([adapter("lora")], base="builtin:base")  # type: ignore[arg-type]
    theirs: Any = peft.get_peft_model(base(), peft.LoraConfig(target_modules=["plain"]))  # type: ignore[arg-type]
    with pytest.raises(lorary.StateError, match="cannot mix:"):
        lorary.mix([adapter("lora")], base=theirs)
    value = trained(lorary.method("bitfit"), None)
    lost = dataclasses.replace(value, base=lorary.Fingerprint(), full={"lost": value.full["c_attn.bias"]})
    with pytest.raises(MethodError, match=r"is \(72,\) in adapters\[0\], and missing in the base"):
        lorary.mix([lost], [2], base=base())


def test_the_ambient_mode_does_not_matter() -> None:
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        mixed = lorary.mix([adapter("lora"), adapter("pissa")], rank=2)
    plain = lorary.mix([adapter("lora"), adapter("pissa")], rank=2)
    assert all(torch.equal(t, plain.tensors[n][k]) for n, roles in mixed.tensors.items() for k, t in roles.items())
    assert not any(t.is_inference() for roles in mixed.tensors.values() for t in roles.values())
    assert output(lorary.switch(base(), mixed)).shape == base()(X).shape


@pytest.mark.parametrize("name", PLAIN)
def test_factors_of_16_bits_are_multiplied_in_32(name: str) -> None:
    """As the layers do: VeRA's b B d, AdaLoRA's P E and others are products, and lose nothing to rounding."""
    value = adapter(name)
    tensors = {site: {role: t.bfloat16() for role, t in roles.items()} for site, roles in value.tensors.items()}
    stored = dataclasses.replace(value, tensors=tensors)
    expected = changes(stored)
    for site, found in products(lorary.mix([stored], [-0.3])).items():
        near(found, -0.3 * expected[site])
