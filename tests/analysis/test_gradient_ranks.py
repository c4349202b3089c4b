"""Ranks from gradients: the best allocation by brute force, the budget, the gradients themselves, and the refusals."""

# ruff: noqa: E501 (messages stand here as they are printed)

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.analysis.gradient_ranks import allocated, ranks_from_gradients, shares
from lorary.errors import DataError, LoraryError, PlanError, StateError, TrainingError
from lorary.spec.placement import AdaptedSite
from lorary.spec.site import Site
from tests import tiny

IDS = torch.tensor([[1, 5, 7, 5, 2, 9, 11, 30], [3, 9, 4, 8, 12, 21, 2, 1]])
BATCH = {"input_ids": IDS, "labels": IDS}


def sites(r: int, *sizes: tuple[int, int]) -> list[AdaptedSite]:
    method = lorary.method("lora", r=r)
    return [AdaptedSite(Site(f"l{i}", "linear", out, inp, bias=False), method) for i, (out, inp) in enumerate(sizes)]


class Two(nn.Module):
    """Two layers beside each other: the input of the first has one direction, that of the second has all."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.scale = scale

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        y = self.narrow(torch.ones_like(x)) * self.scale + self.wide(x)
        return SimpleNamespace(loss=None if labels is None else (y - labels).square().mean(), logits=y)


def two(r: int = 4, **options: Any) -> tuple[Two, Any]:
    model = Two(**options)
    return model, lorary.plan(model, lorary.method("lora", r=r), example=torch.zeros(1, 16))


def pair_batch() -> dict[str, Tensor]:
    return {"x": torch.randn(64, 16), "labels": torch.randn(64, 16)}


def test_the_ranks_cover_the_most_that_this_many_numbers_can() -> None:
    generator = torch.Generator().manual_seed(0)
    for r in (1, 2, 3):
        placed = sites(r, (12, 12), (12, 12), (12, 12))
        spectra = {}
        for s in placed:
            values = torch.rand(12, generator=generator).pow(4).sort(descending=True).values
            spectra[s.site.name] = values / values.sum()
        found = allocated(placed, spectra)
        ways = [w for w in itertools.product(range(1, 13), repeat=3) if sum(w) == 3 * r and max(w) <= 4 * r]
        covered = {w: sum(float(s[:k].sum()) for s, k in zip(spectra.values(), w, strict=True)) for w in ways}
        assert covered[tuple(found.values())] == pytest.approx(max(covered.values()))  # type: ignore[index]


def test_a_direction_of_a_small_layer_costs_less() -> None:
    placed = sites(4, (8, 8), (64, 64))
    equal = {s.site.name: torch.full((8,), 1 / 8) for s in placed}
    assert allocated(placed, equal) == {
        "l0": 8,
        "l1": 3,
    }  # 8 directions at most; 4 * 144 - 8 * 16 - 3 * 128 = 64 are left


@pytest.mark.parametrize(
    ("name", "r"), [("LlamaForCausalLM", 4), ("GPT2LMHeadModel", 2), ("Qwen3ForCausalLM", 1), ("FalconForCausalLM", 3)]
)
def test_the_ranks_are_a_plan_of_as_many_numbers(name: str, r: int) -> None:
    model = tiny.model(name)
    method = lorary.method("lora", r=r)
    uniform = lorary.plan(model, method)
    found = ranks_from_gradients(model, BATCH, uniform)
    assert list(found) == [s.site.name for s in uniform.sites]
    assert all(max(r // 4, 1) <= rank <= 4 * r for rank in found.values())
    planned = lorary.plan(model, method, ranks=found)
    assert {s.site.name: s.r for s in planned.sites} == found
    largest = max(s.trainable // s.r for s in uniform.sites)
    full = all(
        rank == min(4 * r, s.site.in_features, *s.site.rows)
        for rank, s in zip(found.values(), uniform.sites, strict=True)
    )
    assert uniform.trainable - largest < planned.trainable <= uniform.trainable or full


def test_a_layer_with_one_direction_gets_the_least() -> None:
    model, plan = two()
    assert ranks_from_gradients(model, pair_batch(), plan) == {"narrow": 1, "wide": 7}


def test_the_size_of_a_gradient_does_not_count() -> None:
    model, plan = two(scale=1000.0)
    assert ranks_from_gradients(model, pair_batch(), plan) == {"narrow": 1, "wide": 7}


def test_a_quantised_layer_has_the_gradient_of_its_dense_weight() -> None:
    model = tiny.model("LlamaForCausalLM")
    method = lorary.method("lora", r=2)
    lorary.quantize(model)
    plan = lorary.plan(model, method)
    assert plan.sites
    quantised = ranks_from_gradients(model, BATCH, plan)
    dense = lorary.dequantize(model)
    assert ranks_from_gradients(dense, BATCH, lorary.plan(dense, method)) == quantised
    assert len(set(quantised.values())) > 1


class TwoTexts(nn.Module):
    """A language model that reads two texts in one forward pass, and a third one for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny.model("LlamaForCausalLM")

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        first, second = input_ids, input_ids.flip(1)
        loss = self.inner(first, labels=first).loss + 0.01 * self.inner(second, labels=second).loss
        self.inner(input_ids + 1)
        return SimpleNamespace(loss=loss)


