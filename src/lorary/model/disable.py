"""disabled: the base model for a while, with the adapters still attached."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from torch import Tensor, nn

from lorary.errors import Diagnostic, StateError
from lorary.layers.adapted import adapted_layers
from lorary.layers.dtensor import distribute_like, is_sharded
from lorary.layers.wrappers import has_flat_parameters
from lorary.model.ambient import mode_independent
from lorary.model.buffers import base_buffers
from lorary.model.state import AttachedState, Suspended, base_parameter, require_attached

_LOCK = threading.RLock()  # reentrant: a generator that is collected while it is held may leave its own block


@contextlib.contextmanager
@mode_independent
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """The base model inside the block: adapters do nothing, and changed parameters have their old values.

    Being disabled is a state of the model, so every thread sees it. Blocks may overlap in any order, also in several
    threads, tasks or generators: the first one to be entered disables the adapters, and the last one to be left enables
    them. The adapter's tensors can be trained inside the block; base parameters have temporary values there, and what
    is written to them is dropped at its end.

    Raises:
        StateError: nothing is attached, or it is merged.
    """
    with _LOCK:
        state = require_attached(model, "disable")
        if state.suspended is None:
            state.suspended = _suspend(model, state)
        suspended = state.suspended
        suspended.blocks += 1
    try:
        yield model
    finally:
        with _LOCK:
            suspended.blocks -= 1
            if not suspended.blocks:
                _resume(state, suspended)


def _suspend(model: nn.Module, state: AttachedState) -> Suspended:
    """Put the base's values into the model, and return the adapted ones."""
    layers = list(adapted_layers(model).values())
    kept = [*state.full.items(), *((f"{site}.weight", before) for site, before in state.replaced_weights.items())]
    originals = [(base_parameter(model, name), before) for name, before in kept]
    if originals and has_flat_parameters(model):
        what = "is sharded by FSDP version 1, which holds the values of its parameters elsewhere"
        raise StateError("cannot disable:", [Diagnostic("model", what, "use FSDP2, torch's fully_shard")])
    # memory may run out here, so the model changes only afterwards; a tied weight is the one it was tied to
    copies = [(p, copied_like(p, before)) for p, before in originals if not isinstance(before, nn.Parameter)]
    tied = [(p, before) for p, before in originals if isinstance(before, nn.Parameter)]
    values = [(p, p.data.clone() if is_sharded(p) else p.data) for p, _ in originals]
    suspended = Suspended([(layer, layer.enabled) for layer in layers], values)
    try:
        if state.context_patch:
            state.context_patch.revert()
            suspended.context_patch = state.context_patch
        for layer in layers:
            layer.enabled = False
        for parameter, value in copies:
            set_values(parameter, value)
        for parameter, before in tied:  # its own values may be another site's residual, and are the base's by now
            parameter.data = before.data.to(parameter)
        suspended.buffers.enter_context(base_buffers(model, state.full, state.buffers))
    except BaseException:
        _resume(state, suspended)
        raise
    return suspended


def _resume(state: AttachedState, suspended: Suspended) -> None:
    """Put the adapted values back."""
    suspended.buffers.close()
    for layer, was in suspended.enabled:
        layer.enabled = was
    for parameter, value in suspended.values:
        set_values(parameter, value)
    if suspended.context_patch:
        suspended.context_patch.restore()
    state.suspended = None


def copied_like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """A copy: what is written to the parameter in the block must not reach the value kept for `detach`."""
    if is_sharded(parameter):
        return distribute_like(parameter, value.to(parameter.dtype))
    return value.to(parameter, copy=True)


def set_values(parameter: nn.Parameter, value: Tensor) -> None:
    """Swap pointers: a graph of before the block still has its own values. FSDP2 reads the memory of a shard itself."""
    if is_sharded(parameter):
        parameter.data.copy_(value)
    else:
        parameter.data = value.to(parameter)  # the model may have moved in the block
