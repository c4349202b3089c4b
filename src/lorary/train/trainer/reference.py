"""The reference model of DPO, KTO and GRPO: the adapted model in another state, so that no second copy is loaded."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

from torch import nn

import lorary
from lorary.model.frozen_copy import FrozenCopy

Start = Literal["base", "start"]
"""`base`: the disabled adapter. `start`: a frozen copy of the adapter as training begins."""
State = Callable[[nn.Module], AbstractContextManager[Any]]


def reference_state(model: nn.Module, start: Start) -> State:
    """The context in which a model computes its reference.

    It is made before training, also of a resumed run, whose checkpoint is loaded later.

    Args:
        model: with a method attached, not yet sharded.
        start: which reference.
    """
    return lorary.disabled if start == "base" else FrozenCopy(model).in_place


class Reference(nn.Module):
    """The reference as a model of its own, as TRL's trainers call it.

    Args:
        policy: returns the adapted model. It is a function because a module would be registered as a submodule, and
            because FSDP replaces the model before training.
        config: the model's.
        state: a context in which that model computes the reference.
    """

    def __init__(self, policy: Callable[[], nn.Module], config: Any, state: State) -> None:
        super().__init__()
        self.policy = policy
        self.config = config
        self.state = state

    def forward(self, **inputs: Any) -> Any:
        model = self.policy()
        with self.state(model):
            return model(**inputs)
