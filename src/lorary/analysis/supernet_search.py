"""search: the structure of every layer of a trained supernet, found by evolution on held-out data.

The authors' second stage (Chavan et al. 2023, arXiv:2306.07967, section 3.3), with two differences: candidates are
judged on a validation split, where the authors' code judges them on the test data; and one that is over the ceiling is
cut back at random, where that code draws until it finds one that is not.

No weight is trained again. A candidate's tensors are views of the supernet's, so that what is judged is, number for
number, the adapter that comes out.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lorary.adapters.adapter import Adapter
from lorary.errors import ConfigError, Diagnostic, MethodError, StateError
from lorary.layers.adapted import Adapted, adapted_layers
from lorary.methods.glora import RandomStructures
from lorary.methods.glora_terms import FORMS, GLoRADelta, structures
from lorary.model.state import eval_mode, require
from lorary.spec.placement import AdaptedSite

Genes = tuple[GLoRADelta, ...]  # the structure of every layer, in the model's order


@dataclass(frozen=True)
class EvolutionConfig:
    """How a search goes on: the authors' numbers.

    Args:
        population: candidates in a generation.
        keep: the best of all so far, which are the parents of the next generation.
        crossovers: children that take the structure of each layer from one of two parents.
        mutations: children whose terms change, each with probability p.
        p: that a mutation draws a term anew.
        generations: how many, the first of which is random.
        ceiling: the most numbers that a candidate may hold; None: any.
        seed: of all draws: the same seed and the same fitness find the same adapter.

    Raises:
        ConfigError: every field that is no number, or out of range.
    """

    population: int = 50
    keep: int = 10
    crossovers: int = 25
    mutations: int = 25
    p: float = 0.2
    generations: int = 20
    ceiling: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if problems := self._no_numbers():
            raise ConfigError("invalid search settings:", problems)
        for name, least in (("population", 1), ("keep", 1), ("crossovers", 0), ("mutations", 0), ("generations", 1)):
            if (value := getattr(self, name)) < least:
                problems.append(Diagnostic(name, f"{value} is less than {least}"))
        if not 0 < self.p <= 1:
            problems.append(Diagnostic("p", f"{self.p} is no probability above 0"))
        if self.crossovers + self.mutations > self.population:
            what = f"{self.crossovers} crossovers and {self.mutations} mutations do not fit into {self.population}"
            problems.append(Diagnostic("population", what))
        if self.ceiling is not None and self.ceiling < 1:
            problems.append(Diagnostic("ceiling", f"{self.ceiling} leaves nothing to an adapter"))
        if problems:
            raise ConfigError("invalid search settings:", problems)

    def _no_numbers(self) -> list[Diagnostic]:
        """What is not of the sort that a field holds."""
        problems = []
        for f in dataclasses.fields(self):
            value, whole = getattr(self, f.name), f.name != "p"
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
                if f.name == "ceiling" and value is None:
                    continue
                problems.append(Diagnostic(f.name, f"{value!r} is no {'whole ' if whole else ''}number"))
        return problems


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Args:
        adapter: the best candidate, a plain GLoRA adapter: every site has the terms that it needs, and their tensors.
        fitness: of it.
        size: how many numbers it holds.
        structures: site -> its terms, sites that are left alone included.
        history: the best fitness after each generation; it ends where nothing new was left to judge.
        judged: how many different candidates were judged.
    """

    adapter: Adapter
    fitness: float
    size: int
    structures: Mapping[str, GLoRADelta] = field(repr=False)
    history: tuple[float, ...]
    judged: int


