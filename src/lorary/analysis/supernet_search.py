"""Evolutionary search of a trained GLoRA supernet: the best structure of every layer on held-out data.

The second stage of GLoRA (Chavan et al. 2023, arXiv:2306.07967, section 3.3), with the random draws of the authors'
code. Differs from it: candidates are scored on a validation split instead of the test data; those over the ceiling are
reduced at random instead of redrawn; a candidate without any parameter gets the smallest structure of a layer; and the
generation after the last selection, which the authors score and never rank, is left out.

No weight is trained. A candidate's tensors are views of the supernet's, so the scored model is exactly the resulting
adapter.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from lorary.adapters.adapter import Adapter
from lorary.errors import ConfigError, Diagnostic, MethodError, StateError
from lorary.layers.adapted import Adapted, Parameters, adapted_layers
from lorary.methods.glora import RandomStructures
from lorary.methods.glora_terms import FORMS, GLoRADelta, special_forms, structures
from lorary.model.ambient import callers_device, mode_independent
from lorary.model.state import eval_mode, require_attached
from lorary.spec.fields import COUNT, PORTION, SEED, WHOLE, field_errors, optional
from lorary.spec.placement import AdaptedSite

Genes = tuple[GLoRADelta, ...]  # the structure of every layer, in the model's order


@dataclass(frozen=True)
class EvolutionConfig:
    """The settings of a search; defaults from the authors' code.

    Args:
        population: candidates in a generation.
        keep: the best candidates so far, the parents of the next generation.
        crossovers: children that take each term of each layer from one of two parents.
        mutations: children with some terms redrawn.
        p: the probability that a mutation redraws a term.
        generations: their number; the first is random.
        ceiling: the most parameters of a candidate; None: any.
        seed: the same seed and fitness give the same adapter.

    Raises:
        ConfigError: every invalid field.
    """

    population: int = field(default=50, metadata=COUNT)
    keep: int = field(default=10, metadata=COUNT)
    crossovers: int = field(default=25, metadata=WHOLE)
    mutations: int = field(default=25, metadata=WHOLE)
    p: float = field(default=0.2, metadata=PORTION)
    generations: int = field(default=20, metadata=COUNT)
    ceiling: int | None = field(default=None, metadata=optional(COUNT))
    seed: int = field(default=0, metadata=SEED)

    def __post_init__(self) -> None:
        problems = [Diagnostic("", what) for what in field_errors(self)]
        if not problems and self.crossovers + self.mutations > self.population:
            what = f"{self.crossovers} crossovers and {self.mutations} mutations do not fit into {self.population}"
            problems.append(Diagnostic("population", what))
        if problems:
            raise ConfigError("invalid search settings:", problems)


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Args:
        adapter: the best candidate as a plain GLoRA adapter: each site has the terms of its structure.
        fitness: of the adapter.
        size: its number of parameters.
        structures: site -> its terms, including sites without any.
        history: the best fitness after each generation; ends early if no new candidates are left.
        judged: number of different candidates.
    """

    adapter: Adapter
    fitness: float
    size: int
    structures: Mapping[str, GLoRADelta] = field(repr=False)
    history: tuple[float, ...]
    judged: int


