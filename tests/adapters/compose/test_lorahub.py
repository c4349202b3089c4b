"""LoRAHub: the authors' algorithm on the same adapters, both forms of the sum, and what it refuses."""

from __future__ import annotations

import builtins
import copy
import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary import builtin
from lorary.adapters.compose.weighted_factors import WeightedFactors
from lorary.adapters.content_hash import content_hash
from lorary.builtin import corpora
from lorary.errors import DataError, LoraryError, MethodError, StateError
from tests import tiny

Values = tuple[float, ...]


def base() -> Any:
    return tiny.seeded("LlamaForCausalLM")


def adapter(*names: str, seed: int = 0, size: float = 0.3, **options: Any) -> lorary.Adapter:
    """An adapter of the tiny model, with numbers in every tensor."""
    model = base()
    method = lorary.method(*names or ("lora",), **({"r": 2} | options))
    lorary.attach(model, lorary.plan(model, method, "all-linear"), seed=seed)
    return lorary.Adapter.of(tiny.shaken(model, size, seed))


def rows(seed: int, count: int = 5) -> list[dict[str, list[int]]]:
    """Rows of different lengths; the first two tokens are a prompt."""
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randint(40, (4 + i,), generator=generator).tolist() for i in range(count)]
    return [{"input_ids": ids, "labels": [-100, -100, *ids[2:]]} for ids in found]


def learn(examples: list[dict[str, list[int]]], scale: float) -> lorary.Adapter:
    """An adapter that has learned a few rows."""
    model = base()
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2, alpha=scale * 2), "all-linear"))
    optimizer = torch.optim.AdamW(lorary.param_groups(model, lr=2e-2))
    for _ in range(25):
        sum(model(**one_row(row)).loss for row in examples).backward()
        optimizer.step()
        optimizer.zero_grad()
    return lorary.Adapter.of(model)


def one_row(row: dict[str, list[int]]) -> dict[str, Tensor]:
    return {name: torch.tensor([ids]) for name, ids in row.items()}


@cache
def task() -> tuple[tuple[lorary.Adapter, lorary.Adapter], list[dict[str, list[int]]]]:
    """Two adapters that have learned rows of their own, with other scales, and rows of both."""
    first, second = rows(1, 4), rows(2, 4)
    return (learn(first, 2.0), learn(second, 1.0)), first[1:3] + second[1:3]


# --- the authors' algorithm, written down from the paper: state dicts summed element by element ----------------------


def authors(adapters: Any, examples: Any) -> Callable[[Values], float]:
    """The objective of the paper: L + 0.05 * mean |w|, of the model whose factors are the weighted sums of factors."""
    model = base()
    plain = {name: p.clone() for name, p in model.named_parameters()}
    # s is folded into B: the authors' adapters have one s
    states = [
        {
            f"{a.site.name}|{role}": t * (a.scale if role == "B" else 1.0)
            for a in one.sites
            for role, t in tensors(one, a)
        }
        for one in adapters
    ]

    def objective(w: Values) -> float:
        final = {key: sum(w[i] * states[i][key] for i in range(len(w))) for key in states[0]}
        with torch.no_grad():
            for key in final:
                site, role = key.split("|")
                if role == "A":
                    weight = plain[f"{site}.weight"] + final[f"{site}|B"] @ final[key]
                    model.get_submodule(site).weight.copy_(weight)
            nats = [(model(**one_row(row)).loss.item(), len(row["labels"]) - 2) for row in examples]
        loss = sum(mean * n for mean, n in nats) / sum(n for _, n in nats)
        return loss + 0.05 * sum(abs(x) for x in w) / len(w)

    return objective


def tensors(one: lorary.Adapter, at: Any) -> Any:
    return one.tensors[at.site.name].items()


def one_plus_one(objective: Callable[[Values], float], n: int, budget: int, seed: int) -> tuple[Values, float]:
    """Another gradient-free optimiser: a (1+1) evolution strategy with the 1/5 rule, within the paper's bounds."""
    draw, sigma = np.random.RandomState(seed), 0.5
    best, value = (0.0,) * n, objective((0.0,) * n)
    for _ in range(budget):
        tried = tuple(float(x) for x in np.clip(best + sigma * draw.randn(n), -1.5, 1.5))
        found = objective(tried)
        sigma *= 1.5 if found < value else 0.9
        if found < value:
            best, value = tried, found
    return best, value


