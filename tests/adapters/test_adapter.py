"""Adapters as values: taken from a model, switched whatever their methods, added, refused on another base."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.adapters.adapter import Adapter
from lorary.adapters.compose.mix import stacked
from lorary.errors import FileError, MethodError, StateError
from lorary.layers.adapted import adapted_layers
from lorary.methods.lora import ConstantScale
from lorary.model.fingerprint import Fingerprint
from lorary.model.state import state_of
from tests import tiny


def made(
    name: str = "LlamaForCausalLM", *names: str, targets: Any = "all-linear", seed: int = 1, **options: Any
) -> Adapter:
    """An adapter as after training on a fresh copy of the base, which is always the same."""
    model = tiny.seeded(name)
    lorary.attach(model, lorary.plan(model, said(*names), targets), **options)
    return Adapter.of(tiny.shaken(model, seed=seed))


def said(*names: str) -> lorary.Method:
    """The method of these presets at rank 2, with an alpha where its scale has one."""
    if names in (("bitfit",), ("full",)):
        return lorary.method(*names)
    return lorary.method(*names, r=2, **({} if "vera" in names else {"alpha": 8.0}))


def refused(kind: type[Exception], action: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(kind) as refusal:
        action(*arguments, **options)
    return str(refusal.value)


# --- of a model -------------------------------------------------------------------------------------------------------


def test_an_adapter_is_a_copy() -> None:
    model = tiny.llama()
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2, full="norm"), "q_proj"))
    value = Adapter.of(tiny.shaken(model))
    before = copy.deepcopy(value)
    tiny.shaken(model, seed=7)
    model(input_ids=tiny.ids(), labels=tiny.ids()).loss.backward()
    for site, roles in value.tensors.items():
        for role, tensor in roles.items():
            assert torch.equal(tensor, before.tensors[site][role])
            assert not tensor.requires_grad
            assert tensor.grad is None
    assert torch.equal(value.full["model.norm.weight"], before.full["model.norm.weight"])


def test_what_an_adapter_holds() -> None:
    value = made("Qwen2ForCausalLM", "rslora", "bitfit", targets=["q_proj"])
    assert value.method == lorary.method("rslora", "bitfit", r=2, alpha=8.0)
    sites = [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert [p.site.name for p in value.sites] == list(value.tensors) == sites
    assert {role: t.shape for role, t in value.tensors[sites[0]].items()} == {"A": (2, 16), "B": (16, 2)}
    assert list(value.full) == [f"model.layers.{i}.self_attn.{p}_proj.bias" for i in (0, 1) for p in "qkv"]
    assert value.base == Fingerprint.of(tiny.seeded("Qwen2ForCausalLM"))
    assert value.size == 4 * (2 * (2 * 16 + 16 * 2) + 2 * (16 + 8 + 8))


def test_the_factors_with_the_scale_in_them() -> None:
    value = made(targets="v_proj")
    for name, form in value.low_rank().items():
        A, B = (value.tensors[name][role] for role in "AB")
        assert torch.equal(form.A, A)
        assert torch.equal(form.B, 4 * B)
        assert form.gain is None
        assert form.shift is None


def test_the_factors_of_a_fused_projection() -> None:
    value = made("GPT2LMHeadModel", targets="attention-qv")
    form = value.low_rank()["transformer.h.0.attn.c_attn"]
    assert form.B.shape == (48, 4)
    assert not form.B[16:32].any()  # nothing for the keys
    A, B = (value.tensors["transformer.h.0.attn.c_attn"][role] for role in "AB")
    torch.testing.assert_close((form.B @ form.A)[32:], 4 * B[16:] @ A[2:])


# --- switching --------------------------------------------------------------------------------------------------------


def answers(value: Adapter | None, name: str = "LlamaForCausalLM", **inputs: Any) -> Tensor:
    model = tiny.seeded(name)
    if value is not None:
        lorary.switch(model, value)
    return tiny.logits(model, **inputs)


LLAMAS = {
    "lora on all": lambda: made(targets="all-linear", seed=1),
    "rslora on attention": lambda: made("LlamaForCausalLM", "rslora", targets="attention", seed=2),
    "lora-fa on mlp": lambda: made("LlamaForCausalLM", "lora-fa", targets="mlp", seed=3),
    "lora on the embedding": lambda: made(targets=["embedding", "lm_head"], seed=4),
    "full": lambda: made("LlamaForCausalLM", "full", seed=5),
    "dora": lambda: made("LlamaForCausalLM", "dora", targets=["attention", "embedding"], seed=6),
    "pissa on all": lambda: made("LlamaForCausalLM", "pissa", targets=["all-linear", "lm_head"], seed=7),
    "olora and dora": lambda: made("LlamaForCausalLM", "olora", "dora", targets="mlp", seed=8),
    "vera": lambda: made("LlamaForCausalLM", "vera", targets=["all-linear", "embedding"], seed=9),
    "vera and dora on attention": lambda: made("LlamaForCausalLM", "vera", "dora", targets="attention", seed=10),
    "melora": lambda: made("LlamaForCausalLM", "melora", seed=11),
    "multilora": lambda: made("LlamaForCausalLM", "multilora", "rslora", targets="v_proj", seed=12),
}


def test_from_any_to_any_other() -> None:
    """Whatever was there before, whatever the method: the answers are those of a fresh base with this adapter."""
    values = {name: make() for name, make in LLAMAS.items()}
    expected = {name: answers(value) for name, value in values.items()} | {"none": answers(None)}
    for a, one in expected.items():
        for b, other in expected.items():
            assert a == b or not torch.allclose(one, other)
    model = tiny.seeded("LlamaForCausalLM")
    parameters = {name: id(p) for name, p in model.named_parameters()}
    order = list(expected)
    for start in range(len(order)):
        for name in (order[start], *order, order[start]):
            assert lorary.switch(model, values.get(name)) is model
            assert torch.equal(tiny.logits(model), expected[name]), name
    lorary.switch(model, None)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters


def test_an_adapter_answers_as_the_model_that_it_was_taken_from() -> None:
    for name, method, targets in [
        ("LlamaForCausalLM", "lora", "all-linear"),
        ("GPT2LMHeadModel", "rslora", ["attention-qv", "mlp", "embedding"]),
        ("BertForSequenceClassification", "lora", "attention"),
        ("BertForSequenceClassification", "bitfit", "attention"),
        ("FalconForCausalLM", "lora-fa", "attention-qv"),
    ]:
        model = tiny.seeded(name)
        lorary.attach(model, lorary.plan(model, lorary.method(method), targets))
        expected = tiny.logits(tiny.shaken(model))
        assert torch.equal(answers(Adapter.of(model), name), expected)


def test_nothing_requires_a_gradient_afterwards() -> None:
    model = tiny.seeded("LlamaForCausalLM")
    lorary.switch(model, made())
    assert not any(p.requires_grad for p in model.parameters())
    lorary.switch(model, None)
    assert all(p.requires_grad for p in model.parameters())


def test_a_switch_touches_the_sites_only() -> None:
    """Of a deep model a switch replaces the adapted layers, and writes the parameters that were trained in full."""
    model = tiny.seeded("LlamaForCausalLM", num_hidden_layers=12)
    base = copy.deepcopy(model)
    method = lorary.method("lora", r=1, full="model.norm.weight")
    lorary.attach(base, lorary.plan(base, method, "layers.7.self_attn.q_proj"))
    value = Adapter.of(tiny.shaken(base))
    modules = dict(model.named_modules())
    versions = {name: (id(p), p._version) for name, p in model.named_parameters()}
    for _ in range(3):
        lorary.switch(model, value)
        changed = {name for name, m in model.named_modules() if modules.get(name) is not m}
        site = "model.layers.7.self_attn.q_proj"
        assert {name for name in changed if name in modules} == {site}
        assert all(name == site or name.startswith(f"{site}.") for name in changed)
        lorary.switch(model, None)
        assert dict(model.named_modules()) == modules
    after = {name: (id(p), p._version) for name, p in model.named_parameters()}
    assert {name for name in versions if versions[name] != after[name]} == {"model.norm.weight"}


def test_a_switch_reads_the_bases_fingerprint_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorary.model.fingerprint import Sample

    reads: list[Tensor] = []
    sample = Sample.of
    monkeypatch.setattr(Sample, "of", staticmethod(lambda tensor: (reads.append(tensor), sample(tensor))[1]))
    model, one, other = tiny.seeded("LlamaForCausalLM"), made(seed=1), made(seed=2)
    reads.clear()
    lorary.switch(model, one)
    once = len(reads)
    assert once == len(list(model.named_parameters(remove_duplicate=False))) - 2 * 14  # without A and B
    for value in (other, one, other):
        lorary.switch(model, value)
    assert len(reads) == once


def test_from_training_to_an_adapter() -> None:
    model = tiny.seeded("LlamaForCausalLM")
    lorary.attach(model, lorary.plan(model, lorary.method(r=3), "mlp"))
    tiny.shaken(model)
    value = made(seed=4)
    lorary.switch(model, value)
    assert torch.equal(tiny.logits(model), answers(value))


def test_on_a_model_of_another_precision() -> None:
    value = made()
    model = tiny.seeded("LlamaForCausalLM").to(torch.bfloat16)
    lorary.switch(model, value)
    assert {p.dtype for layer in adapted_layers(model).values() for p in layer.params.values()} == {torch.float32}
    torch.testing.assert_close(tiny.logits(model).float(), answers(value), rtol=0.1, atol=0.1)


# --- sums -------------------------------------------------------------------------------------------------------------


def densely(name: str, values: list[Adapter], weights: list[float] | None = None) -> nn.Module:
    """The base with the sum of the adapters' updates in its weights, computed one dense matrix after the other."""
    model = tiny.seeded(name).double()
    clean = tiny.seeded(name).double().state_dict()
    with torch.no_grad():
        for value, weight in zip(values, weights or [1.0] * len(values), strict=True):
            for p in value.sites:
                layer = model.get_submodule(p.site.name)
                tensors = {k: t.double() for k, t in value.tensors[p.site.name].items()}
                B, A = p.method.delta.factors(p.site, tensors)
                update = weight * p.scale * B @ A
                if "A0" in tensors:
                    update -= weight * p.scale * tensors["B0"] @ tensors["A0"]
                layer.weight += update if layer.weight.shape == update.shape and p.site.kind == "linear" else update.T
            for path, tensor in value.full.items():
                model.get_parameter(path).add_(weight * (tensor.double() - clean[path]))
    return model


