"""extract: an adapter from two full checkpoints of one architecture, a base and what it was tuned to.

Both are read one parameter at a time. The change of a weight matrix becomes its best approximation by two factors;
everything else that has changed (norms, biases, buffers) is kept as it is in the tuned model, which is exact.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lorary.adapters.adapter import Adapter
from lorary.adapters.compose._checkpoints import Checkpoints, opened
from lorary.adapters.compose.dense import frobenius_norm, truncated_matrix
from lorary.adapters.compose.extraction import ExtractedSite, Extraction
from lorary.adapters.compose.plain_lora import PLAIN_LORA, plain_lora
from lorary.adapters.compose.truncate import cut_problems, relative
from lorary.adapters.provenance import Parent, Provenance
from lorary.adapters.tensor_checks import not_finite
from lorary.errors import Diagnostic, FileError, MethodError, PlanError
from lorary.files.safe_open import checked_path
from lorary.layers.kinds import KINDS, site
from lorary.model.ambient import mode_independent
from lorary.model.fingerprint import base_name
from lorary.model.scan import Scan, scan
from lorary.model.targets import resolve
from lorary.spec.interfaces import Factors
from lorary.spec.placement import AdaptedSite
from lorary.spec.site import Site

_HEADLINE = "cannot extract an adapter:"

Progress = Callable[[int, int, str], object]


@mode_independent
@torch.no_grad()
def extract(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    targets: str | Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Extraction:
    """An adapter that turns one checkpoint into another, as nearly as its ranks allow.

    For every linear, transposed (GPT-2), convolutional and embedding layer whose weight differs, the two factors are
    the truncated SVD of the difference, the nearest of that rank (Eckart and Young 1936). Norms, biases and all other
    parameters and buffers that differ are kept in full. A weight that several layers share gets factors at each.

    It needs the memory of the largest parameter three times in 32 bits, and of the adapter; the models are never whole
    in memory.

    Args:
        base: the folder or Hub id of the base, with its weights in safetensors; or builtin:base.
        tuned: that of the tuned model.
        rank: the most directions at a layer.
        energy: instead, the share of the squared norm of each layer's change to keep.
        targets: the layers to adapt, as for `lorary.plan`; None for all that differ. Other weight matrices that differ
            keep the base's values, and are listed in the result.
        progress: called before each parameter with (parameters done, all of them, its name).

    Returns:
        The adapter, which fits the base, and its error at every layer.

    Raises:
        MethodError: not exactly one of `rank` and `energy` is given, or it is out of range.
        PlanError: targets that match no layer that can be adapted.
        FileError: a checkpoint cannot be read, is quantised, or holds values that are not finite; the two differ in
            architecture, settings, parameters or shapes; or they are equal. Every reason.

    Example:
        >>> found = lorary.extract("org/base", "org/finetuned", rank=32)
        >>> print(found)
        >>> lorary.save_adapter(found.adapter, "adapter")
    """
    if problems := cut_problems(rank=rank, energy=energy):
        raise MethodError(_HEADLINE, problems)
    names = checked_path(base, _HEADLINE), checked_path(tuned, _HEADLINE)
    with opened(*names, _HEADLINE) as checkpoints:
        if problems := checkpoints.differences():
            raise FileError(_HEADLINE, problems)
        scanned = scan(checkpoints.base.model)
        changes = _Changes(_layers(scanned), _targeted(scanned, targets), {"rank": rank, "energy": energy})
        every = _tensor_names(scanned)
        for done, name in enumerate(every):
            if progress is not None:
                progress(done, len(every), name)
            changes.add(name, scanned.names.get(name, name), *checkpoints.pair(name))
        named = targets if targets is None or isinstance(targets, str) else list(targets)
        chosen = {"rank": rank, "energy": energy, "targets": named}
        settings = {key: value for key, value in chosen.items() if value is not None}
        record = Provenance("extract", tuple(Parent(base_name(name)) for name in names), settings)
        return changes.extraction(checkpoints, record)


def _layers(scanned: Scan) -> dict[str, Site]:
    """The name of a weight -> its layer, for all that can be adapted."""
    # without fused experts and the projections of nn.MultiheadAttention
    layers = {path: m for path, m in scanned.layers.items() if m.owner is None}
    adaptable = {path: m.module for path, m in layers.items() if m.why_not_adaptable is None}
    return {f"{path}.weight": site(path, module) for path, module in adaptable.items()}


def _targeted(scanned: Scan, targets: Any) -> set[str] | None:
    """The paths of the layers that targets match; None for all.

    Raises:
        PlanError: they match nothing, or what cannot be adapted; every problem.
    """
    if targets is None:
        return None
    matches, problems = resolve(scanned, targets)
    what, fix = "names projections of a fused weight, and the change of a weight is taken whole", "name the layer alone"
    problems += [Diagnostic(match.name, what, fix) for match in matches if match.parts]
    if problems:
        raise PlanError(_HEADLINE, problems)
    return {match.name for match in matches}


def _tensor_names(scanned: Scan) -> list[str]:
    """The parameters of every module, tied ones at each of their layers, and the buffers of a checkpoint."""
    parameters = [
        f"{path}.{name}" if path else name
        for path, m in scanned.modules.items()
        for name, _ in m.module.named_parameters(recurse=False, remove_duplicate=False)
    ]
    return [*parameters, *scanned.buffers]


@dataclass
class _Changes:
    """The changes between two checkpoints, collected one parameter at a time.

    Args:
        layers: the name of a weight -> its layer, for all that can be adapted.
        targeted: the paths of the layers to adapt; None for all.
        cut: rank or energy.
    """

    layers: Mapping[str, Site]
    targeted: set[str] | None
    cut: Mapping[str, Any]
    sites: list[ExtractedSite] = field(default_factory=list)
    factors: dict[str, Factors] = field(default_factory=dict)
    full: dict[str, Tensor] = field(default_factory=dict)
    left_out: dict[str, float] = field(default_factory=dict)
    problems: list[Diagnostic] = field(default_factory=list)
    equal: set[str] = field(default_factory=set)
    differing: set[str] = field(default_factory=set)

    def add(self, name: str, first: str, W: Tensor | None, tuned: Tensor | None) -> None:
        """Add the change of a parameter.

        Args:
            name: of the parameter, at its layer.
            first: its first name, if it is tied.
            W, tuned: its values, which may be overwritten; None for a buffer that a checkpoint lacks.
        """
        if W is None or tuned is None or torch.equal(W, tuned):
            self.equal.add(first)
            return
        self.differing.add(first)
        if W.shape != tuned.shape:
            what = f"is {tuple(W.shape)} in the base's files and {tuple(tuned.shape)} in those of the tuned model"
            self.problems.append(Diagnostic(name, what))
            return
        size = frobenius_norm(W)
        if not math.isfinite(size + frobenius_norm(tuned)):
            self.problems += not_finite({f"{name} of the base": W, f"{name} of the tuned model": tuned})
        if self.problems:  # there will be no adapter: only look for more
            return
        if name not in self.layers:
            value = _narrow(tuned)
            if not torch.equal(self.full.setdefault(first, value), value):
                what = f"is the same parameter as {first} in the base, and another one in the tuned model"
                self.problems.append(Diagnostic(name, what))
            return
        self._add_matrix(self.layers[name], size, tuned.sub_(W))

    def _add_matrix(self, layer: Site, weight: float, change: Tensor) -> None:
        if self.targeted is not None and layer.name not in self.targeted:
            self.left_out[f"{layer.name}.weight"] = frobenius_norm(change)
            return
        near = truncated_matrix(KINDS[layer.kind].matrix(SimpleNamespace(weight=change)), **self.cut)
        self.factors[layer.name] = near.B, near.A
        self.sites.append(ExtractedSite(layer.name, near.A.shape[0], weight, near.norm, near.lost, near.exact))

    def extraction(self, checkpoints: Checkpoints, record: Provenance) -> Extraction:
        """The adapter and its errors.

        Raises:
            FileError: values are not finite, or nothing has changed.
        """
        if self.problems:
            raise FileError(_HEADLINE, self.problems)
        if not self.factors and not self.full:
            what = "the layers to adapt are" if self.left_out else "all parameters are"
            raise FileError(_HEADLINE, [Diagnostic("", f"{what} equal in both checkpoints")])
        placed = [AdaptedSite(layer, PLAIN_LORA) for layer in self.layers.values()]
        method, sites, tensors = plain_lora(placed, self.factors, full=self.full)
        error = relative([(s.lost, s.change) for s in self.sites])
        record = dataclasses.replace(record, settings=dict(record.settings) | {"error": error})
        base = checkpoints.base.fingerprint(self.full)
        adapter = Adapter(method, sites, tensors, self.full, base, provenance=record)
        return Extraction(adapter, tuple(self.sites), self.left_out, len(self.equal - self.differing))


def _narrow(value: Tensor) -> Tensor:
    """A value in 16 bits if nothing is lost by that, else in 32."""
    half = value.bfloat16()
    return half if torch.equal(half.to(value.dtype), value) else value.float()
