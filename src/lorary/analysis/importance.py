"""LoRA-drop: the importance of every adapted layer, and the plan in which unimportant layers share tensors."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorary.errors import DataError, Diagnostic, PlanError, StateError, deduplicated, not_a
from lorary.layers.adapted import Adapted, adapted_layers
from lorary.layers.module_kinds import module_positions
from lorary.methods.lora_drop import (
    THRESHOLD,
    Importance,
    Measured,
    measuring_problems,
    sharing_problems,
    squared_norms,
    unknown_sites,
)
from lorary.model.ambient import callers_device, mode_independent
from lorary.model.plan import Plan
from lorary.model.state import eval_mode, require_attached, require_values
from lorary.spec.method import Method
from lorary.spec.per_expert import no_experts
from lorary.spec.placement import AdaptedSite, by_method

_MASKS = ("attention_mask", "decoder_attention_mask")


@torch.no_grad()
@mode_independent
def layer_importance(
    model: nn.Module, batches: Iterable[Any], *, over_ranks: Callable[[Tensor], Tensor] | None = None
) -> Importance:
    """The contribution of every adapted layer: the sum over all tokens of |s B A x|^2 (LoRA-drop's g).

    Measured in evaluation mode, without dropout and gradients; the model is unchanged afterwards. Padding by a batch's
    `attention_mask` does not count. For a residual init (PiSSA), the update is B A minus its start, and W the original
    weight.

    Args:
        model: with a method attached, trained for some steps.
        batches: inputs of the model: mappings of keyword arguments, tuples of arguments, or single tensors.
        over_ranks: sums a tensor over all ranks, if each has its own batches.

    Raises:
        StateError: nothing is attached, no layer has been trained, or outputs are not finite.
        PlanError: the method's update is not s B A x alone, or all layers share it already.
        DataError: there is no batch, or a layer's input cannot be matched to the attention mask.

    >>> layer_importance(model, [{"input_ids": ids, "attention_mask": mask}]).I["model.layers.0.self_attn.q_proj"]
    """
    state = require_attached(model, "measure")
    require_values(model)
    problems = _of_any(measuring_problems, state.method, state.sites)
    if problems := problems or no_experts([p.site for p in state.sites], "a measurement"):
        raise PlanError("cannot measure layer importance:", problems)
    _check_batches(batches, over_ranks)
    layers = adapted_layers(model)
    meter = _Meter(layers)
    with eval_mode(model), meter.reading():
        for batch in batches:
            meter.expect(batch, model)
            with callers_device(model):
                _call(model, batch)
    return meter.result(over_ranks or (lambda sums: sums))


def _check_batches(batches: object, over_ranks: object) -> None:
    """Refuse what is not a series of batches, or not a function.

    Raises:
        DataError: every reason.
    """
    problems = not_a(Iterable, "a series of batches", batches=batches)
    if isinstance(batches, Mapping | str | bytes | Tensor):
        problems.append(Diagnostic("batches", f"is one {type(batches).__name__}", "pass a list of batches: [batch]"))
    problems += not_a(Callable | None, "a function", over_ranks=over_ranks)
    if problems:
        raise DataError("cannot measure layer importance:", problems)


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple | list):
        model(*batch)
    else:
        model(batch)


class _Meter:
    """Sums over the batches, by hooks on the frozen bases of the layers.

    Args:
        layers: site -> layer.
    """

    def __init__(self, layers: Mapping[str, Adapted]) -> None:
        self.layers = layers
        self.sums: dict[str, list[Tensor]] = {name: [] for name in layers}  # per call [2]: |s B A x|^2, |W x|^2
        self.tokens = self.batches = 0
        self.masks: list[Tensor] = []

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Within this context, every call of a layer is measured."""
        with ExitStack() as stack:
            for name, layer in self.layers.items():
                hook = layer.base.register_forward_hook(self._hook(name, layer))
                stack.callback(hook.remove)
            yield

    def expect(self, batch: Any, model: nn.Module) -> None:
        """Count a batch, and take its masks, before the model is called with it."""
        self.batches += 1
        given = batch if isinstance(batch, Mapping) else {}
        masks = {key: given[key] for key in _MASKS if isinstance(given.get(key), Tensor)}
        _check_masks(masks, model)
        self.masks = [mask.bool() for mask in masks.values()]
        ids = next((given[key] for key in ("input_ids", "inputs_embeds") if given.get(key) is not None), None)
        self.tokens += int(self.masks[0].sum()) if self.masks else 0 if ids is None else ids.shape[:2].numel()

    def _hook(self, name: str, layer: Adapted) -> Callable[..., None]:
        def measure(_: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> None:
            update, base = _norms(layer, inputs[0], y)  # [...] each
            tokens = self._token_rows(name, tuple(update.shape))
            if tokens is not None:
                tokens = tokens.to(update.device)
                update, base = update.where(tokens, 0.0), base.where(tokens, 0.0)
            self.sums[name].append(torch.stack([update.sum(), base.sum()]))

        return measure

    def _token_rows(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """The rows [...] of a layer's input that are not padding; None if all are tokens."""
        if all(mask.all() for mask in self.masks):
            return None
        fitting = [rows for mask in self.masks if (rows := _mask_of_rows(mask, shape)) is not None]
        if not fitting:
            masks = " and ".join(str(list(mask.shape)) for mask in self.masks)
            what = f"has inputs of shape {list(shape)}, which an attention mask of {masks} does not fit"
            raise _unmatched(name, what, "measure on batches without padding, such as one row each")
        if any(not torch.equal(fitting[0], other) for other in fitting[1:]):
            what = "has inputs that both masks of the batch fit, but the masks differ"
            raise _unmatched(name, what, "measure on batches whose two sides differ in length")
        return fitting[0]

    def result(self, over_ranks: Callable[[Tensor], Tensor]) -> Importance:
        """The sums over all ranks as an `Importance`."""
        rows = [torch.stack(calls).cpu().double().sum(0) if calls else torch.zeros(2) for calls in self.sums.values()]
        sums = torch.stack([*rows, torch.tensor([float(self.tokens), float(self.batches)])]).double()
        *found, (tokens, batches) = over_ranks(sums).tolist()
        headline = "cannot measure layer importance:"
        if not batches:
            raise DataError(headline, [Diagnostic("batches", "there is none")])
        by_name = dict(zip(self.layers, found, strict=True))
        if wrong := [name for name, pair in by_name.items() if not all(map(math.isfinite, pair))]:
            raise StateError(headline, deduplicated(Diagnostic(name, "its outputs are not finite") for name in wrong))
        if not any(update for update, _ in found):
            what = "no adapter changes the output of its layer: nothing is trained yet"
            raise StateError(headline, [Diagnostic("model", what, "train for some steps first")])
        measured = (
            Measured(name, update, (update / base) ** 0.5 if base else 0.0) for name, (update, base) in by_name.items()
        )
        return Importance(tuple(measured), int(tokens))


def _norms(layer: Adapted, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(|s B A x|^2, |W x|^2) of every row of an input, in at least 32 bits; y is the base's output."""
    site, kind, base = layer.site, layer.kind, layer.base
    B, A = layer.factors()
    B, A = (factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in (B, A))
    x = x.to(A.dtype) if x.is_floating_point() else x
    w = y.to(A.dtype) if layer.bias is None else y.to(A.dtype) - kind.broadcast_over_rows(layer.bias.to(A.dtype))
    start = layer.start_factors()
    if start is not None:  # the original W is the residual + s B0 A0
        B0, A0 = (factor.to(A) for factor in start)
        w = kind.add(base, w, x, A0, B0, layer.scale, 0.0)
        B, A = torch.cat([B, -B0], 1), torch.cat([A, A0])
    z = kind.run(base, x, A.repeat(site.groups, 1), None)  # A x, for each group of a convolution
    if site.kernel_size:
        z, w = z.movedim(-len(site.kernel_size) - 1, -1), w.movedim(-len(site.kernel_size) - 1, -1)
    if site.parts:  # the adapted rows of W
        w = w[..., torch.cat([part.rows(w.device) for part in site.parts])]
    return squared_norms(z, B, layer.scale, site.groups), w.square().sum(-1)


def _mask_of_rows(mask: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """A mask [batch, tokens] in the shape of a layer's rows: one per token (flat or not) or one per example."""
    if shape[:2] == mask.shape:
        return mask.reshape(*mask.shape, *[1] * (len(shape) - 2)).expand(shape)
    if shape == (mask.numel(),):
        return mask.flatten()
    return mask.any(1) if shape == mask.shape[:1] else None


def _check_masks(masks: Mapping[str, Tensor], model: nn.Module) -> None:
    for name, mask in masks.items():
        if mask.dim() != 2:
            what = f"has the shape {list(mask.shape)}, expected [batch, tokens]"
            raise _unmatched(name, what, "give the mask that marks padding")
        if bool(((mask != 0) & (mask != 1)).any()):  # an additive mask has 0 for tokens
            raise _unmatched(name, "holds other values than 0 and 1", "give the mask that marks padding")
    two_sided = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if two_sided and len(masks) == 1:
        (missing,) = set(_MASKS) - set(masks)
        raise _unmatched(missing, "is missing: padding of one side is unknown", "give both masks, or none")


def _unmatched(where: str, what: str, fix: str) -> DataError:
    return DataError("cannot tell padding from tokens:", [Diagnostic(where, what, fix)])


@mode_independent
def drop_layers(plan: Plan, importance: Importance, threshold: float = THRESHOLD) -> Plan:
    """The plan in which important layers keep their own tensors, and the others of a module kind share one set.

    Of every module kind, the fewest layers that together have `threshold` of its importance are kept. The others share
    if they have the same shapes, ranks and scales; a single remaining layer keeps its own tensors at the same cost.

    Args:
        plan: of the probe.
        importance: of the plan's sites, measured with the probe.
        threshold: the paper's T, above 0 and at most 1; 1 keeps all layers.

    Raises:
        PlanError: the method cannot be shared, the importance is invalid or of other sites, or T is out of range.

    >>> print(drop_layers(plan, layer_importance(model, batches)))
    """
    if problems := not_a(Plan, "a Plan", plan=plan) + not_a(Importance, "an Importance", importance=importance):
        raise PlanError("cannot drop layers from this plan:", problems)
    problems = _of_any(sharing_problems, plan.method, plan.sites)
    problems += unknown_sites(importance.g, (p.site.name for p in plan.sites))
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 < threshold <= 1:
        problems.append(Diagnostic("threshold", f"{threshold!r} is not a number above 0 and at most 1"))
    for site, g in importance.g.items():
        if not 0 <= g < float("inf"):
            problems.append(Diagnostic(site, f"its importance is {g!r}, not a finite number of at least 0"))
    if problems:
        raise PlanError("cannot drop layers from this plan:", problems)
    names = _shares(plan.sites, importance.kept(threshold))
    sites = tuple(dataclasses.replace(p, share=names.get(p.site.name, "")) for p in plan.sites)
    return dataclasses.replace(plan, sites=sites, notes=(*plan.notes, _note(sites, threshold)))


def _of_any(
    problems: Callable[[Method], list[Diagnostic]], method: Method, sites: Sequence[AdaptedSite]
) -> list[Diagnostic]:
    """The problems of each method, if there are several."""
    methods = [group[0].method for group in by_method(sites)] or [method]
    return deduplicated(problem for one in methods for problem in problems(one))


def _shares(sites: Sequence[AdaptedSite], kept: Collection[str]) -> dict[str, str]:
    """site -> the name of its shared set: the module kind, numbered if a kind needs several sets."""
    kinds = module_positions(p.site.name for p in sites)
    groups: dict[tuple[Any, ...], list[str]] = {}
    for p in sites:
        s = p.site
        if s.name in kept:
            continue
        alike = (s.kind, s.out_features, s.in_features, s.parts, s.groups, s.kernel_size, p.method)
        groups.setdefault((kinds[s.name].kind, *alike), []).append(s.name)
    names: dict[str, str] = {}
    sets: Counter[str] = Counter()
    for (kind, *_), members in groups.items():
        if len(members) > 1:
            sets[kind] += 1
            names |= dict.fromkeys(members, kind if sets[kind] == 1 else f"{kind} {sets[kind]}")
    return names


def _note(sites: Sequence[AdaptedSite], threshold: float) -> str:
    shares = [p.share for p in sites]
    own, sets = shares.count(""), len({name for name in shares if name})
    others = f"the other {len(shares) - own} share {sets}, one for each module kind" if sets else "none shares"
    return f"LoRA-drop, T = {threshold:g}: {own} of {len(shares)} layers have tensors of their own, {others}"
