"""ranks_from_gradients: a rank for each layer from one batch's gradients, with as many trained numbers in all.

Of the gradient G = dL/dW of a layer, the k-th direction holds the share p_k = sigma_k^2 / sum sigma^2, and costs
out + in numbers. Directions are added one by one where they add the largest share per number, from a quarter of the
plan's rank to four times it: this maximises the sum over all layers of the share that their ranks cover. Shares and not
sizes, because Adam scales the gradient of every layer to the same step.

That ranks may follow the gradients is an idea of AdaLoRA (arXiv:2303.10512) and GoRA (He et al. 2025,
arXiv:2502.12171), which weigh |W * G|; the rule here is ours.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorary.errors import DataError, Diagnostic, LoraryError, PlanError, TrainingError, not_a
from lorary.layers.quantized_weight import is_quantized
from lorary.layers.wrappers import submodule
from lorary.methods.lora import LowRank
from lorary.model.ambient import mode_independent
from lorary.model.checks import changeable, model_mismatches, not_ready
from lorary.model.out_of_memory import is_out_of_memory
from lorary.model.plan import Plan
from lorary.model.scan import scan
from lorary.model.state import eval_mode, require_values
from lorary.spec.per_expert import no_experts
from lorary.spec.placement import AdaptedSite

_HEADLINE = "cannot take ranks from gradients:"
_SPREAD = 4  # ranks lie between a quarter of the plan's and four times it
_EXACT = 1024  # the smaller side of a matrix up to which all of its singular values are computed


@mode_independent
def ranks_from_gradients(model: nn.Module, batch: Mapping[str, Any], plan: Plan) -> dict[str, int]:
    """A rank for each site of a plan, by the spectrum of its gradient. The model is as before afterwards.

    The ranks train at most as many numbers as the plan does, and less than one more direction would add.

    Args:
        model: the base, without adapters, as the plan was made for it. Its values are read, and not changed.
        batch: inputs of the model with labels, so that its output has a `loss`.
        plan: of LoRA, or another method with two factors of any rank at each site.

    Returns:
        site -> rank, for `lorary.plan(model, method, ranks=...)` or `method.ranks` in a configuration.

    Raises:
        PlanError: the plan is of another model, or of a method whose sites have no rank of their own.
        StateError: the model has adapters, or no values.
        DataError: the model does not take the batch, or has no loss for it.
        TrainingError: the loss or a gradient is not finite, or no layer has a gradient.

    >>> ranks = ranks_from_gradients(model, batch, lorary.plan(model, lorary.method("lora", r=8)))
    >>> plan = lorary.plan(model, lorary.method("lora", r=8), ranks=ranks)
    """
    _check(model, batch, plan)
    with eval_mode(model), _spectra(model, plan.sites) as found:
        _backward(model, batch)
    _check_spectra(found)
    return allocated(plan.sites, found)


def allocated(sites: Sequence[AdaptedSite], spectra: Mapping[str, Tensor]) -> dict[str, int]:
    """site -> the rank that covers the most of all gradients with the numbers of these sites.

    Args:
        sites: with their ranks, which say how many numbers there are.
        spectra: site -> the share of every direction in its gradient, largest first; missing: no gradient.
    """
    cost = {s.site.name: s.trainable // s.r for s in sites}
    ranks = {s.site.name: max(s.r // _SPREAD, 1) for s in sites}
    most = {s.site.name: max(min(_SPREAD * s.r, _full_rank(s)), ranks[s.site.name]) for s in sites}
    free = sum(s.trainable for s in sites) - sum(cost[name] * r for name, r in ranks.items())

    def worth(name: str) -> float:
        shares = spectra.get(name)
        k = ranks[name]
        return float(shares[k]) / cost[name] if shares is not None and k < len(shares) else 0.0

    heap = [(-worth(name), order, name) for order, name in enumerate(ranks) if ranks[name] < most[name]]
    heapq.heapify(heap)
    while heap:
        _, order, name = heapq.heappop(heap)
        if cost[name] > free:
            continue  # a smaller layer may still have room
        ranks[name] += 1
        free -= cost[name]
        if ranks[name] < most[name]:
            heapq.heappush(heap, (-worth(name), order, name))
    return ranks


def _full_rank(s: AdaptedSite) -> int:
    """The rank above which the factors would have directions without use."""
    return min(s.site.in_features, *s.site.rows)


def _check(model: Any, batch: Any, plan: Any) -> None:
    """Refuse arguments of other types, and a plan that this model or rule cannot follow.

    Raises:
        PlanError, StateError, DataError: every reason of the first kind.
    """
    if problems := not_a(Plan, "a Plan", plan=plan):
        raise PlanError(_HEADLINE, problems)
    if problems := not_a(Mapping, "a mapping of the model's inputs", batch=batch):
        raise DataError(_HEADLINE, problems)
    scanned = scan(changeable(model, "measure"))
    problems = not_ready(scanned)
    if not problems:
        require_values(model)
        problems = model_mismatches(scanned, plan.sites, {}, ())
    if not plan.sites:
        problems.append(Diagnostic("plan", "adapts no layer", "plan lora"))
    problems += no_experts([s.site for s in plan.sites], "a rank by its gradient")
    for s in plan.sites:
        if not isinstance(s.delta, LowRank) or s.share:
            what = f"{type(s.delta).__name__} has no pair of factors of any rank there"
            problems.append(Diagnostic(s.site.name, what, "plan lora, or a method with its factors"))
    if problems:
        raise PlanError(_HEADLINE, problems)


def _backward(model: Any, batch: Mapping[str, Any]) -> None:
    """Forward and backward of one batch.

    Raises:
        DataError: there is no loss.
        TrainingError: it is not finite.
    """
    device = next(model.parameters()).device
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    with torch.enable_grad():
        loss = getattr(_output(model, moved), "loss", None)
        if not isinstance(loss, Tensor):
            raise DataError(_HEADLINE, [Diagnostic("batch", "the model's output has no loss", "add labels")])
        if not bool(torch.isfinite(loss)):
            raise TrainingError(_HEADLINE, _why_not_finite(model, float(loss.detach())))
        loss.backward()


def _output(model: Any, batch: Mapping[str, Any]) -> Any:
    """The output of the model.

    Raises:
        DataError: it does not take such a batch.
    """
    try:
        return model(**batch)
    except LoraryError:
        raise
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        shapes = ", ".join(f"{key} {list(t.shape)}" for key, t in batch.items() if isinstance(t, Tensor))
        what = f"the model does not take it ({shapes or 'no tensors'}): {error}"
        raise DataError(_HEADLINE, [Diagnostic("batch", what)]) from error


def _why_not_finite(model: nn.Module, loss: float) -> list[Diagnostic]:
    """The weights that are not finite; if all are, the batch."""
    fix = "the checkpoint is damaged: load the model again"
    bad = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    found = [Diagnostic(name, "holds numbers that are not finite", fix) for name in bad]
    return found or [Diagnostic("batch", f"the loss is {loss:g}", "has the batch a label in every row?")]


@contextmanager
def _spectra(model: nn.Module, sites: Sequence[AdaptedSite]) -> Iterator[dict[str, Tensor]]:
    """site -> the shares of its gradient's directions, after a backward pass inside of this context.

    Gradients of weights are taken one at a time and freed at once. That of a quantised layer is computed from its
    input and the gradient of its output.
    """
    found: dict[str, Tensor] = {}
    quantized: list[_QuantizedGradient] = []
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    by_weight: dict[nn.Parameter, list[AdaptedSite]] = {}
    with ExitStack() as stack:
        stack.callback(_restore, flags)
        for p, _, _ in flags:
            p.requires_grad_(False)
        for s in sites:
            layer: Any = submodule(model, s.site.name)
            if is_quantized(layer):
                quantized.append(_QuantizedGradient(s, found))
                stack.callback(layer.register_forward_hook(quantized[-1].forward).remove)
            else:
                by_weight.setdefault(layer.weight, []).append(s)
        for p in [*by_weight, *(_first_parameters(model) if quantized else ())]:
            p.requires_grad_(True)
            p.grad = None
            stack.callback(p.register_post_accumulate_grad_hook(_of_weight(by_weight.get(p, ()), found)).remove)
        yield found
        for each in quantized:
            each.measure()


def _restore(flags: Sequence[tuple[nn.Parameter, bool, Tensor | None]]) -> None:
    for p, trains, gradient in flags:
        p.requires_grad_(trains)
        p.grad = gradient


def _first_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The embeddings' weights: with a gradient there, one reaches every quantised layer."""
    weights = (m.weight for m in model.modules() if isinstance(m, nn.Embedding))
    return [weight for weight in weights if isinstance(weight, nn.Parameter)]