def test_the_objective_is_the_authors_at_every_candidate() -> None:
    adapters, examples = task()
    found = lorary.lorahub(base(), adapters, examples, form="factor", budget=30, seed=1)
    objective = authors(adapters, examples)
    assert found.candidates[0].weights == (0.0, 0.0)
    for candidate in found.candidates:
        assert candidate.objective == pytest.approx(objective(candidate.weights), abs=1e-5)
        penalty = 0.05 * np.mean(np.abs(candidate.weights))
        assert candidate.objective - candidate.loss == pytest.approx(penalty, abs=1e-9)


def test_it_finds_the_authors_optimum() -> None:
    """What a dense grid finds, and another optimiser on the objective as the paper writes it."""
    adapters, examples = task()
    objective = authors(adapters, examples)
    # w and -w give the same factors' product, so half of the square is enough
    grid = [(a, b) for a in np.linspace(0, 1.5, 9) for b in np.linspace(-1.5, 1.5, 17)]
    least = min(objective(w) for w in grid)
    other = min(one_plus_one(objective, 2, budget=100, seed=seed)[1] for seed in (1, 2))
    found = lorary.lorahub(base(), adapters, examples, form="factor", budget=100, seed=0)
    ours = objective(found.weights)
    assert other == pytest.approx(ours, abs=2e-3)
    assert least - 0.02 < ours < least + 1e-3
    assert ours < objective((0.0, 0.0)) - 0.1, "there is something to find"


# --- the two forms ----------------------------------------------------------------------------------------------------


def test_one_hot_weights_are_an_adapter_bit_for_bit() -> None:
    adapters = {"a": adapter(seed=1), "b": adapter(seed=2)}
    for form in (True, False):
        mixture = WeightedFactors(base(), adapters, summed=form).adapter([0.0, 1.0])
        model = base()
        expected = tiny.logits(lorary.switch(model, adapters["b"]))
        assert torch.equal(tiny.logits(lorary.switch(model, mixture)), expected) or not form
        forms, own = mixture.low_rank(), adapters["b"].low_rank()
        for site, (B, A, *_) in own.items():
            assert torch.equal(forms[site].B[:, -2:], B)
            assert torch.equal(forms[site].A[-2:], A)


def test_the_rank_is_one_adapter_s_or_the_sum() -> None:
    adapters = [adapter(seed=seed) for seed in (1, 2, 3)]
    examples = rows(0)
    factor, product = (lorary.lorahub(base(), adapters, examples, form=f, budget=8) for f in ("factor", "product"))
    assert {a.r for a in factor.adapter.sites} == {2}
    assert {a.r for a in product.adapter.sites} == {6}
    for site, (B, A, *_) in product.adapter.low_rank().items():
        dense = sum(w * one.low_rank()[site].B @ one.low_rank()[site].A for w, one in zip(product.weights, adapters))  # noqa: B905
        torch.testing.assert_close(B @ A, dense, atol=1e-6, rtol=1e-5)


def test_the_exact_sum_takes_other_methods_ranks_and_sites() -> None:
    model = base()
    few = lorary.plan(model, lorary.method("lora", r=3), "attention")
    lorary.attach(model, few)
    mixed = {
        "lora": adapter(seed=1),
        "rslora": adapter("rslora", seed=2, r=4),
        "pissa": adapter("pissa", seed=3, size=0.05),
        "vera": adapter("vera", seed=4, r=8),
        "attention": lorary.Adapter.of(tiny.shaken(model)),
    }
    model = base()
    found = lorary.lorahub(model, mixed, rows(3), budget=12)
    assert found.names == tuple(mixed)
    lorary.switch(model, found.adapter)
    losses = [(model(**one_row(row)).loss.item(), len(row["labels"]) - 2) for row in rows(3)]
    assert sum(m * n for m, n in losses) / sum(n for _, n in losses) == pytest.approx(found.loss, abs=1e-5)