def search_supernet(
    model: nn.Module,
    fitness: Callable[[nn.Module], float],
    evolution: EvolutionConfig | None = None,
    *,
    progress: Callable[[int, int, float], None] | None = None,
) -> SearchResult:
    """The structures of a supernet's layers that do best. The model is as before afterwards.

    Args:
        model: with a supernet attached (`glora` with `supernet=True`), trained.
        fitness: how good the model is as it stands, on VALIDATION data: larger is better. It is called once for every
            candidate, in evaluation mode and without gradients; what is not finite counts as worst.
        evolution: how many candidates, and the ceiling.
        progress: called after each candidate with how many were judged, how many there may be, and the best fitness.

    Raises:
        StateError: no supernet is attached.
        MethodError: no candidate is within the ceiling, or none has a finite fitness.
        ConfigError: the fitness is no function, or gives no number.
    """
    evolution = evolution or EvolutionConfig()
    _check_words(fitness, evolution)
    layers = _layers(model)
    pool = _Pool(layers, evolution)
    judged: dict[Genes, float] = {}
    history: list[float] = []
    total = evolution.population * evolution.generations
    with eval_mode(model), torch.no_grad():
        for _ in range(evolution.generations):
            candidates = pool.next_generation(_ranked(judged)[: evolution.keep], judged)
            if not candidates:  # all that there are have been judged
                break
            for genes in candidates:
                with structured(layers, genes):
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


def _check_words(fitness: object, evolution: object) -> None:
    problems = []
    if not callable(fitness):
        problems.append(Diagnostic("fitness", f"is {fitness!r}, no function of a model"))
    if not isinstance(evolution, EvolutionConfig):
        problems.append(Diagnostic("evolution", f"is a {type(evolution).__name__}, not an EvolutionConfig"))
    if problems:
        raise ConfigError("cannot search:", problems)


def _number(score: object) -> float:
    try:
        return float(score)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        problem = Diagnostic("fitness", f"gave a {type(score).__name__} that is no number", "return one number")
        raise ConfigError("cannot search:", [problem]) from None


@contextmanager
def structured(layers: Sequence[Adapted], genes: Genes) -> Iterator[None]:
    """Within, each layer has a structure of its own; its tensors are views of the supernet's."""
    before = [(layer.params, layer.method) for layer in layers]
    methods = {terms: layer.method.replace(delta=terms, rules=()) for layer, terms in zip(layers, genes, strict=True)}
    try:
        for layer, terms in zip(layers, genes, strict=True):
            views = terms.slices(dict(layer.params.items()))
            parts = {role: nn.Parameter(view.detach(), requires_grad=False) for role, view in views.items()}
            layer.params, layer.method = nn.ParameterDict(parts), methods[terms]
        yield
    finally:
        for layer, (p, method) in zip(layers, before, strict=True):
            layer.params, layer.method = p, method


