"""lorahub: a mixture of trained adapters whose weights a gradient-free search finds on a few examples.

The method is in `lorary.methods.lorahub`. The factors of all adapters are stacked once, and each candidate is written
into one attached adapter, so that it costs little more than its forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from lorary.adapters.adapter import Adapter
from lorary.adapters.compose._arguments import disagreements, tensor_faults, terms_of
from lorary.adapters.compose.few_shot_loss import Examples, loss_on
from lorary.adapters.compose.gradient_free import minimise, require_cma
from lorary.adapters.compose.updates import Term
from lorary.adapters.compose.weighted_factors import WeightedFactors
from lorary.adapters.content_hash import content_hash
from lorary.adapters.provenance import Parent, Provenance
from lorary.adapters.switch import put_on
from lorary.errors import DataError, Diagnostic, MethodError, StateError, did_you_mean
from lorary.layers.adapted import adapted_layers
from lorary.model.ambient import mode_independent
from lorary.model.attach import detach
from lorary.model.checks import changeable
from lorary.model.state import eval_mode, state_of

FORMS = ("product", "factor")


class Candidate(NamedTuple):
    """Weights that a search has tried.

    Args:
        weights: of the adapters.
        loss: of their mixture on the examples.
        objective: the loss and the penalty on the weights.
    """

    weights: tuple[float, ...]
    loss: float
    objective: float

    def rank(self) -> float:
        """The objective; infinite if it is not finite."""
        return self.objective if math.isfinite(self.objective) else math.inf


@dataclass(frozen=True)
class WeightSearch:
    """The mixture of adapters that a search found. Prints as a table of the weights.

    Args:
        adapter: the mixture, a plain LoRA.
        names: of the adapters.
        weights: of the adapters, in their order.
        loss: of the mixture on the examples.
        candidates: everything that was tried, in order; the first is the base alone, with all weights zero.
        alone: the loss of each adapter alone, with weight 1.
    """

    adapter: Adapter
    names: tuple[str, ...]
    weights: tuple[float, ...]
    loss: float
    candidates: tuple[Candidate, ...] = field(repr=False)
    alone: tuple[float, ...]

    @property
    def losses(self) -> tuple[float, ...]:
        """The loss of every candidate: the curve of the search."""
        return tuple(candidate.loss for candidate in self.candidates)

    def __str__(self) -> str:
        head = f"loss {self.loss:.4f} ({self.losses[0]:.4f} with all weights zero) after {len(self.losses)} candidates"
        rows = zip(self.names, self.weights, self.alone, strict=True)
        return "\n".join([head, *(f"{w:+.4f}  {name} (alone: loss {alone:.4f})" for name, w, alone in rows)])


@mode_independent
def lorahub(
    model: nn.Module,
    adapters: Sequence[Adapter] | Mapping[str, Adapter],
    examples: Examples,
    *,
    form: str = "product",
    bounds: tuple[float, float] = (-1.5, 1.5),
    l1: float = 0.05,
    budget: int = 40,
    seed: int = 0,
    force: bool = False,
    progress: Callable[[int, int, float], None] | None = None,
) -> WeightSearch:
    """The weights with which adapters of one base fit a few examples best, and the adapter that they give.

    The objective is loss + l1 * mean of |w|. It starts at weights of zero, the base itself. Nothing is trained: the
    factors are stacked once, and each candidate is written into one attached adapter. The model is unchanged
    afterwards.

    Args:
        model: the base that all were trained on, with nothing attached; it may be quantised.
        adapters: of any methods whose update is B A alone; with their names, or without.
        examples: rows of token ids, `{"input_ids": [...], "labels": [...]}` with -100 where there is no label; batches
            of tensors as the model takes them; or a function from the model to its loss.
        form: "product", the sum of the updates, whose rank is the sum of the ranks; or "factor", the paper's sum of
            the factors, for adapters with the same sites and ranks.
        bounds: the least and the greatest weight; 0 is between them.
        l1: the strength of the penalty.
        budget: candidates at most, the base included. The paper has 40; sixteen for each adapter are better.
        seed: of the search. The same seed gives the same weights.
        force: accept adapters of another base, if every tensor fits.
        progress: called after each candidate with (number tried, budget, least objective).

    Returns:
        The adapter, its weights, and all candidates with their losses.

    Raises:
        MethodError: the adapters cannot be summed in this form; a setting is out of range. Every reason.
        DataError: the examples have no loss.
        StateError: something is attached to the model.
        LoraryError: the package `cma` is not installed.

    Example:
        >>> found = lorary.lorahub(model, {"c": c, "prose": prose}, rows, budget=30)
        >>> print(found)
        >>> lorary.save_adapter(found.adapter, "mixed")
    """
    inner = changeable(model, "search")
    if state_of(inner) is not None:
        problem = Diagnostic("model", "something is attached", "lorary.detach it first")
        raise StateError("cannot search for weights:", [problem])
    _check_settings(form, bounds, l1, budget, seed)
    terms = terms_of(adapters, None)
    if problems := tensor_faults(terms) + disagreements(terms, inner, force=force):
        raise MethodError("cannot mix these adapters:", problems)
    require_cma()
    factors = WeightedFactors(inner, {term.name: term.adapter for term in terms}, summed=form == "factor")
    tried: list[Candidate] = []
    with _writable(inner, factors, force=force) as write, eval_mode(inner), torch.no_grad():
        loss = loss_on(inner, examples)

        def objective(weights: tuple[float, ...]) -> float:
            write(weights)
            value = loss()
            tried.append(Candidate(weights, value, value + l1 * sum(map(abs, weights)) / len(weights)))
            if not math.isfinite(tried[0].loss):
                problem = Diagnostic("examples", f"the base alone has a loss of {tried[0].loss} on them")
                raise DataError("cannot search on these examples:", [problem])
            if progress is not None:
                progress(len(tried), budget, min(tried, key=Candidate.rank).objective)
            return tried[-1].objective

        minimise(objective, len(terms), bounds, budget, seed)
        alone = []
        for i in range(len(terms)):
            write([float(i == j) for j in range(len(terms))])
            alone.append(loss())
    settings = {"form": form, "bounds": [*bounds], "l1": l1, "budget": budget, "seed": seed}
    names = [term.name if isinstance(adapters, Mapping) else "" for term in terms]
    return _result(terms, names, factors, tried, settings, alone)


def _result(
    terms: Sequence[Term],
    names: Sequence[str],
    factors: WeightedFactors,
    tried: list[Candidate],
    settings: dict[str, Any],
    alone: Sequence[float],
) -> WeightSearch:
    """The best candidate as an adapter with its provenance; `names` are those that the parents have outside."""
    best = min(tried, key=Candidate.rank)
    settings |= {"loss": best.loss, "loss of the base": tried[0].loss, "candidates": len(tried)}
    hashes = [content_hash(term.adapter) for term in terms]
    parents = map(Parent, names, hashes, best.weights)
    adapter = replace(factors.adapter(best.weights), provenance=Provenance("lorahub", tuple(parents), settings))
    return WeightSearch(adapter, tuple(t.name for t in terms), best.weights, best.loss, tuple(tried), tuple(alone))


@contextmanager
def _writable(
    model: nn.Module, factors: WeightedFactors, *, force: bool
) -> Iterator[Callable[[Sequence[float]], None]]:
    """Attach the mixture, on the base's weights as they are; the function gives it other weights, in place."""
    zero = factors.adapter([0.0] * factors.count)
    put_on(model, zero, "the mixture", force=force, trainable=False, quantize=False)
    try:
        layers = adapted_layers(model)

        def write(weights: Sequence[float]) -> None:
            for name, layer in layers.items():
                for role, value in zip("BA", factors.at(name, weights), strict=True):
                    layer.params[role].copy_(value)

        yield write
    finally:
        detach(model)


def _check_settings(form: object, bounds: Any, l1: Any, budget: Any, seed: Any) -> None:
    """Check the settings of a search.

    Raises:
        MethodError: every one that is out of range.
    """
    problems = []
    if form not in FORMS:
        problems.append(Diagnostic("form", f"is {form!r}", did_you_mean(str(form), FORMS)))
    try:
        low, high = map(float, bounds)
        between = math.isfinite(high - low) and low <= 0 <= high and low < high
    except (TypeError, ValueError):
        between = False
    if not between:
        problems.append(Diagnostic("bounds", f"is {bounds!r}; give the least and the greatest weight, 0 between them"))
    if not isinstance(l1, int | float) or not 0 <= l1 < math.inf:
        problems.append(Diagnostic("l1", f"is {l1!r}, not a number of at least 0"))
    for name, value, least in (("budget", budget, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**32:
            problems.append(Diagnostic(name, f"is {value!r}, not a whole number of at least {least}"))
    if problems:
        raise MethodError("cannot search with these settings:", problems)