def test_its_parents_and_settings_are_recorded_and_saved(tmp_path: Any) -> None:
    adapters = {"one": adapter(seed=1), "two": adapter(seed=2)}
    found = lorary.lorahub(base(), adapters, rows(0), budget=9, seed=3, l1=0.1)
    lorary.save_adapter(found.adapter, tmp_path / "out")
    again = lorary.load_adapter(tmp_path / "out").provenance
    assert again is not None
    assert again.how == "lorahub"
    assert [(p.name, p.sha256) for p in again.parents] == [(n, content_hash(a)) for n, a in adapters.items()]
    assert tuple(p.weight for p in again.parents) == found.weights
    assert again.settings["l1"] == 0.1
    unnamed = lorary.lorahub(base(), [*adapters.values()], rows(0), budget=2)
    assert unnamed.names == ("adapters[0]", "adapters[1]")
    assert [p.name for p in unnamed.adapter.provenance.parents] == ["", ""]  # type: ignore[union-attr]
    assert again.settings["seed"] == 3
    assert again.settings["loss"] == found.loss == min(c.loss for c in found.candidates if c.weights == found.weights)


def test_adapters_of_a_quantised_base_are_searched_on_it() -> None:
    """QLoRA: the base stays as it is, and the mixture remembers how its parents' base was stored."""
    model = base()
    quantised = []
    for seed in (1, 2):
        lorary.attach(model, lorary.plan(model, lorary.method("qlora", r=2)))
        quantised.append(lorary.Adapter.of(tiny.shaken(model, seed=seed)))
        lorary.detach(model)
    before = tiny.frozen_copy(model)
    found = lorary.lorahub(model, quantised, rows(0), budget=6)
    assert tiny.same(tiny.frozen_copy(model), before)
    assert found.adapter.method.storage == quantised[0].method.storage
    with torch.no_grad():
        lorary.switch(model, found.adapter)
        losses = [(model(**one_row(row)).loss.item(), len(row["labels"]) - 2) for row in rows(0)]
    assert sum(m * n for m, n in losses) / sum(n for _, n in losses) == pytest.approx(found.loss, abs=1e-5)


# --- the search -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["product", "factor"])
def test_the_loss_of_each_adapter_alone_is_told(form: str) -> None:
    adapters, examples = task()
    found = lorary.lorahub(base(), adapters, examples, form=form, budget=4)
    for one, alone in zip(adapters.values() if isinstance(adapters, dict) else adapters, found.alone, strict=True):
        model = lorary.switch(base(), one).eval()
        losses = []
        for row in examples:
            labels = torch.tensor([row["labels"]])
            with torch.no_grad():
                mean = model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss.item()
            losses += [mean] * int((labels[:, 1:] != -100).sum())
        assert alone == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_a_seed_repeats_it_and_the_model_and_the_global_random_state_stay_as_they_were() -> None:
    adapters, examples = task()
    model = base()
    before, values, state = tiny.everything(model), tiny.frozen_copy(model), np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    steps: list[tuple[int, int, float]] = []
    found = lorary.lorahub(model, adapters, examples, budget=20, seed=5, progress=lambda *step: steps.append(step))
    np.random.rand(7)
    assert lorary.lorahub(model, adapters, examples, budget=20, seed=5).candidates == found.candidates
    assert lorary.lorahub(model, adapters, examples, budget=20, seed=6).candidates != found.candidates
    assert tiny.everything(model) == before
    assert tiny.same(tiny.frozen_copy(model), values)
    np.random.seed(0)
    assert len(state) == 624
    assert [s[:2] for s in steps] == [(i, 20) for i in range(1, 21)]
    assert [s[2] for s in steps] == [min(c.objective for c in found.candidates[: i + 1]) for i in range(20)]
    assert str(found).startswith(f"loss {found.loss:.4f} ({found.losses[0]:.4f} with all weights zero) after 20 cand")