def _of_weight(sites: Sequence[AdaptedSite], found: dict[str, Tensor]) -> Any:
    """A hook that measures a weight's gradient and frees it."""

    def hook(p: nn.Parameter) -> None:
        if p.grad is not None:
            for s in sites:
                found[s.site.name] = shares(_matrices(s, p.grad))
        p.grad = None

    return hook


def _matrices(s: AdaptedSite, G: Tensor) -> list[Tensor]:
    """A gradient in a weight's own layout as the matrices [out, in] of the parts of a site."""
    return s.site.split(G.T if s.site.kind in ("transposed", "embedding") else G.flatten(1))


class _QuantizedGradient:
    """The gradient of a quantised linear layer's weight, G = sum of dL/dy^T x over the calls of the layer.

    It is measured and freed when all calls have added their part; at the end, if some outputs have no gradient.

    Args:
        s: the layer's site.
        found: takes the shares.
    """

    def __init__(self, s: AdaptedSite, found: dict[str, Tensor]) -> None:
        self.s, self.found = s, found
        self.G: Tensor | None = None
        self.missing = 0  # calls

    def forward(self, _: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> None:
        """A forward hook of the layer."""
        x = inputs[0].detach()
        if not y.requires_grad:
            return
        self.missing += 1

        def backward(gradient: Tensor) -> None:
            part = gradient.flatten(0, -2).float().T @ x.flatten(0, -2).float()
            self.G = part if self.G is None else self.G + part
            self.missing -= 1
            if not self.missing:
                self.measure()

        y.register_hook(backward)

    def measure(self) -> None:
        """Measure what has been added."""
        if self.G is not None:
            self.found[self.s.site.name] = shares(self.s.site.split(self.G))
            self.G = None


def shares(matrices: Sequence[Tensor]) -> Tensor:
    """The share of every direction in the squared norm of a gradient, largest first; of several parts, the mean.

    Not finite if the gradient is not; empty if it is zero.
    """
    found = []
    for G in matrices:
        total = torch.linalg.vector_norm(G, dtype=torch.float64).square()
        if not torch.isfinite(total):
            return torch.tensor([float("nan")])
        if total > 0:
            found.append(_singular_values(G.float()).double().square() / total)
    if not found:
        return torch.zeros(0)
    length = min(map(len, found))
    return torch.stack([each[:length] for each in found]).mean(0).cpu()


def _singular_values(G: Tensor) -> Tensor:
    """The singular values of a matrix; of a large one, enough of the largest, from a random projection."""
    if min(G.shape) <= _EXACT:
        exact: Tensor = torch.linalg.svdvals(G)
        return exact
    with torch.random.fork_rng(devices=[G.device] if G.is_cuda else []):
        torch.manual_seed(0)
        values = torch.svd_lowrank(G, q=_EXACT // 2)[1]
        return values


def _check_spectra(found: Mapping[str, Tensor]) -> None:
    """Refuse gradients that are not finite, and a batch that reaches no layer.

    Raises:
        TrainingError: every layer.
    """
    bad = [name for name, each in found.items() if not torch.isfinite(each).all()]
    problems = [Diagnostic(name, "its gradient is not finite") for name in bad]
    if not problems and not any(len(each) for each in found.values()):
        problems = [Diagnostic("batch", "no layer has a gradient", "has the batch any label?")]
    if problems:
        raise TrainingError(_HEADLINE, problems)
