"""Merged weights of the adapters that have had the whole batch for some steps: their layers cost what the base's do.

W' = gain W + w b B d A and its bias lie beside W, which is never written to. An adapter is merged once adding its terms
is estimated to have taken as long as merging would: while it stays alone, and if the estimate is right, that costs at
most twice the better choice. Weights are merged a few at each step, so that none of them takes long. The batch
computes with W' only while all its rows have these adapters; as soon as another one joins, layers add terms to the
base's output again. Only weights of 32 bits or more are merged: rounded to 16 bits, W' would lose much of an update,
which is a small part of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lorary.layers.kinds import KINDS, kind_of, why_not_adaptable
from lorary.layers.quantized_weight import is_quantized
from lorary.serve.batch.batch import Batch, Piece, Weighted
from lorary.serve.forms.serving_form import ServingForm, SiteForm

_BYTES_PER_STEP = 4 * 2**20  # of weights, and one weight at least
_SECONDS_OF_TERMS = 25e-6  # of a layer in a step: what the calls take, whatever its size (an estimate from two cores)
_BYTES_PER_SECOND = 3e9  # of weights that are merged: read, multiplied, written (likewise)

Pair = tuple[Tensor, Tensor | None]  # W' [out, in], b' [out]


class MergedWeights:
    """The merged weights of one adapter, or of one weighted sum.

    Args:
        layers: path -> layer of the base.
        budget: bytes at most; adapters whose layers need more are not merged.
        after: steps that adapters must have had to themselves; None for `steps_worth_merging`.
    """

    def __init__(self, layers: Mapping[str, nn.Module], budget: int, after: int | None = None) -> None:
        self._layers = {path: m for path, m in layers.items() if why_not_merged(m) is None}
        self._budget, self._after = budget, steps_worth_merging(self._layers.values()) if after is None else after
        self._adapters: tuple[tuple[weakref.ref[ServingForm], float], ...] = ()
        self._steps = self._left = 0  # steps alone; bytes that the step may still merge
        self._fits = False
        self._pairs: dict[str, Pair] = {}

    @property
    def bytes(self) -> int:
        """Bytes of the merged weights there are."""
        return sum(t.numel() * t.itemsize for pair in self._pairs.values() for t in pair if t is not None)

    def begin(self, batch: Batch) -> MergedWeights | None:
        """Count a step; itself, if the step may compute with merged weights."""
        adapters = _of_all_rows(batch)
        if adapters is None:
            self._steps = 0
            return None
        if not self._holds(adapters):
            self.clear()
            self._adapters = tuple((weakref.ref(form, self._forget), weight) for form, weight in adapters)
            self._fits = self._bytes_of(adapters) <= self._budget
        self._steps += 1
        self._left = _BYTES_PER_STEP
        return self if self._fits and self._steps > self._after else None

    def __contains__(self, path: str) -> bool:
        """Whether the weight of a layer can be merged."""
        return path in self._layers

    def of(self, path: str, pieces: Sequence[Piece]) -> Pair | None:
        """W' and b' of such a layer; None if it computes as usual.

        Args:
            path: of the layer.
            pieces: (start, stop, adapter, weight) of the step that has begun.
        """
        found = self._pairs.get(path)
        if found is not None or self._left <= 0:
            return found
        adapters = tuple((form, weight) for _, _, form, weight in pieces)
        if not _changes(path, adapters):
            return None
        self._left -= _bytes(self._layers[path])
        sites = [(site, weight) for form, weight in adapters if (site := form.sites.get(path)) is not None]
        self._pairs[path] = found = merged_pair(self._layers[path], sites)
        return found

    def clear(self) -> None:
        """Give up the merged weights."""
        self._pairs.clear()
        self._adapters, self._steps, self._fits = (), 0, False

    def _forget(self, _: weakref.ref[ServingForm]) -> None:
        self.clear()

    def _holds(self, adapters: Weighted) -> bool:
        held = self._adapters
        pairs = zip(held, adapters, strict=False)
        return len(held) == len(adapters) and all(a[0]() is b[0] and a[1] == b[1] for a, b in pairs)

    def _bytes_of(self, adapters: Weighted) -> int:
        paths = {path for form, _ in adapters for path in form.sites if path in self and _changes(path, adapters)}
        return sum(_bytes(self._layers[path]) for path in paths)


def _changes(path: str, adapters: Weighted) -> bool:
    """Whether adapters add terms to a layer, and nothing else."""
    return any(path in form.sites for form, _ in adapters) and not any(path in form.overrides for form, _ in adapters)


def spare_bytes(model: nn.Module) -> int:
    """Bytes of a second copy of all weights of a model that can be merged."""
    return sum(_bytes(layer) for layer in model.modules() if why_not_merged(layer) is None)


def steps_worth_merging(layers: Iterable[nn.Module]) -> int:
    """Steps in which adding terms to these layers takes as long as merging their weights once; 8 at least."""
    sizes = [_bytes(layer) for layer in layers]
    return max(8, round(sum(sizes) / _BYTES_PER_SECOND / (_SECONDS_OF_TERMS * max(1, len(sizes)))))


def _bytes(layer: nn.Module) -> int:
    return sum(p.numel() * p.itemsize for p in layer.parameters(recurse=False))


def why_not_merged(layer: nn.Module) -> str | None:
    """Why a layer's weight cannot be merged beside it; None if it can."""
    kind = kind_of(layer)
    if kind is None or not KINDS[kind].rowwise:
        return "it is not a linear layer"
    if is_quantized(layer):
        return "its weight is quantised: to quantise W' would lose the update"
    if why := why_not_adaptable(layer):
        return why
    if "forward" in vars(layer):
        return "another library has replaced its forward"
    dtype = KINDS[kind].matrix(layer).dtype
    return f"its weight is {dtype}: rounded to it, W' would lose much of the update" if dtype.itemsize < 4 else None


@torch.no_grad()
def merged_pair(layer: nn.Module, sites: list[tuple[SiteForm, float]]) -> Pair:
    """(W' [out, in], b' [out]) of a linear layer with these terms, in the dtype of its weight."""
    kind, bias = KINDS[str(kind_of(layer))], getattr(layer, "bias", None)
    W = kind.matrix(layer).detach().clone()
    b: Tensor | None = None if bias is None else bias.detach().clone()
    for site, weight in sites:
        if site.gain is not None:
            W.mul_(site.gain[:, None])
            b = None if b is None else b.mul_(site.gain)
        if site.A is not None and site.B is not None:
            B = site.B if site.d is None else site.B * site.d
            B = B if site.b is None else site.b[:, None] * B
            W.addmm_(B.to(W.dtype), site.A.to(W.dtype), alpha=weight)
        if site.shift is not None:
            b = (W.new_zeros(len(W)) if b is None else b).add_(site.shift, alpha=weight)
    return W, b


def _of_all_rows(batch: Batch) -> Weighted | None:
    """The adapters that all rows of a batch have; None if they differ."""
    found: Weighted | None = None
    for count, segments in batch.tables.items():
        if len(segments) != 1 or (segments[0].start, segments[0].stop) != (0, count):
            return None
        if found is not None and segments[0].adapters != found:
            return None
        found = segments[0].adapters
    return found
