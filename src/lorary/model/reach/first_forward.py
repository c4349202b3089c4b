"""Reach in the first training forward: one warning about the adapted sites that did not run.

The hooks remove themselves, so that later forwards cost nothing. Compiled code traces no hook.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from lorary.errors import caller_stacklevel
from lorary.layers.adapted import adapted_layers
from lorary.model.reach.proof import kinds_without
from lorary.model.scan import Scan
from lorary.model.targets import abbreviated, exclusions, grouped


class ReachWarning(UserWarning):
    """Adapters without effect: the model never calls their layers, or did not in its first training forward."""


def warn_of_bypassed(scan: Scan, sites: Iterable[str]) -> None:
    """Warn of the sites of a loaded adapter whose layers the model never calls."""
    found = {name: m.bypass for name in sites if (m := scan.modules.get(name)) and m.bypass and not m.bypass.called}
    for text, why in grouped({name: str(bypass) for name, bypass in found.items()}):
        warnings.warn(f"the adapter has no effect at {text}: {why}", ReachWarning, stacklevel=caller_stacklevel())


class FirstForward:
    """Watches the sites of a model until each has run, or a training forward has ended.

    Args:
        model: with adapters attached.
        unproved: the sites that may not run.
    """

    def __init__(self, model: nn.Module, unproved: Collection[str]) -> None:
        layers = adapted_layers(model)
        waiting = [name for name in unproved if name in layers]
        self._waiting = {name: layers[name].register_forward_pre_hook(partial(self._ran, name)) for name in waiting}
        self._end = model.register_forward_hook(self._ended) if waiting else None

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in (*self._waiting.values(), self._end):
            if handle is not None:
                handle.remove()

    def _ran(self, name: str, *_: Any) -> None:
        if not torch.compiler.is_compiling() and (handle := self._waiting.pop(name, None)):
            handle.remove()

    def _ended(self, model: nn.Module, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if self._waiting and not (model.training and torch.is_grad_enabled()):
            return  # evaluation may leave out what training needs
        self.remove()
        if not self._waiting:
            return
        layers = adapted_layers(model)
        waiting = self._waiting.keys() & layers.keys()  # some may have been merged since
        if idle := kinds_without(layers.keys() - waiting, sorted(waiting)):
            fix = f"if nothing else should run them, detach and plan again with {exclusions(idle, layers)}"
            text = f"no adapter ran in the first training forward at {abbreviated(idle)}: {fix}"
            warnings.warn(text, ReachWarning, stacklevel=2)