def test_the_global_random_state_is_not_touched() -> None:
    adapters, examples = task()
    np.random.seed(11)
    expected = np.random.rand(3).tolist()
    np.random.seed(11)
    lorary.lorahub(base(), adapters, examples, budget=10)
    assert np.random.rand(3).tolist() == expected


@pytest.mark.parametrize("bounds", [(-0.2, 0.1), (0.0, 1.0), (-1.0, 0.0)])
def test_weights_stay_within_the_bounds(bounds: tuple[float, float]) -> None:
    adapters, examples = task()
    found = lorary.lorahub(base(), adapters, examples, budget=25, bounds=bounds)
    weights = np.array([c.weights for c in found.candidates])
    assert weights.min() >= bounds[0]
    assert weights.max() <= bounds[1]
    assert np.abs(weights).max() > 0


def test_one_adapter_s_strength_is_searched_too_and_a_large_penalty_leaves_the_base() -> None:
    adapters, examples = task()
    one = lorary.lorahub(base(), adapters[:1], examples, budget=25)
    assert len(one.weights) == 1
    assert one.loss < one.losses[0]
    assert lorary.lorahub(base(), adapters, examples, budget=15, l1=1e6).weights == (0.0, 0.0)


def test_a_loss_that_is_not_finite_is_the_worst() -> None:
    adapters, _ = task()
    calls = iter(range(100))

    def loss(model: nn.Module) -> float:
        return float("nan") if (i := next(calls)) % 3 == 1 else 2.0 - 0.01 * i

    found = lorary.lorahub(base(), adapters, loss, budget=20)
    assert np.isfinite(found.loss)
    with pytest.raises(DataError, match="the base alone has a loss of nan"):
        lorary.lorahub(base(), adapters, lambda model: float("nan"), budget=20)


def test_rows_batches_and_functions_give_one_loss() -> None:
    adapters, _ = task()
    examples = rows(7, 20)  # more than one batch of rows
    ids = [torch.tensor([row["input_ids"] for row in examples[i : i + 1]]) for i in range(20)]
    labels = [torch.tensor([row["labels"] for row in examples[i : i + 1]]) for i in range(20)]
    batches = [{"input_ids": i, "labels": x} for i, x in zip(ids, labels, strict=True)]

    def function(model: Any) -> Tensor:
        found = [(model(**batch).loss, len(batch["labels"][0]) - 2) for batch in batches]
        return sum(mean * n for mean, n in found) / sum(n for _, n in found)

    one, two, three = (
        lorary.lorahub(base(), adapters, given, budget=4).losses for given in (examples, batches, function)
    )
    assert one == pytest.approx(two, abs=1e-5)
    assert two == pytest.approx(three, abs=1e-5)


def test_encoder_decoders_and_plain_modules() -> None:
    """As in the paper, whose base is a T5; and any module with a function for its loss."""
    t5 = tiny.seeded("T5ForConditionalGeneration", decoder_start_token_id=0)
    lorary.attach(t5, lorary.plan(t5, lorary.method("lora", r=2), "all-linear"))
    one = lorary.Adapter.of(tiny.shaken(t5, 0.05))
    lorary.detach(t5)
    found = lorary.lorahub(t5, [one], [{"input_ids": [3, 4, 5], "labels": [7, 1]}, {"input_ids": [6], "labels": [8]}])
    assert len(found.losses) == 40
    vit = tiny.seeded("ViTForImageClassification")
    lorary.attach(vit, lorary.plan(vit, lorary.method("lora", r=2), "all-linear"))
    seen = dataclasses.replace(lorary.Adapter.of(tiny.shaken(vit, 0.05)), full={})  # the base's own head
    lorary.detach(vit)
    images = ({"pixel_values": torch.ones(n, 3, 8, 8), "labels": torch.zeros(n, dtype=torch.long)} for n in (1, 3))
    assert len(lorary.lorahub(vit, [seen], images, budget=5).losses) == 5
    net, x = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.ones(2, 4)
    lorary.attach(net, lorary.plan(net, lorary.method("lora", r=1), "all-linear"))
    two = lorary.Adapter.of(tiny.shaken(net))
    lorary.detach(net)
    assert lorary.lorahub(net, {"two": two}, lambda m: m(x).square().mean(), budget=6).names == ("two",)


