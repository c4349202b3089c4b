"""search: what it finds, what it leaves alone, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.analysis.supernet_search import EvolutionConfig, structured
from lorary.errors import ConfigError, MethodError, StateError
from lorary.layers.adapted import adapted_layers
from lorary.methods.glora_terms import DOWN, FORMS, GLoRADelta
from tests.tiny import everything, frozen_copy, llama, logits, same, seeded, shaken

SUPERNET = lorary.method("glora", r=2, supernet=True)


def net(layers: int = 3, bias: bool = True) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(*[nn.Linear(6, 6, bias=bias) for _ in range(layers)])


def supernet(model: nn.Module | None = None, targets: Any = "all-linear", method: lorary.Method = SUPERNET) -> Any:
    """As after the first stage."""
    model = model if model is not None else net()
    lorary.attach(model, lorary.plan(model, method, targets))
    return shaken(model).eval()


def planted(goal: dict[str, GLoRADelta]) -> Any:
    """A fitness that counts the terms which are as in `goal`."""

    def fitness(model: nn.Module) -> float:
        layers = adapted_layers(model).values()
        return float(
            sum(layer.method.delta.form(t) == goal[layer.site.name].form(t) for layer in layers for t in FORMS)
        )

    return fitness


GOAL = {
    "0": GLoRADelta(2, "vector", "none", "lora", "scalar", "none"),
    "1": GLoRADelta(2, "none", "lora", "none", "none", "vector"),
    "2": GLoRADelta(2, "lora", "scalar", "vector", "vector", "scalar"),
}


def test_a_planted_optimum_is_found() -> None:
    found = lorary.search_supernet(supernet(), planted(GOAL))
    assert found.structures == GOAL
    assert found.fitness == 15.0
    assert found.judged <= 50 * 20
    assert list(found.history) == sorted(found.history)
    assert {p.site.name: p.delta for p in found.adapter.sites} == GOAL
    assert found.size == sum(p.trainable for p in found.adapter.sites)


def test_drawing_at_random_does_not_find_it() -> None:
    """As many candidates without parents: the search owes what it finds to evolution, not to luck."""
    found = lorary.search_supernet(supernet(), planted(GOAL), EvolutionConfig(crossovers=0, mutations=0))
    assert found.judged == 50 * 20
    assert found.fitness < 15.0


def test_what_the_data_asks_for_is_found() -> None:
    """A target that is the model with some structure of the supernet: on held-out inputs no other fits as well."""
    model = supernet(net(2))
    wanted = (
        GLoRADelta(2, "vector", "none", "none", "none", "none"),
        GLoRADelta(2, "none", "lora", "none", "none", "vector"),
    )
    x = torch.randn(40, 6)
    with structured(list(adapted_layers(model).values()), wanted), torch.no_grad():
        target = model(x)

    def fitness(model: nn.Module) -> float:
        return -float((model(x) - target).square().mean())

    found = lorary.search_supernet(model, fitness, EvolutionConfig(seed=1))
    assert tuple(found.structures.values()) == wanted
    assert found.fitness == 0.0
    lorary.switch(model, found.adapter)
    torch.testing.assert_close(model(x), target)


@pytest.mark.parametrize("ceiling", [1, 7, 40, 100])
def test_the_ceiling_is_respected(ceiling: int) -> None:
    seen = []

    def fitness(model: nn.Module) -> float:
        size = sum(p.numel() for layer in adapted_layers(model).values() for p in layer.params.values())
        seen.append(size)
        return float(size)

    found = lorary.search_supernet(
        supernet(), fitness, EvolutionConfig(generations=5, population=20, crossovers=8, mutations=8)
    )
    assert max(seen) > 100
    free = found.size
    seen.clear()
    found = lorary.search_supernet(
        supernet(), fitness, EvolutionConfig(generations=5, population=20, crossovers=8, mutations=8, ceiling=ceiling)
    )
    assert min(seen) > 0
    assert max(seen) <= ceiling < free
    assert found.size == found.fitness <= ceiling


def test_the_same_seed_finds_the_same() -> None:
    few = {"generations": 3, "population": 12, "crossovers": 4, "mutations": 4, "keep": 3}
    asked: list[list[Any]] = [[], [], []]
    for seed, log in zip((5, 5, 6), asked, strict=True):

        def fitness(model: nn.Module, log: list[Any] = log) -> float:
            log.append(tuple(layer.method.delta for layer in adapted_layers(model).values()))
            return planted(GOAL)(model)

        lorary.search_supernet(supernet(), fitness, EvolutionConfig(**few, seed=seed))
    assert asked[0] == asked[1] != asked[2]
    assert len(set(asked[0])) == len(asked[0]) == 36, "no candidate is judged twice"


def test_a_candidate_is_judged_as_the_adapter_that_it_would_be(tmp_path: Path) -> None:
    model = supernet(seeded("LlamaForCausalLM"))
    judged: dict[float, Tensor] = {}

    def fitness(model: nn.Module) -> float:
        assert not model.training
        assert not torch.is_grad_enabled()
        y = logits(model)
        judged[float(y.std())] = y
        return float(y.std())

    found = lorary.search_supernet(
        model, fitness, EvolutionConfig(generations=2, population=6, crossovers=2, mutations=2, keep=2)
    )
    lorary.save_adapter(found.adapter, tmp_path / "found")
    base = seeded("LlamaForCausalLM")
    lorary.load(base, tmp_path / "found")
    assert torch.equal(logits(base), judged[found.fitness])
    assert lorary.load_adapter(tmp_path / "found").sites == found.adapter.sites
    lorary.merge(base)
    torch.testing.assert_close(logits(base), judged[found.fitness], rtol=1e-4, atol=1e-5)


def test_the_model_is_as_before() -> None:
    model = supernet(llama()).train()
    before, values, y = everything(model), frozen_copy(model), logits(model)
    lorary.search_supernet(
        model, lambda m: 0.0, EvolutionConfig(generations=1, population=3, crossovers=0, mutations=0)
    )
    assert everything(model) == before
    assert same(frozen_copy(model), values)
    assert torch.equal(logits(model), y)


def test_it_is_as_before_after_a_fitness_that_fails() -> None:
    model = supernet(llama())
    before = everything(model)

    def fails(model: nn.Module) -> float:
        raise KeyError("held-out data")

    with pytest.raises(KeyError):
        lorary.search_supernet(model, fails)
    assert everything(model) == before


def test_slices_share_their_storage() -> None:
    model = supernet(net(1))
    (layer,) = adapted_layers(model).values()
    whole = dict(layer.params.items())
    for scalar, vector in (("scalar", "vector"), ("none", "lora")):
        some = GLoRADelta(2, scalar, vector, "vector", "scalar", "vector")
        with structured([layer], (some,)):
            for role, part in layer.params.items():
                assert part.untyped_storage()._cdata == whole[role].untyped_storage()._cdata, role
                assert part.data_ptr() == whole[role].data_ptr(), "every form begins where the largest does"
    forms = {
        form: GLoRADelta(2, *[f if f in FORMS[t] else "none" for t, f in zip(FORMS, [form] * 5, strict=True)])
        for form in ("vector", "scalar")
    }
    for role in DOWN.values():
        column = whole[role][:, 0] if whole[role].dim() == 2 else whole[role]
        assert torch.equal(forms["vector"].slices(whole)[role], column)
        if role != "Cd":
            assert torch.equal(forms["scalar"].slices(whole)[role], column[:1])


def test_layers_that_are_better_left_alone_are() -> None:
    goal = GOAL | {"1": GLoRADelta(2, *["none"] * 5)}
    found = lorary.search_supernet(supernet(), planted(goal))
    assert found.structures == goal
    assert [p.site.name for p in found.adapter.sites] == ["0", "2"]
    base = net()
    x = torch.randn(3, 6)
    lorary.switch(base, found.adapter)
    assert list(adapted_layers(base)) == ["0", "2"]
    assert base(x).isfinite().all()


def test_layers_without_a_bias_have_no_d_to_choose() -> None:
    found = lorary.search_supernet(supernet(net(2, bias=False)), lambda model: 0.0, EvolutionConfig(generations=1))
    assert {terms.D for terms in found.structures.values()} == {"none"}
    assert found.judged == 50


def test_a_smaller_space_is_searched_to_its_end() -> None:
    method = lorary.method("glora", A="scalar", B="none", C="none", D="none", E="vector", supernet=True)
    seen = set()

    def fitness(model: nn.Module) -> float:
        seen.add(tuple(layer.method.delta for layer in adapted_layers(model).values()))
        return 0.0

    found = lorary.search_supernet(supernet(net(1), method=method), fitness)
    assert found.judged == len(seen) == 2 * 3 - 1, "all but the one that has nothing"


def test_progress_is_told() -> None:
    told: list[tuple[int, int, float]] = []
    few = EvolutionConfig(generations=2, population=4, crossovers=1, mutations=1, keep=2)
    lorary.search_supernet(supernet(), planted(GOAL), few, progress=lambda *figures: told.append(figures))
    assert [(n, total) for n, total, _ in told] == [(n, 8) for n in range(1, 9)]
    assert [best for *_, best in told] == sorted(best for *_, best in told)


def test_what_is_not_finite_is_worst() -> None:
    def fitness(model: nn.Module) -> float:
        some = planted(GOAL)(model)
        return some if some < 8 else float("nan")

    assert lorary.search_supernet(supernet(), fitness, EvolutionConfig(generations=3)).fitness == 7.0
    with pytest.raises(MethodError, match="fitness: is finite for none of 50 candidates"):
        lorary.search_supernet(supernet(), lambda model: float("inf"), EvolutionConfig(generations=1))


def test_what_cannot_be_searched() -> None:
    plain = net()
    with pytest.raises(StateError, match="nothing to search"):
        lorary.search_supernet(plain, lambda model: 0.0)
    for method in (lorary.method("lora"), lorary.method("glora")):
        model = net()
        lorary.attach(model, lorary.plan(model, method))
        with pytest.raises(StateError) as refused:
            lorary.search_supernet(model, lambda model: 0.0)
        assert str(refused.value) == (
            "cannot search this model:\n"
            "  - model: no supernet is attached: its parts were never trained alone\n"
            "      hint: train `glora` with supernet=True"
        )


def test_settings_that_are_none() -> None:
    with pytest.raises(ConfigError) as refused:
        EvolutionConfig(population=10, keep=0, crossovers=-1, mutations=9, p=0.0, generations=0, ceiling=0)
    count = "it takes a whole number of at least"
    assert str(refused.value).splitlines() == [
        "invalid search settings:",
        f"  - EvolutionConfig has keep = 0; {count} 1",
        f"  - EvolutionConfig has crossovers = -1; {count} 0",
        "  - EvolutionConfig has p = 0.0; it takes a number above 0 and at most 1",
        f"  - EvolutionConfig has generations = 0; {count} 1",
        f"  - EvolutionConfig has ceiling = 0; {count} 1, or None",
    ]
    with pytest.raises(ConfigError, match="population: 9 crossovers and 9 mutations do not fit into 10"):
        EvolutionConfig(population=10, crossovers=9, mutations=9)
    method = lorary.method("glora", A="none", B="none", C="vector", D="none", E="none", supernet=True)
    with pytest.raises(MethodError, match="5 is less than the smallest structure of any layer, 6 parameters"):
        lorary.search_supernet(supernet(method=method), lambda model: 0.0, EvolutionConfig(ceiling=5))


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({"population": "x"}, "population = 'x'; it takes a whole number of at least 1"),
        ({"keep": None}, "keep = None; it takes a whole number of at least 1"),
        ({"keep": 1.5}, "keep = 1.5; it takes a whole number of at least 1"),
        ({"crossovers": 2.5}, "crossovers = 2.5; it takes a whole number of at least 0"),
        ({"mutations": True}, "mutations = True; it takes a whole number of at least 0"),
        ({"generations": "3"}, "generations = '3'; it takes a whole number of at least 1"),
        ({"ceiling": 1.5}, "ceiling = 1.5; it takes a whole number of at least 1, or None"),
        ({"seed": None}, "seed = None; it takes a whole number of at least 0"),
        ({"p": "x"}, "p = 'x'; it takes a number above 0 and at most 1"),
        ({"p": float("nan")}, "p = nan; it takes a number above 0 and at most 1"),
    ],
)
def test_numbers_of_a_search_that_are_none(numbers: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        EvolutionConfig(**numbers)
    assert str(refused.value) == f"invalid search settings:\n  - EvolutionConfig has {said}"


@pytest.mark.parametrize("score", [None, "x", 1j, torch.ones(3)])
def test_a_fitness_that_is_no_number(score: Any) -> None:
    model = supernet().train()
    before = everything(model)
    with pytest.raises(ConfigError) as refused:
        lorary.search_supernet(model, lambda _: score)
    assert str(refused.value) == (
        f"cannot search:\n  - fitness: returned a {type(score).__name__}, not a number\n      hint: return one number"
    )
    assert everything(model) == before


def test_what_is_no_fitness_and_no_evolution() -> None:
    with pytest.raises(ConfigError) as refused:
        lorary.search_supernet(supernet(), 3, {"population": 2})  # type: ignore[arg-type]
    assert str(refused.value) == (
        "cannot search:\n  - fitness: is 3, not a function of a model\n  - evolution: is a dict, not an EvolutionConfig"
    )


def test_a_search_ends_when_everything_has_been_judged() -> None:
    tiny = lorary.method("glora", r=1, supernet=True, A="vector", B="none", C="none", D="none", E="none")
    found = lorary.search_supernet(supernet(net(1), method=tiny), lambda _: 0.0, EvolutionConfig(generations=100_000))
    assert found.judged == 2  # a vector, a scalar: with none there would be no adapter
    assert len(found.history) == 1


@pytest.mark.parametrize("supernet", ["no", "false", 1, None])
def test_a_supernet_is_said_as_true_or_false(supernet: Any) -> None:
    with pytest.raises(MethodError) as refused:
        lorary.method("glora", supernet=supernet)
    assert str(refused.value) == (f"invalid method:\n  - supernet: is {supernet!r}; it takes true or false")