@mode_independent
def search_supernet(
    model: nn.Module,
    fitness: Callable[[nn.Module], float],
    evolution: EvolutionConfig | None = None,
    *,
    progress: Callable[[int, int, float], None] | None = None,
) -> SearchResult:
    """The best structure of every layer of a supernet. The model is unchanged afterwards.

    Args:
        model: with a supernet attached (`glora` with `supernet=True`), trained.
        fitness: scores the model on VALIDATION data, larger is better. Called once per candidate, in evaluation mode
            and without gradients; non-finite scores count as worst.
        evolution: settings of the search.
        progress: called after each candidate with (number judged, number at most, best fitness).

    Raises:
        StateError: no supernet is attached.
        MethodError: no candidate is within the ceiling, or none has a finite fitness.
        ConfigError: the fitness is not a function or does not return a number.
    """
    evolution = evolution or EvolutionConfig()
    _check_arguments(fitness, evolution)
    layers = _layers(model)
    pool = _Pool(layers, evolution)
    judged: dict[Genes, float] = {}
    history: list[float] = []
    total = evolution.population * evolution.generations
    with eval_mode(model), torch.no_grad():
        for _ in range(evolution.generations):
            candidates = pool.next_generation(_ranked(judged)[: evolution.keep], judged)
            if not candidates:  # the whole space has been judged
                break
            for genes in candidates:
                with structured(layers, genes), callers_device(model):
                    score = _number(fitness(model))
                judged[genes] = score if math.isfinite(score) else -math.inf
                if progress is not None:
                    progress(len(judged), total, max(judged.values()))
            history.append(max(judged.values()))
    best = _ranked(judged)[0]
    if judged[best] == -math.inf:
        problem = Diagnostic("fitness", f"is finite for none of {len(judged)} candidates")
        raise MethodError("no structure was found:", [problem])
    names = [layer.site.name for layer in layers]
    chosen = dict(zip(names, best, strict=True))
    return SearchResult(_adapter(model, chosen), judged[best], pool.size(best), chosen, tuple(history), len(judged))


def _check_arguments(fitness: object, evolution: object) -> None:
    problems = []
    if not callable(fitness):
        problems.append(Diagnostic("fitness", f"is {fitness!r}, not a function of a model"))
    if not isinstance(evolution, EvolutionConfig):
        problems.append(Diagnostic("evolution", f"is a {type(evolution).__name__}, not an EvolutionConfig"))
    if problems:
        raise ConfigError("cannot search:", problems)


def _number(score: object) -> float:
    try:
        return float(score)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        problem = Diagnostic("fitness", f"returned a {type(score).__name__}, not a number", "return one number")
        raise ConfigError("cannot search:", [problem]) from None


@contextmanager
def structured(layers: Sequence[Adapted], genes: Genes) -> Iterator[None]:
    """Within this context, the layers have these structures; their tensors are views of the supernet's."""
    before = [(layer.params, layer.method) for layer in layers]
    methods = {terms: layer.method.replace(delta=terms, rules=()) for layer, terms in zip(layers, genes, strict=True)}
    try:
        for layer, terms in zip(layers, genes, strict=True):
            views = terms.slices(dict(layer.params.items()))
            parts = {role: nn.Parameter(view.detach(), requires_grad=False) for role, view in views.items()}
            layer.params, layer.method = Parameters(parts), methods[terms]
        yield
    finally:
        for layer, (params, method) in zip(layers, before, strict=True):
            layer.params, layer.method = params, method