def test_a_quantised_layer_that_is_called_twice_has_the_gradient_of_both_calls() -> None:
    model, method = TwoTexts(), lorary.method("lora", r=2)
    lorary.quantize(model)
    plan = lorary.plan(model, method, example=IDS)
    assert plan.sites
    quantised = ranks_from_gradients(model, BATCH, plan)
    dense = lorary.dequantize(model)
    assert ranks_from_gradients(dense, BATCH, lorary.plan(dense, method, example=IDS)) == quantised


def test_the_model_is_as_before() -> None:
    model = tiny.model("LlamaForCausalLM")
    model.train()
    first, *others = model.parameters()
    first.requires_grad_(False)
    others[0].grad = kept = torch.ones_like(others[0])
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    ranks_from_gradients(model, BATCH, lorary.plan(model, lorary.method("lora", r=2)))
    for name, p in model.named_parameters():
        assert (p.requires_grad, p.equal(before[name][1])) == (before[name][0], True)
    assert others[0].grad is kept
    assert all(p.grad is None for p in others[1:])
    assert model.training
    assert sum(len(m._forward_hooks) for m in model.modules()) == hooks
    model(**BATCH).loss.backward()
    assert all(p.grad is not None for p in others)  # no hook is left that would free them


def test_the_shares_are_those_of_the_singular_values() -> None:
    G = torch.randn(6, 4)
    values = torch.linalg.svdvals(G).square()
    torch.testing.assert_close(shares([G]).float(), values / values.sum())
    assert not len(shares([torch.zeros(3, 3)]))
    large = torch.randn(1100, 3) @ torch.randn(3, 1100)
    exact = torch.linalg.svdvals(large)[:3].square()
    torch.testing.assert_close(shares([large])[:3].float(), exact / exact.sum(), rtol=1e-3, atol=1e-4)


# --- refusals -----------------------------------------------------------------------------------------------------


def llama(*presets: str, **options: Any) -> tuple[Any, Any]:
    model = tiny.model("LlamaForCausalLM")
    return model, lorary.plan(model, lorary.method(*(presets or ("lora",)), **options))


def attached() -> Any:
    model, plan = llama()
    return lorary.attach(model, plan), BATCH, plan


def other_model() -> Any:
    return tiny.model("GPT2LMHeadModel"), BATCH, llama()[1]


def not_finite() -> Any:
    model, plan = llama()
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    return model, BATCH, plan


def unlabelled() -> Any:
    model, plan = llama()
    return model, {"input_ids": IDS, "labels": torch.full_like(IDS, -100)}, plan


def empty() -> Any:
    model, plan = llama()
    return model.to("meta"), BATCH, plan


def blind() -> Any:
    model, plan = two()
    x = torch.zeros(4, 16)
    with torch.no_grad():
        model.narrow.weight.zero_()
    return model, {"x": x, "labels": x}, plan


BAD: list[tuple[Callable[[], Any], type[LoraryError], str]] = [
    (lambda: (llama()[0], BATCH, "lora"), PlanError, "plan: is a str, not a Plan"),
    (lambda: (llama()[0], IDS, llama()[1]), DataError, "batch: is a Tensor, not a mapping of the model's inputs"),
    (lambda: (*llama()[:1], {"input_ids": IDS}, llama()[1]), DataError, "batch: the model's output has no loss\n      hint: add labels"),
    (lambda: (llama()[0], {}, llama()[1]), DataError, "batch: the model does not take it (no tensors): You must specify exactly one of input_ids or inputs_embeds"),
    (lambda: (llama()[0], BATCH | {"labels": IDS[:, 1:]}, llama()[1]), DataError, "batch: the model does not take it (input_ids ["),
    (lambda: (llama()[0], BATCH | {"input_ids": IDS + 1000}, llama()[1]), DataError, "index out of range"),
    (attached, PlanError, "model: has adapters attached\n      hint: detach them first"),
    (other_model, PlanError, "model.layers.0.self_attn.q_proj: the model has no such module"),
    (lambda: (*llama("vera")[:1], BATCH, llama("vera")[1]), PlanError, "SharedProjectionDelta has no pair of factors of any rank there\n      hint: plan lora, or a method with its factors"),
    (lambda: (*llama("full")[:1], BATCH, llama("full")[1]), PlanError, "plan: adapts no layer\n      hint: plan lora"),
    (not_finite, TrainingError, "model.embed_tokens.weight: holds numbers that are not finite\n      hint: the checkpoint is damaged: load the model again"),
    (unlabelled, TrainingError, "batch: the loss is nan\n      hint: has the batch a label in every row?"),
    (empty, StateError, "model: is on the meta device and has no values\n      hint: load its weights first"),
    (blind, TrainingError, "batch: no layer has a gradient\n      hint: has the batch any label?"),
    (lambda: ("model", BATCH, llama()[1]), StateError, "model: is a str, not a torch.nn.Module"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "kind", "sentence"), BAD)
def test_bad_arguments(make: Callable[[], Any], kind: type[LoraryError], sentence: str) -> None:
    model, batch, plan = make()
    with pytest.raises(kind) as caught:
        ranks_from_gradients(model, batch, plan)
    assert sentence in str(caught.value)