@pytest.mark.slow
def test_it_beats_the_best_adapter_and_the_uniform_mix_on_an_unseen_mixture() -> None:
    """Five rows, half C and half prose, and adapters of each and of nothing; a small form of benchmarks/lorahub.py."""
    model, tokenizer = builtin.load_model(), builtin.load_tokenizer()

    def tokens(name: str, split: str) -> Tensor:
        text = "\n".join(record["text"] for record in corpora.load(name, split, fallback=True))
        return torch.tensor(tokenizer(text[:50_000])["input_ids"])

    def windows(of: Tensor, count: int, width: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.stack([of[i : i + width] for i in torch.randint(len(of) - width, (count,), generator=generator)])

    def attached() -> Any:
        return lorary.attach(model, lorary.plan(model, lorary.method("lora", r=4, alpha=8)))

    def trained(of: Tensor) -> None:
        optimizer = torch.optim.AdamW(lorary.param_groups(attached(), lr=5e-3))
        for step in range(20):
            batch = windows(of, 4, 96, step)
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def taken() -> lorary.Adapter:
        found = lorary.Adapter.of(model)
        lorary.detach(model)
        return found

    adapters: dict[str, lorary.Adapter] = {}
    names = ("builtin:c-headers", "builtin:topics")
    for name in names:
        trained(tokens(name, "train"))
        adapters[name] = taken()
    for seed in (1, 2):
        tiny.shaken(attached(), 0.02, seed)
        adapters[f"random {seed}"] = taken()
    unseen = [tokens(name, "validation") for name in names]
    few, held_out = (
        torch.cat([windows(of, count, 64, seed) for of in unseen], 1) for count, seed in ((5, 1), (16, 99))
    )

    def loss(of: lorary.Adapter | None) -> float:
        with torch.no_grad():
            return float(lorary.switch(model, of)(input_ids=held_out, labels=held_out).loss)

    found = lorary.lorahub(model, adapters, {"input_ids": few, "labels": few}, budget=30, seed=1)
    uniform = lorary.mix(adapters, [1 / 4] * 4)
    assert loss(found.adapter) < min(loss(None), loss(uniform), *map(loss, adapters.values())) - 0.02


# --- what it refuses --------------------------------------------------------------------------------------------------


def dora() -> lorary.Adapter:
    return adapter("dora")


def with_full() -> lorary.Adapter:
    one = adapter()
    return dataclasses.replace(one, full={"model.norm.weight": torch.zeros(16)})


def not_finite() -> lorary.Adapter:
    one = copy.deepcopy(adapter())
    next(iter(one.tensors.values()))["B"][0, 0] = float("nan")
    return one


def other_base() -> lorary.Adapter:
    model = tiny.seeded("LlamaForCausalLM", seed=5)
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2)))
    return lorary.Adapter.of(model)


BAD_ADAPTERS: list[tuple[Any, dict[str, Any], type[LoraryError], str]] = [
    ([], {}, MethodError, "adapters: is empty\n      hint: give at least one adapter"),
    ("runs/a", {}, MethodError, "is a str, not a sequence of adapters, or a mapping from names to adapters"),
    (adapter, {}, MethodError, "adapters: is a Adapter, not a sequence of adapters"),
    ([3], {}, MethodError, r"adapters\[0\]: is a int, not an Adapter"),
    (lambda: {"d": dora()}, {}, MethodError, "d: model.layers.0.self_attn.q_proj: gives its output a gain or a shift"),
    (lambda: {"f": with_full()}, {}, MethodError, "f: trains base parameters in full, such as model.norm.weight"),
    (lambda: {"n": not_finite()}, {}, MethodError, "n: .*q_proj: B.: 1 of 32 values are NaN or infinite"),
    (lambda: {"o": other_base()}, {}, MethodError, "o: other weights: .* in the base given"),
    (
        lambda: {"a": adapter(), "b": adapter(r=3)},
        {"form": "factor"},
        MethodError,
        'has rank 3, and rank 2 in a: the factors do not add\n      hint: use form="product"',
    ),
]