SUMS: dict[str, tuple[str, Any]] = {
    "the same sites": ("LlamaForCausalLM", lambda: [made(seed=1), made(seed=2)]),
    "three methods, other sites": (
        "LlamaForCausalLM",
        lambda: [
            made(targets=["attention", "embedding"], seed=1),
            made("LlamaForCausalLM", "rslora", targets=["q_proj", "mlp"], seed=2),
            made("LlamaForCausalLM", "lora-fa", targets="v_proj", seed=3),
        ],
    ),
    "no site in common": ("LlamaForCausalLM", lambda: [made(targets="mlp"), made(targets="attention")]),
    "fused parts": (
        "GPT2LMHeadModel",
        lambda: [
            made("GPT2LMHeadModel", targets="c_attn[q,v]", seed=1),
            made("GPT2LMHeadModel", targets="c_attn[k]", seed=2),
            made("GPT2LMHeadModel", targets=["c_attn", "mlp"], seed=3),
        ],
    ),
    "biases": ("BertModel", lambda: [made("BertModel", "bitfit", seed=1), made("BertModel", "bitfit", seed=2)]),
    "biases and factors": (
        "BertModel",
        lambda: [made("BertModel", "bitfit", seed=1), made("BertModel", targets="attention", seed=2)],
    ),
    "everything and factors": (
        "LlamaForCausalLM",
        lambda: [made("LlamaForCausalLM", "full", seed=1), made(targets=["q_proj", "embedding"], seed=2)],
    ),
    "what the bases gave up": (
        "LlamaForCausalLM",
        lambda: [
            made("LlamaForCausalLM", "pissa", targets=["attention", "embedding"], seed=1),
            made("LlamaForCausalLM", "olora", "rslora", targets=["q_proj", "mlp"], seed=2),
            made(targets="v_proj", seed=3),
        ],
    ),
    "one of every delta": (
        "LlamaForCausalLM",
        lambda: [
            made("LlamaForCausalLM", "vera", targets=["all-linear", "embedding"], seed=1),
            made("LlamaForCausalLM", "melora", targets=["q_proj", "embedding"], seed=2),
            made("LlamaForCausalLM", "multilora", "rslora", targets=["q_proj", "mlp"], seed=3),
        ],
    ),
    "one twice": ("LlamaForCausalLM", lambda: [made(seed=1)] * 2),
    "a list of one": ("LlamaForCausalLM", lambda: [made(seed=1)]),
}


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tiny.ids())[0]