class _Pool:
    """The generator of candidates.

    Args:
        layers: of the supernet.
        evolution: settings of the search.
    """

    def __init__(self, layers: Sequence[Adapted], evolution: EvolutionConfig) -> None:
        self.evolution = evolution
        self.random = random.Random(evolution.seed)
        self.supernet = [cast(GLoRADelta, layer.method.delta) for layer in layers]
        self.forms = [special_forms(terms, layer.site.bias) for terms, layer in zip(self.supernet, layers, strict=True)]
        self.sizes = [
            {some: sum(map(math.prod, some.shapes(layer.site).values())) for some in structures(terms, layer.site.bias)}
            for terms, layer in zip(self.supernet, layers, strict=True)
        ]
        self.least = min(n for sizes in self.sizes for n in sizes.values() if n)
        if evolution.ceiling is not None and self.least > evolution.ceiling:
            what = f"{evolution.ceiling:,} is less than the smallest structure of any layer, {self.least:,} parameters"
            raise MethodError("no structure fits the ceiling:", [Diagnostic("ceiling", what)])

    def size(self, genes: Genes) -> int:
        """The number of parameters of a candidate."""
        return sum(sizes[terms] for sizes, terms in zip(self.sizes, genes, strict=True))

    def next_generation(self, parents: Sequence[Genes], judged: Mapping[Genes, float]) -> list[Genes]:
        """New candidates; fewer than the population if the space is exhausted."""
        found: dict[Genes, None] = {}
        settings = self.evolution
        if parents:
            self._add(found, judged, settings.mutations, lambda: self._mutated(self.random.choice(parents)))
            self._add(found, judged, settings.crossovers, lambda: self._crossed(parents))
        self._add(found, judged, settings.population - len(found), self._random)
        return list(found)

    def _add(
        self, found: dict[Genes, None], judged: Mapping[Genes, float], count: int, make: Callable[[], Genes]
    ) -> None:
        wanted = len(found) + count
        for _ in range(10 * count):  # bounded: a small space has few new candidates
            if len(found) == wanted:
                return
            genes = self._within_ceiling(list(make()))
            if genes not in judged:
                found[genes] = None

    def _child(self, form: Callable[[int, str], str]) -> Genes:
        """The candidate with the terms form(layer, term)."""
        return tuple(
            dataclasses.replace(terms, **{term: form(i, term) for term in FORMS})  # type: ignore[arg-type]
            for i, terms in enumerate(self.supernet)
        )

    def _random(self) -> Genes:
        return self._child(lambda i, term: self.random.choice(self.forms[i][term]))

    def _crossed(self, parents: Sequence[Genes]) -> Genes:
        one, other = self.random.choice(parents), self.random.choice(parents)  # equal ones give no new candidate
        return self._child(lambda i, term: self.random.choice((one[i], other[i])).form(term))

    def _mutated(self, genes: Genes) -> Genes:
        def form(i: int, term: str) -> str:
            redrawn = self.random.random() < self.evolution.p
            return self.random.choice(self.forms[i][term]) if redrawn else genes[i].form(term)

        return self._child(form)

    def _within_ceiling(self, genes: list[GLoRADelta]) -> Genes:
        """The candidate with terms reduced at random until it is within the ceiling; never empty."""
        sizes = [known[terms] for known, terms in zip(self.sizes, genes, strict=True)]
        ceiling = math.inf if self.evolution.ceiling is None else self.evolution.ceiling
        while sum(sizes) > ceiling:
            i = self.random.choice([i for i, size in enumerate(sizes) if size])
            genes[i] = self._reduced(genes[i])
            sizes[i] = self.sizes[i][genes[i]]
        if not any(sizes):
            smallest = [
                (i, terms) for i, known in enumerate(self.sizes) for terms in known if known[terms] == self.least
            ]
            i, genes[i] = self.random.choice(smallest)
        return tuple(genes)

    def _reduced(self, terms: GLoRADelta) -> GLoRADelta:
        """The structure with one term in the next smaller form."""
        term = self.random.choice([term for term in FORMS if terms.form(term) != "none"])
        forms = FORMS[term]
        return dataclasses.replace(terms, **{term: forms[forms.index(terms.form(term)) + 1]})  # type: ignore[arg-type]


def _layers(model: nn.Module) -> list[Adapted]:
    """The layers of the attached supernet.

    Raises:
        StateError: no supernet is attached.
    """
    state = require_attached(model, "search")
    layers = list(adapted_layers(model).values())
    glora = all(isinstance(layer.method.delta, GLoRADelta) for layer in layers)
    if not layers or not glora or not any(isinstance(rule, RandomStructures) for rule in state.method.rules):
        what, fix = "no supernet is attached: its parts were never trained alone", "train `glora` with supernet=True"
        raise StateError("cannot search this model:", [Diagnostic("model", what, fix)])
    return layers


def _ranked(judged: Mapping[Genes, float]) -> list[Genes]:
    """The candidates, best first; ties in order of evaluation."""
    return sorted(judged, key=lambda genes: -judged[genes])


def _adapter(model: nn.Module, chosen: Mapping[str, GLoRADelta]) -> Adapter:
    """The supernet's adapter, reduced to the chosen structure of each site."""
    supernet = Adapter.of(model)
    sites = [AdaptedSite(p.site, p.method.replace(delta=chosen[p.site.name], rules=())) for p in supernet.sites]
    sites = [p for p in sites if p.shapes]  # layers without any term stay unadapted
    tensors: dict[str, dict[str, Tensor]] = {}
    for p in sites:
        views = chosen[p.site.name].slices(supernet.tensors[p.site.name])
        tensors[p.site.name] = {role: view.clone(memory_format=torch.contiguous_format) for role, view in views.items()}
    return dataclasses.replace(supernet, method=supernet.method.replace(rules=()), sites=tuple(sites), tensors=tensors)
