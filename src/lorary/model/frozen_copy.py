"""FrozenCopy: an adapter as it is now, to be put in the place of the trained one for a while (DPO's reference)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from lorary.layers.adapted import Adapted, Parameters, adapted_layers
from lorary.model.disable import copied_like, set_values
from lorary.model.state import base_parameter, require_attached
from lorary.spec.method import Method


class FrozenCopy:
    """A copy of the adapter on a model, without dropout. It is as large as the adapter; the base is not copied.

    Args:
        model: with a method attached, not yet sharded.

    Raises:
        StateError: nothing is attached.
    """

    def __init__(self, model: nn.Module) -> None:
        state = require_attached(model, "copy")
        self.layers: dict[str, tuple[Parameters, Method]] = {}
        self.full = {name: base_parameter(model, name).detach().clone() for name in state.full}
        copies: dict[int, Parameters] = {}  # layers may share one set of tensors
        for name, layer in adapted_layers(model).items():
            params = copies.setdefault(id(layer.params), _frozen(layer))
            self.layers[name] = params, layer.method.replace(dropout=0.0)

    @contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """A context in which the model computes with the copy."""
        layers = adapted_layers(model)
        before = {name: (layer.params, layer.method, layer.active_structure) for name, layer in layers.items()}
        bases = [(base_parameter(model, name), value) for name, value in self.full.items()]
        kept: list[tuple[nn.Parameter, Tensor]] = [(p, p.data) for p, _ in bases]
        try:
            for name, layer in layers.items():
                params, method = self.layers[name]
                layer.params, layer.method, layer.active_structure = params.to(layer.weight.device), method, None
            for parameter, value in bases:
                set_values(parameter, copied_like(parameter, value))
            yield
        finally:
            for name, (params, method, structure) in before.items():
                layers[name].params, layers[name].method, layers[name].active_structure = params, method, structure
            for parameter, value in kept:
                set_values(parameter, value)


def _frozen(layer: Adapted) -> Parameters:
    return Parameters({role: nn.Parameter(p.detach().clone(), requires_grad=False) for role, p in layer.params.items()})