@pytest.mark.parametrize(("name", "make"), SUMS.values(), ids=SUMS)
def test_a_sum_of_adapters_is_the_sum_of_their_updates(name: str, make: Any) -> None:
    values, model = make(), tiny.seeded(name)
    base = outputs(model)
    lorary.switch(model, values)
    expected = outputs(densely(name, values)).float()
    torch.testing.assert_close(outputs(model), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    assert not torch.allclose(expected, base, rtol=1e-2)
    lorary.switch(model, list(reversed(values)))
    torch.testing.assert_close(outputs(model), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    lorary.switch(model, [])
    assert torch.equal(outputs(model), base)
    assert state_of(model) is None


def test_a_weighted_sum() -> None:
    values, weights = [made(seed=1), made("LlamaForCausalLM", "full", seed=2)], [0.25, -0.5]
    model = tiny.seeded("LlamaForCausalLM")
    total = stacked(values, model, weights)
    assert total.base == values[0].base
    assert {p.method.scale for p in total.sites} == {ConstantScale(1.0)}
    lorary.switch(model, total)
    expected = outputs(densely("LlamaForCausalLM", values, weights)).float()
    torch.testing.assert_close(outputs(model), expected, rtol=1e-3, atol=1e-4)


def test_a_sum_on_a_model_that_has_something_attached() -> None:
    """The values before training are the base's, not those of what is attached now."""
    values = [made("BertModel", "bitfit", seed=1), made("BertModel", "bitfit", seed=2)]
    model = tiny.seeded("BertModel")
    lorary.switch(model, values)
    expected = outputs(model)
    lorary.switch(model, values[0])
    lorary.switch(model, values)
    assert torch.equal(outputs(model), expected)


def test_a_sum_is_an_adapter_that_can_be_taken_and_put_back() -> None:
    model = tiny.seeded("LlamaForCausalLM")
    lorary.switch(model, [made(seed=1), made(targets="mlp", seed=2)])
    expected = tiny.logits(model)
    total = Adapter.of(model)
    assert torch.equal(answers(total), expected)
    lorary.merge(model)
    torch.testing.assert_close(tiny.logits(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("names", [("dora",), ("dora", "pissa"), ("vera", "dora")])
def test_what_has_gains_has_no_sum(names: tuple[str, ...]) -> None:
    values = [made(), made("LlamaForCausalLM", *names, targets="q_proj")]
    model = tiny.seeded("LlamaForCausalLM")
    before = tiny.everything(model)
    assert refused(MethodError, lorary.switch, model, values) == (
        "cannot add these adapters:\n"
        "  - model.layers.0.self_attn.q_proj and 1 more: adapters[1] gives its output a gain or a shift of its own "
        "(MagnitudeDirection)\n"
        "      hint: lorary.mix with approximate=True and base=model (--approximate --base) mixes its closest "
        "update of low rank, and reports the error"
    )
    assert tiny.everything(model) == before


# --- a base that has given up a part ----------------------------------------------------------------------------------

MOVING = [("pissa",), ("olora",), ("pissa", "dora"), ("olora", "lora-fa", "rslora")]
WIDE = ["all-linear", "embedding", "lm_head"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("names", MOVING, ids=" ".join)
def test_there_and_back_again(names: tuple[str, ...], tied: bool) -> None:
    """From an adapter that moves the base to one that does not, and to none: the base is the very base."""
    model = tiny.seeded("LlamaForCausalLM", tie_word_embeddings=tied)
    targets = [t for t in WIDE if names != ("lora-fa",)]
    lorary.attach(model, lorary.plan(model, said(*names), targets))
    moving, expected = Adapter.of(tiny.shaken(model)), tiny.logits(model)
    model = tiny.seeded("LlamaForCausalLM", tie_word_embeddings=tied)
    base, before, values = tiny.logits(model), tiny.everything(model), tiny.frozen_copy(model)
    twin = tiny.seeded("LlamaForCausalLM", tie_word_embeddings=tied)
    plain = Adapter.of(tiny.trained(twin))
    lorary.switch(twin, plain)
    answer = tiny.logits(twin)
    for _ in range(2):
        lorary.switch(model, moving)
        torch.testing.assert_close(tiny.logits(model), expected, rtol=1e-4, atol=1e-4)
        lorary.switch(model, plain)
        assert torch.equal(tiny.logits(model), answer)
    lorary.switch(model, moving)
    lorary.switch(model, None)
    assert torch.equal(tiny.logits(model), base)
    assert tiny.everything(model) == before
    assert tiny.same(tiny.frozen_copy(model), values)


ALL = [*MOVING, ("dora",), ("vera",), ("vera", "dora"), ("melora",), ("multilora",), ("melora", "dora", "lora+")]


@pytest.mark.parametrize("names", ALL, ids=" ".join)
def test_loaded_to_go_on_training(names: tuple[str, ...], tmp_path: Path) -> None:
    """One more step after a reload is the step that would have come without it."""
    batch = {"input_ids": tiny.ids(), "labels": tiny.ids()}

    def step(model: Any) -> Tensor:
        optimizer = torch.optim.SGD(lorary.param_groups(model, lr=0.05))
        model(**batch).loss.backward()
        optimizer.step()
        return tiny.logits(model)

    model = tiny.seeded("LlamaForCausalLM")
    lorary.attach(model, lorary.plan(model, said(*names)))
    tiny.shaken(model, size=0.1)
    lorary.save(model, tmp_path / "out")
    before = tiny.logits(model)
    again = lorary.load(tiny.seeded("LlamaForCausalLM"), tmp_path / "out", trainable=True)
    assert torch.equal(tiny.logits(again), before)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    after = step(model)
    assert not torch.allclose(after, before, rtol=1e-3)
    torch.testing.assert_close(step(again), after, rtol=1e-5, atol=1e-6)
    # the optimizer reached A, B, m, ... and nothing of what never trains
    value, first = Adapter.of(again), lorary.load_adapter(tmp_path / "out")
    for name, roles in value.tensors.items():
        for role, t in roles.items():
            never = role in ("A0", "B0") or role in value.method.frozen
            assert torch.equal(t, first.tensors[name][role]) == never, role


@pytest.mark.parametrize("names", ALL, ids=" ".join)
@pytest.mark.parametrize("targets", ["all-linear", ["embedding", "lm_head"]], ids=str)
def test_on_the_unmodified_base(names: tuple[str, ...], targets: Any) -> None:
    """gain * (W x + B A x) + b of `low_rank` is the adapted layer, for every site of a tied model."""
    base = tiny.seeded("LlamaForCausalLM", tie_word_embeddings=True)
    model = tiny.seeded("LlamaForCausalLM", tie_word_embeddings=True)
    lorary.attach(model, lorary.plan(model, said(*names), targets))
    tiny.shaken(model)
    value = Adapter.of(model)
    for given in (base, model):  # the plain base, or one with the adapter on it
        forms = value.low_rank(given)
        assert list(forms) == list(value.tensors)
        with torch.no_grad():
            dense = copy.deepcopy(base)
            dense.lm_head.weight = nn.Parameter(dense.lm_head.weight.clone())  # untied: each has its own update
            for name, form in forms.items():
                layer: Any = dense.get_submodule(name)
                W = layer.weight.T if isinstance(layer, nn.Embedding) else layer.weight
                new = W + form.B @ form.A
                new = new if form.gain is None else form.gain[:, None] * new
                layer.weight.copy_(new.T if isinstance(layer, nn.Embedding) else new)
        expected = tiny.logits(model)
        torch.testing.assert_close(tiny.logits(dense), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_another_base_is_refused_and_force_takes_it() -> None:
    value, other = made(), tiny.seeded("LlamaForCausalLM", seed=9)
    mine, its = value.base.weights[:12], Fingerprint.of(other).weights[:12]
    message = refused(FileError, lorary.switch, other, value)
    assert message == (
        "the adapter does not fit this model:\n"
        f"  - base: other weights: {mine} when it was trained, {its} here\n"
        "      hint: load the base that it was trained on, or pass force=True"
    )
    assert state_of(other) is None
    lorary.switch(other, value, force=True)
    assert len(adapted_layers(other)) == 14


def test_another_architecture_is_refused_even_by_force() -> None:
    model = tiny.seeded("GPT2LMHeadModel")
    message = refused(FileError, lorary.switch, model, made(targets="layers.0.self_attn.q_proj"), force=True)
    assert message == (
        "the adapter does not fit this model:\n  - model.layers.0.self_attn.q_proj: the model has no such module"
    )
    message = refused(FileError, lorary.switch, model, made(targets="layers.0.self_attn.q_proj"))
    assert "  - base: another architecture: LlamaForCausalLM when it was trained, GPT2LMHeadModel here\n" in message
    assert "  - base: other layers or sizes: " in message


def test_a_base_of_another_size() -> None:
    model = tiny.seeded("LlamaForCausalLM", hidden_size=8, head_dim=4)
    message = refused(FileError, lorary.switch, model, made("LlamaForCausalLM", "full"), force=True)
    assert "  - model.embed_tokens.weight: the adapter holds (40, 16) for it; in this model it is (40, 8)\n" in message
    small = tiny.seeded("LlamaForCausalLM", num_hidden_layers=1)
    message = refused(FileError, lorary.switch, small, made("LlamaForCausalLM", "full"), force=True)
    assert "in this model it has no such parameter" in message


def broken(value: Adapter, **changes: Any) -> Adapter:
    return dataclasses.replace(value, **changes)


def test_tensors_that_do_not_fit_their_sites() -> None:
    value = made(targets="layers.0.self_attn.q_proj")
    site = "model.layers.0.self_attn.q_proj"
    A, B = (value.tensors[site][role] for role in "AB")
    model = tiny.seeded("LlamaForCausalLM")
    for tensors, what in [
        ({site: {"A": A}}, "B is missing, expected (16, 2)"),
        ({site: {"A": A, "B": B, "m": B}}, "m is (16, 2), expected no such tensor"),
        ({site: {"A": A.T, "B": B}}, "A is (16, 2), expected (2, 16)"),
        ({}, "A is missing, expected (2, 16)\n  - " + site + ": B is missing, expected (16, 2)"),
    ]:
        message = refused(FileError, lorary.switch, model, broken(value, tensors=tensors))
        assert message == f"the adapter does not fit this model:\n  - {site}: {what}"


@pytest.mark.parametrize("sum_", [False, True])
def test_a_switch_that_fails_changes_nothing(sum_: bool) -> None:
    good, other = made(seed=1), made("GPT2LMHeadModel")
    model = tiny.seeded("LlamaForCausalLM")
    lorary.switch(model, [good, made("LlamaForCausalLM", "full", seed=3)])
    modules, expected = dict(model.named_modules()), tiny.logits(model)
    values = tiny.frozen_copy(model)
    for bad in (other, broken(good, tensors={}), broken(made("LlamaForCausalLM", "full"), full={"x": torch.ones(1)})):
        with pytest.raises(FileError):
            lorary.switch(model, [good, bad] if sum_ else bad)
        assert dict(model.named_modules()) == modules
        assert tiny.same(tiny.frozen_copy(model), values)
        assert torch.equal(tiny.logits(model), expected)
    lorary.switch(model, None)
    assert torch.equal(tiny.logits(model), answers(None))


def test_every_difference_is_told_at_once() -> None:
    value = made(targets=["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"])
    model = tiny.seeded("LlamaForCausalLM", num_hidden_layers=1, hidden_size=8, head_dim=4)
    assert refused(FileError, lorary.switch, model, value).count("\n  - ") == 3


def test_a_tied_parameter_under_its_other_name() -> None:
    """A file of an untied model may call a table by the name that a tied model gives to another use of it."""
    model = tiny.seeded("LlamaForCausalLM", tie_word_embeddings=True)
    value = Adapter(lorary.method("lora", full="lm_head"), (), {}, {"lm_head.weight": torch.ones(40, 16)})
    before = tiny.frozen_copy(model)
    lorary.switch(model, value)
    assert torch.equal(model.model.embed_tokens.weight, torch.ones(40, 16))
    lorary.switch(model, None)
    assert tiny.same(tiny.frozen_copy(model), before)


def test_what_has_no_low_rank_form_without_the_base() -> None:
    value = made("LlamaForCausalLM", "dora", targets=["layers.0.self_attn.q_proj", "layers.1.self_attn.v_proj"])
    assert refused(MethodError, value.low_rank) == (
        "this adapter has no low-rank form:\n"
        "  - model.layers.0.self_attn.q_proj and 1 more: MagnitudeDirection has no such form without the base's "
        "weight\n"
        "      hint: give the base"
    )
    assert list(value.low_rank(tiny.seeded("LlamaForCausalLM"))) == list(value.tensors)


def test_a_merged_model_is_not_switched() -> None:
    model = tiny.seeded("LlamaForCausalLM")
    lorary.switch(model, made())
    lorary.merge(model, keep=True)
    assert "the adapter is merged" in refused(StateError, lorary.switch, model, made())
    lorary.unmerge(model)
    lorary.switch(model, None)


# --- folders (their bytes are tested with the formats) ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "names", "targets"),
    [
        ("LlamaForCausalLM", ("lora",), "all-linear"),
        ("GPT2LMHeadModel", ("rslora",), ["c_attn[q,v]", "embedding"]),
        ("BertForSequenceClassification", ("lora-fa",), "attention"),
        ("BertForSequenceClassification", ("bitfit",), "attention"),
        ("GPT2LMHeadModel", ("pissa", "dora"), ["c_attn[q,v]", "embedding", "lm_head"]),
        ("LlamaForCausalLM", ("olora", "rslora"), ["all-linear", "lm_head"]),
        ("GPT2LMHeadModel", ("vera",), ["c_attn[q,v]", "mlp", "embedding"]),
        ("LlamaForCausalLM", ("melora", "dora"), "all-linear"),
        ("BertForSequenceClassification", ("multilora", "bitfit"), "attention"),
    ],
)
def test_saved_and_loaded(name: str, names: tuple[str, ...], targets: Any, tmp_path: Path) -> None:
    model = tiny.seeded(name)
    lorary.attach(model, lorary.plan(model, said(*names), targets))
    expected = tiny.logits(tiny.shaken(model))
    lorary.save(model, tmp_path / "out")
    fresh = tiny.seeded(name)
    assert lorary.load(fresh, tmp_path / "out") is fresh
    assert torch.equal(tiny.logits(fresh), expected)
    assert not any(p.requires_grad for p in fresh.parameters())
    assert "something is attached already" in refused(StateError, lorary.load, fresh, tmp_path / "out")
    value = lorary.load_adapter(tmp_path / "out")
    assert torch.equal(answers(value, name), expected)
    again = lorary.load(tiny.seeded(name), tmp_path / "out", trainable=True)
    trains = [n for n, p in again.named_parameters() if p.requires_grad]
    assert trains == [n for n, p in model.named_parameters() if p.requires_grad]


def test_a_folder_of_another_base(tmp_path: Path) -> None:
    lorary.save_adapter(made(), tmp_path / "out")
    other = tiny.seeded("LlamaForCausalLM", seed=9)
    message = refused(FileError, lorary.load, other, tmp_path / "out")
    assert message.startswith(f"{tmp_path / 'out'} does not fit this model:\n  - base: other weights: ")
    assert state_of(other) is None
    lorary.load(other, tmp_path / "out", force=True)
    assert len(adapted_layers(other)) == 14