class _Pool:
    """Where candidates come from.

    Args:
        layers: of the supernet.
        evolution: how many of which sort, and the ceiling.
    """

    def __init__(self, layers: Sequence[Adapted], evolution: EvolutionConfig) -> None:
        self.evolution = evolution
        self.random = random.Random(evolution.seed)
        self.choices = [structures(layer.method.delta, layer.site.bias) for layer in layers]  # type: ignore[arg-type]
        self.sizes = [
            {terms: sum(map(math.prod, terms.shapes(layer.site).values())) for terms in choices}
            for layer, choices in zip(layers, self.choices, strict=True)
        ]
        self.least = min(n for sizes in self.sizes for n in sizes.values() if n)
        if evolution.ceiling is not None and self.least > evolution.ceiling:
            what = f"{evolution.ceiling:,} numbers are less than the smallest structure of any layer, {self.least:,}"
            raise MethodError("no structure fits the ceiling:", [Diagnostic("ceiling", what)])

    def size(self, genes: Genes) -> int:
        """How many numbers a candidate holds."""
        return sum(sizes[terms] for sizes, terms in zip(self.sizes, genes, strict=True))

    def next_generation(self, parents: Sequence[Genes], judged: Mapping[Genes, float]) -> list[Genes]:
        """Candidates that have not been judged, fewer where there are no more."""
        found: dict[Genes, None] = {}
        many = self.evolution
        if parents:
            self._add(found, judged, many.mutations, lambda: self._mutated(self.random.choice(parents)))
        if len(parents) > 1:
            self._add(found, judged, many.crossovers, lambda: self._crossed(*self.random.sample(parents, 2)))
        self._add(found, judged, many.population - len(found), self._drawn)
        return list(found)

    def _add(
        self, found: dict[Genes, None], judged: Mapping[Genes, float], many: int, make: Callable[[], Genes]
    ) -> None:
        wanted = len(found) + many
        for _ in range(10 * many):  # a small space has few that are new
            if len(found) == wanted:
                return
            genes = self._within(list(make()))
            if genes not in judged:
                found[genes] = None

    def _drawn(self) -> Genes:
        return tuple(self.random.choice(choices) for choices in self.choices)

    def _crossed(self, one: Genes, other: Genes) -> Genes:
        return tuple(self.random.choice(pair) for pair in zip(one, other, strict=True))

    def _mutated(self, genes: Genes) -> Genes:
        changed = []
        for terms, choices in zip(genes, self.choices, strict=True):
            anew = self.random.choice(choices)
            some = {term: anew.form(term) for term in FORMS if self.random.random() < self.evolution.p}
            changed.append(dataclasses.replace(terms, **some))  # type: ignore[arg-type]
        return tuple(changed)

    def _within(self, genes: list[GLoRADelta]) -> Genes:
        """These, with terms cut back at random until they are within the ceiling; never with nothing left."""
        sizes = [known[terms] for known, terms in zip(self.sizes, genes, strict=True)]
        ceiling = math.inf if self.evolution.ceiling is None else self.evolution.ceiling
        while sum(sizes) > ceiling:
            i = self.random.choice([i for i, size in enumerate(sizes) if size])
            genes[i] = self._less(genes[i])
            sizes[i] = self.sizes[i][genes[i]]
        if not any(sizes):
            smallest = [
                (i, terms) for i, known in enumerate(self.sizes) for terms in known if known[terms] == self.least
            ]
            i, genes[i] = self.random.choice(smallest)
        return tuple(genes)

    def _less(self, terms: GLoRADelta) -> GLoRADelta:
        """The same with one term in the next smaller form."""
        term = self.random.choice([term for term in FORMS if terms.form(term) != "none"])
        some = FORMS[term]
        return dataclasses.replace(terms, **{term: some[some.index(terms.form(term)) + 1]})  # type: ignore[arg-type]


def _layers(model: nn.Module) -> list[Adapted]:
    """The layers of the supernet that is attached.

    Raises:
        StateError: none is.
    """
    state = require(model, "search")
    layers = list(adapted_layers(model).values())
    whole = all(isinstance(layer.method.delta, GLoRADelta) for layer in layers)
    if not layers or not whole or not any(isinstance(rule, RandomStructures) for rule in state.method.rules):
        what, fix = "no supernet is attached: its parts were never trained alone", "train `glora` with supernet=True"
        raise StateError("cannot search this model:", [Diagnostic("model", what, fix)])
    return layers


def _ranked(judged: Mapping[Genes, float]) -> list[Genes]:
    """The best first; of equals the one that was judged first."""
    return sorted(judged, key=lambda genes: -judged[genes])


def _adapter(model: nn.Module, chosen: Mapping[str, GLoRADelta]) -> Adapter:
    """The supernet's adapter, of which each site keeps the structure that was chosen for it."""
    whole = Adapter.of(model)
    placed = [AdaptedSite(p.site, p.method.replace(delta=chosen[p.site.name], rules=())) for p in whole.sites]
    placed = [p for p in placed if p.shapes]  # where every term is none, the layer is left alone
    tensors: dict[str, dict[str, Tensor]] = {}
    for p in placed:
        views = chosen[p.site.name].slices(whole.tensors[p.site.name])
        tensors[p.site.name] = {role: view.clone(memory_format=torch.contiguous_format) for role, view in views.items()}
    return dataclasses.replace(whole, method=whole.method.replace(rules=()), sites=tuple(placed), tensors=tensors)
