"""The base's layers, computing mixed batches: each segment of rows with its own adapters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lorary.errors import Diagnostic, LoraryError, StateError
from lorary.layers.kinds import KINDS, kind_of
from lorary.serve.batch import Batch, Segment
from lorary.serve.ops.reference import with_terms
from lorary.serve.serving_form import ServingForm


class RowsError(LoraryError):
    """A layer got a number of rows that the batch says nothing of. It is a fault of the engine, not of a request."""


class ServedLayers:
    """Lets the layers of a base compute with the adapters of a batch.

    A layer that an adapter changes gets a `forward` of its own, which adds the adapters' terms to what its class's
    forward computes. The module tree, the weights and the state dict stay as they are.

    Args:
        model: the base, in evaluation mode. One forward pass at a time.

    Example:
        >>> served = ServedLayers(model)
        >>> served.cover(form)
        >>> with served.computing(Batch.of([(((form, 1.0),), 5, 1), ((), 3, 1)])):
        ...     model(input_ids)
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._originals: dict[nn.Module, Any] = {}
        self._batch: Batch | None = None

    def cover(self, form: ServingForm) -> None:
        """Let the modules that a form changes compute mixed batches; those that are covered stay so.

        Raises:
            StateError: the base lacks a module.
        """
        paths = [*form.sites, *form.overrides, *form.rotary]
        missing = [Diagnostic(path, "the base has no such module") for path in paths if path not in self._modules]
        if missing:
            raise StateError("cannot serve the adapter:", missing)
        for path in paths:
            module = self._modules[path]
            if module not in self._originals:
                self._originals[module] = vars(module).get("forward")
                module.forward = self._forward(path, module, module.forward)

    def remove(self) -> None:
        """Give all modules their own forward back."""
        for module, original in self._originals.items():
            if original is None:
                del module.forward
            else:
                module.forward = original
        self._originals.clear()

    @contextlib.contextmanager
    def computing(self, batch: Batch) -> Iterator[None]:
        """A block in which forward passes compute this batch."""
        before, self._batch = self._batch, None if batch.idle else batch
        try:
            yield
        finally:
            self._batch = before

    def _forward(self, path: str, module: nn.Module, plain: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            y = plain(*args, **kwargs)
            batch = self._batch
            return y if batch is None else self._mixed(path, module, batch, y, args, kwargs)

        return forward

    def _mixed(self, path: str, module: nn.Module, batch: Batch, y: Any, args: Any, kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        kind = kind_of(module)
        if isinstance(y, tuple):
            return self._mixed_rotary(path, batch, y, x, args, kwargs)
        if kind is None or KINDS[kind].rowwise:
            rows, flat_y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        elif kind == "embedding":
            rows, flat_y = x.reshape(-1), y.reshape(-1, y.shape[-1])
        else:
            rows, flat_y = x, y
        for segment in _segments(path, batch, len(rows)):
            part = slice(segment.start, segment.stop)
            for form, weight in segment.adapters:
                if path in form.overrides:
                    flat_y[part] = self._overridden(module, form.overrides[path], rows[part])
                if path in form.sites and kind is not None:
                    flat_y[part] = with_terms(KINDS[kind], module, flat_y[part], rows[part], form.sites[path], weight)
        return flat_y.view(y.shape)

    def _overridden(self, module: nn.Module, parameters: Any, rows: Tensor) -> Any:
        batch, self._batch = self._batch, None  # the module itself, not again its mixed forward
        try:
            return torch.func.functional_call(module, dict(parameters), (rows,))
        finally:
            self._batch = batch

    def _mixed_rotary(self, path: str, batch: Batch, y: tuple[Tensor, ...], x: Tensor, args: Any, kwargs: Any) -> Any:
        ids = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        rest = {name: value for name, value in kwargs.items() if name not in ("x", "position_ids")}
        ids = ids.expand(x.shape[0], -1).reshape(1, -1)
        parts = [part.expand(x.shape[0], *part.shape[1:]).flatten(0, 1).clone() for part in y]
        for segment in _segments(path, batch, ids.shape[1]):
            for form, _ in segment.adapters:
                if path in form.rotary:
                    own = form.rotary[path](x, ids[:, segment.start : segment.stop], *args[2:], **rest)
                    for whole, part in zip(parts, own, strict=True):
                        whole[segment.start : segment.stop] = part[0]
        return tuple(part.view(x.shape[0], -1, part.shape[-1]) for part in parts)


def _segments(path: str, batch: Batch, rows: int) -> tuple[Segment, ...]:
    found = batch.tables.get(rows)
    if found is None:
        what = f"it got {rows} rows, and the batch has {' or '.join(str(n) for n in sorted(batch.tables))}"
        raise RowsError("cannot compute the batch:", [Diagnostic(path, what)])
    return found
