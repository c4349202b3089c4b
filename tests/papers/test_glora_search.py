"""GLoRA's evolutionary search against the authors' algorithm on plain dictionaries, draw by draw."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn

import lorary
from lorary.analysis.supernet_search import EvolutionConfig
from lorary.layers.adapted import adapted_layers

CHOICES = {
    "A": ["lora", "vector", "scalar", "none"],
    "B": ["lora", "vector", "scalar", "none"],
    "C": ["lora", "vector", "none"],
    "D": ["vector", "scalar", "none"],
    "E": ["vector", "scalar", "none"],
}
LAYERS = 4
Candidate = tuple[tuple[str, ...], ...]  # layer -> the forms of its terms A to E


class Search:
    """The authors' search: every draw is one call of `choice` or `random`, in their order."""

    def __init__(self, score: Any, seed: int, population: int, keep: int, crossovers: int, mutations: int) -> None:
        self.score, self.population, self.keep = score, population, keep
        self.crossovers, self.mutations = crossovers, mutations
        self.random = random.Random(seed)
        self.judged: dict[Candidate, float] = {}
        self.best: list[Candidate] = []

    def judge(self, candidate: Candidate) -> bool:
        if candidate in self.judged:
            return False
        self.judged[candidate] = self.score(candidate)
        return True

    def run(self, generations: int) -> Candidate:
        candidates = self.fill([])
        for generation in range(generations):
            if generation:
                mutated = self.some(self.mutation, self.mutations)
                candidates = self.fill(mutated + self.some(self.crossover, self.crossovers))
            self.best = sorted(self.best + candidates, key=lambda c: self.judged[c], reverse=True)[: self.keep]
        return self.best[0]

    def fill(self, candidates: list[Candidate]) -> list[Candidate]:
        while len(candidates) < self.population:
            drawn = tuple(tuple(self.random.choice(forms) for forms in CHOICES.values()) for _ in range(LAYERS))
            if self.judge(drawn):
                candidates.append(drawn)
        return candidates

    def some(self, make: Any, count: int) -> list[Candidate]:
        found = []
        for _ in range(10 * count):
            if len(found) < count and self.judge(candidate := make()):
                found.append(candidate)
            if len(found) == count:
                break
        return found

    def mutation(self) -> Candidate:
        parent = self.random.choice(self.best)
        return tuple(
            tuple(
                self.random.choice(CHOICES[term]) if self.random.random() < 0.2 else parent[i][t]
                for t, term in enumerate(CHOICES)
            )
            for i in range(LAYERS)
        )

    def crossover(self) -> Candidate:
        one, other = self.random.choice(self.best), self.random.choice(self.best)
        return tuple(
            tuple(self.random.choice([one[i][t], other[i][t]]) for t in range(len(CHOICES))) for i in range(LAYERS)
        )


@pytest.mark.parametrize(
    ("population", "keep", "crossovers", "mutations"), [(50, 10, 25, 25), (12, 4, 7, 2), (9, 3, 9, 0), (6, 1, 2, 3)]
)
def test_it_is_the_authors_search_draw_by_draw(population: int, keep: int, crossovers: int, mutations: int) -> None:
    """The same candidates in the same order, and the same best one."""
    generator = torch.Generator().manual_seed(0)
    worth = [{t: torch.randn(4, generator=generator).tolist() for t in CHOICES} for _ in range(LAYERS)]

    def score(candidate: Candidate) -> float:
        terms = [(worth[i], dict(zip(CHOICES, forms, strict=True))) for i, forms in enumerate(candidate)]
        return sum(w[t][CHOICES[t].index(form)] for w, forms in terms for t, form in forms.items())

    seen: list[Candidate] = []

    def fitness(model: nn.Module) -> float:
        deltas = [layer.method.delta for layer in adapted_layers(model).values()]
        seen.append(tuple(tuple(delta.form(t) for t in CHOICES) for delta in deltas))
        return score(seen[-1])

    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(LAYERS)])
    lorary.attach(model, lorary.plan(model, lorary.method("glora", r=2, supernet=True)))
    settings = {"population": population, "keep": keep, "crossovers": crossovers, "mutations": mutations}
    found = lorary.search_supernet(model, fitness, EvolutionConfig(**settings, generations=8, seed=3))
    theirs = Search(score, 3, **settings)
    best = theirs.run(8)
    assert seen == list(theirs.judged)
    assert tuple(tuple(d.form(t) for t in CHOICES) for d in found.structures.values()) == best
    assert found.fitness == theirs.judged[best]
