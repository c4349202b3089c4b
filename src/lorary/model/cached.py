"""cached: a block in which values that depend on weights alone are computed once (DoRA's norm, GLoRA's shift)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lorary.errors import Diagnostic, StateError
from lorary.layers.adapted import Adapted, Kept, adapted_layers
from lorary.model.ambient import mode_independent


@contextmanager
@mode_independent
def cached(model: nn.Module) -> Iterator[nn.Module]:
    """A block in which no weight changes and DoRA's norm and GLoRA's shift of the bias are computed once.

    Outside of it they are computed in every forward pass, because no cheap check reveals every way to write a tensor.
    For generation token by token they take longer than the layer itself.

    Blocks may be nested; the outermost one counts. Changing a weight inside of it is an error of the caller, found when
    the block ends.

    Args:
        model: a model with an adapter; a plain one does not change.

    Raises:
        StateError: at the end of the block, if a weight changed inside of it, so that later outputs were computed with
            an old value; names every such layer.

    Example:
        >>> with lorary.cached(model):
        ...     tokens = model.generate(**inputs)
    """
    layers = {name: layer for name, layer in adapted_layers(model).items() if layer.kept is None}
    for layer in layers.values():
        layer.kept = Kept()
    try:
        yield model
        stale = [name for name, layer in layers.items() if _is_stale(layer)]
    finally:
        for layer in layers.values():
            layer.kept = None
    if stale:
        what = "its weights changed inside the block, and outputs since then were computed with the old value"
        fix = "change weights outside of the block"
        raise StateError("stale outputs in `lorary.cached`:", [Diagnostic(name, what, fix) for name in stale])


@torch.no_grad()
def _is_stale(layer: Adapted) -> bool:
    return any(not _same(make(), value) for value, make in (layer.kept or {}).values())


def _same(now: Tensor, before: Tensor) -> bool:
    """Whether two tensors have the same values; those of a model that has diverged may be NaN."""
    if (now.device, now.dtype, now.shape) != (before.device, before.dtype, before.shape):
        return False
    return now.is_meta or bool(torch.isclose(now, before, rtol=0.0, atol=0.0, equal_nan=True).all())