@pytest.mark.parametrize(("given", "options", "kind", "message"), BAD_ADAPTERS, ids=range(len(BAD_ADAPTERS)))
def test_bad_adapters(given: Any, options: dict[str, Any], kind: type[LoraryError], message: str) -> None:
    model = base()
    before = tiny.everything(model)
    with pytest.raises(kind, match=message):
        lorary.lorahub(model, given() if callable(given) else given, rows(0), budget=3, **options)
    assert tiny.everything(model) == before


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"form": "sum"}, "form: is 'sum'\n      hint: known: factor, product"),
    ({"bounds": (1.0, -1.0)}, r"bounds: is \(1.0, -1.0\); give the least and the greatest weight, 0 between them"),
    ({"bounds": (0.5, 1.0)}, "0 between them"),
    ({"bounds": (0.0, float("inf"))}, "0 between them"),
    ({"bounds": 3}, "bounds: is 3; give the least"),
    ({"l1": -1.0}, "l1: is -1.0, not a number of at least 0"),
    ({"l1": float("nan")}, "l1: is nan"),
    ({"budget": 0}, "budget: is 0, not a whole number of at least 1"),
    ({"budget": 2.5}, "budget: is 2.5"),
    ({"seed": -1}, "seed: is -1, not a whole number of at least 0"),
]


@pytest.mark.parametrize(("settings", "message"), SETTINGS, ids=[next(iter(s)) for s, _ in SETTINGS])
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        lorary.lorahub(base(), [adapter()], rows(0), **settings)


def test_all_bad_settings_are_told_at_once() -> None:
    with pytest.raises(MethodError) as refused:
        lorary.lorahub(base(), [adapter()], rows(0), form="x", budget=0, l1=-1)
    assert [p.where for p in refused.value.problems] == ["form", "l1", "budget"]


EXAMPLES: list[tuple[Any, str]] = [
    ([], "examples: is empty\n      hint: give rows such as"),
    ("data.jsonl", "examples: is a str"),
    (["text"], "example 0: is a str"),
    ([{"input_ids": [1, 2]}], "example 0: has no labels"),
    ([{"text": "x"}], "example 0: `text` is neither a tensor nor a list of numbers.*\n.*\n.*example 0: has no labels"),
    (torch.ones(2, 3), "examples: is a Tensor"),
    (7, "examples: is a int"),
    ([{"input_ids": [], "labels": []}], r"example 0: input_ids are \(0,\) of torch.float32, not a row of token ids"),
    ([{"input_ids": [1, 2], "labels": [-100, -100]}], "batch 0: no token has a label"),
    ([{"input_ids": [1], "labels": [1]}], "batch 0: no token has a label"),
    ([{"input_ids": [1, 2], "labels": [1, 2, 3]}], r"input_ids are \(1, 2\) and labels \(1, 3\)"),
    ([{"input_ids": [1.5, 2], "labels": [1, 2]}], r"example 0: input_ids are \(2,\) of torch.float32, not a row of t"),
    (lambda: lambda model: "low", "the function returned a str, not a number"),
]


@pytest.mark.parametrize(("examples", "message"), EXAMPLES, ids=range(len(EXAMPLES)))
def test_bad_examples(examples: Any, message: str) -> None:
    model = base()
    before = tiny.everything(model)
    with pytest.raises(DataError, match=message):
        lorary.lorahub(model, [adapter()], examples() if callable(examples) else examples, budget=3)
    assert tiny.everything(model) == before


def test_a_model_with_an_adapter_is_refused() -> None:
    model = lorary.switch(base(), adapter())
    with pytest.raises(StateError, match=r"something is attached\n      hint: lorary.detach it first"):
        lorary.lorahub(model, [adapter()], rows(0))


def test_a_missing_cma_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "cma":
            raise ImportError(name)
        return imported(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(LoraryError, match='cma: is not installed\n      hint: pip install "lorary\\[lorahub\\]"'):
        lorary.lorahub(base(), [adapter()], rows(0))
