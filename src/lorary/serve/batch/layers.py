"""The base's layers, computing mixed batches: each segment of rows with its own adapters."""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lorary.errors import Diagnostic, StateError, deduplicated
from lorary.layers.kinds import KINDS, kind_of
from lorary.layers.quantized_weight import compute_dtype
from lorary.layers.wrappers import unwrapped
from lorary.model.state import state_of
from lorary.serve.batch.batch import Batch
from lorary.serve.batch.merged import MergedWeights
from lorary.serve.batch.mixed import Covered, forward_of
from lorary.serve.batch.ops.table import AdapterTable
from lorary.serve.batch.prepared import PreparedBatch
from lorary.serve.batch.token_axis import token_axes
from lorary.serve.forms.serving_form import ServingForm, SiteForm

_MISSING = "the base has no such module"


class ServedLayers:
    """Lets the layers of a base compute with the adapters of a batch.

    A module that an adapter changes gets a `forward` of its own, which adds the adapters' terms to what its class's
    forward computes. The module tree, the weights and the state dict stay as they are.

    Args:
        model: the base, in evaluation mode, without an adapter. It runs one forward pass at a time.
        merged_budget: bytes for a second copy of weights, merged with adapters that have had the batch to themselves
            for some time, so that they cost nothing; 0 for none.
        merge_after: how many forward passes that is; None for as many as pay for merging.

    Raises:
        StateError: an adapter is attached to it.

    Example:
        >>> served = ServedLayers(model)
        >>> served.cover(form)
        >>> with served.computing(Batch.of([(((form, 1.0),), 5, 1), ((), 3, 1)])):
        ...     model(input_ids)
    """

    def __init__(self, model: nn.Module, *, merged_budget: int = 0, merge_after: int | None = None) -> None:
        model = unwrapped(model)
        if state_of(model) is not None:
            raise StateError("cannot serve:", [Diagnostic("model", "has an adapter attached", "detach it first")])
        self._model = model
        self._by_path = dict(model.named_modules(remove_duplicate=False))
        rowwise = {path: m for path, m in model.named_modules() if (kind := kind_of(m)) and KINDS[kind].rowwise}
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        widths = [sum(KINDS[str(kind_of(m))].size(m)) for m in rowwise.values()] or [1]
        dtypes = {path: compute_dtype(m, model) for path, m in rowwise.items()}
        self.table = AdapterTable(dtypes, device, statistics.median_low(widths))
        self._paths = {module: path for path, module in model.named_modules()}
        self.merged = MergedWeights(rowwise, merged_budget, merge_after) if merged_budget else None
        self._covered: dict[nn.Module, Covered] = {}
        self.batch: PreparedBatch | None = None

    def cover(self, form: ServingForm) -> None:
        """Let the modules that a form changes compute mixed batches. What is covered already stays so.

        Its tensors must stay where they are, on the base's device, as long as it exists.

        Raises:
            StateError: the base lacks a module, or a tensor has another shape or device; every reason.
        """
        if form in self.table:
            return
        problems = [p for path, site in form.sites.items() for p in self._site_problems(path, site)]
        problems += [p for path, own in form.overrides.items() for p in self._override_problems(path, own)]
        problems += [Diagnostic(path, _MISSING) for path in form.rotary if path not in self._by_path]
        if problems:
            raise StateError("cannot serve the adapter:", deduplicated(problems))
        for path in (*form.sites, *form.overrides, *form.rotary):
            self._cover(self._by_path[path])
        self.table.add(form)

    def remove(self) -> None:
        """Give all modules their own forward back."""
        for module, covered in self._covered.items():
            covered.restore(module)
        self._covered.clear()
        if self.merged is not None:
            self.merged.clear()

    @contextlib.contextmanager
    def computing(self, batch: Batch) -> Iterator[None]:
        """A block in which forward passes compute this batch, without gradients.

        Raises:
            StateError: an adapter is not covered, or the segments are not rows in order.
        """
        before = self.batch
        self.batch = None if batch.idle else PreparedBatch.of(batch, self.table, self.merged)
        try:
            with torch.no_grad():
                yield
        finally:
            self.batch = before

    @functools.cached_property
    def _axes(self) -> Mapping[str, int | None]:
        return token_axes(self._model)

    def _cover(self, module: nn.Module) -> None:
        if module in self._covered:
            return
        axes = self._axes  # before the first forward is replaced: a copy of the model could not run with it
        path = self._paths[module]
        self._covered[module] = covered = Covered(path, module, axes.get(path) if path in axes else -1)
        module.forward = forward_of(self, covered)

    def _site_problems(self, path: str, site: SiteForm) -> list[Diagnostic]:
        module = self._by_path.get(path)
        kind = None if module is None else kind_of(module)
        if kind is None:
            return [Diagnostic(path, "the base has no such layer")]
        out, inp = KINDS[kind].size(module)
        rank = 0 if site.A is None else len(site.A)
        expected = {"A": (rank, inp), "B": (out, rank), "gain": (out,), "shift": (out,), "d": (rank,), "b": (out,)}
        shapes = {role: tuple(t.shape) for role in expected if (t := getattr(site, role)) is not None}
        problems = [
            Diagnostic(path, f"{role} is {list(shape)}, and the layer takes {list(expected[role])}")
            for role, shape in shapes.items()
            if shape != expected[role]
        ]
        if ("A" in shapes) != ("B" in shapes):
            problems.append(Diagnostic(path, "has one of A and B without the other"))
        device = self.table.tensor.device
        places = {t.device for t in site[:6] if t is not None}
        if places - {device}:
            problems.append(Diagnostic(path, f"its tensors are on {places.pop()}, and the base is on {device}"))
        return problems

    def _override_problems(self, path: str, own: Mapping[str, Any]) -> list[Diagnostic]:
        module = self._by_path.get(path)
        if module is None:
            return [Diagnostic(path, _MISSING)]
        held = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        problems = []
        for name, value in own.items():
            if name not in held:
                problems.append(Diagnostic(f"{path}.{name}", "the base has no such parameter"))
            elif held[name].shape != value.shape:
                what = f"is {list(value.shape)}, and the base's is {list(held[name].shape)}"
                problems.append(Diagnostic(f"{path}.{name}", what))
        if kind_of(module) is None and self._axes.get(path, 0) is None:
            problems.append(Diagnostic(path, "does not get the tokens along one dimension, so rows cannot differ"))
        return problems
