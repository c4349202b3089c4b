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
    """A block in which no weight changes, so that what depends on the weights alone is computed once.

    DoRA's norm and GLoRA's shift of the bias are otherwise computed in every forward pass, because no cheap check
    reveals every way to write a tensor. For generation token by token they take longer than the layer itself.

    Blocks may be nested; the outermost one counts. Inside of it, whatever changes a weight is the caller's error, and
    is found when the block ends.

    Args:
        model: a model with an adapter; a plain one is left as it is.

    Raises:
        StateError: at the end of the block, if a weight changed inside of it: outputs since then were computed with a
            value from before. Every such layer is named.

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
        what = "its weights changed inside the block, and outputs since then were computed with a value from before"
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
