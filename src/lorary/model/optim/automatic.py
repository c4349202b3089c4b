"""Rules that follow the gradients and the optimizer by themselves, in a loop that does not call them.

    penalty         its gradient is added to that of the loss, parameter by parameter, before PyTorch accumulates it:
                    once per optimizer step, also under DDP
    after_backward  at the end of every backward pass, on the gradients of the whole step so far. Of several
                    micro-batches the last one counts: what the rules remembered of the others, and made of their
                    gradients, is undone first
    after_step      after the optimizer's step

So it is the same in every loop, whatever computes the loss, accumulates and clips.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lorary.errors import Diagnostic, StateError
from lorary.kernels.torch_internals import engine_queue
from lorary.layers.adapted import adapted_layers
from lorary.layers.wrappers import is_sharded_model

_FOLLOWS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[AutomaticRules]] = weakref.WeakKeyDictionary()


class Called(Protocol):
    """What is called: `lorary.Rules`."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    states: list[dict[str, Tensor]]

    def penalty(self) -> Tensor | float: ...
    def after_backward(self) -> None: ...
    def after_step(self) -> None: ...


class AutomaticRules:
    """The hooks that call a method's rules.

    Args:
        rules: with an optimizer.

    Raises:
        StateError: FSDP has sharded the model: its hooks do not see whole gradients.
    """

    def __init__(self, rules: Called) -> None:
        if is_sharded_model(rules.model):
            what = "is sharded by FSDP, where hooks do not see whole gradients"
            problem = Diagnostic("model", what, "call the rules in the loop yourself, or use `lorary train`")
            raise StateError("the rules cannot follow the optimizer:", [problem])
        self.rules = rules
        self._penalty: dict[int, Tensor] | None = None
        self._before: list[dict[str, Tensor]] | None = None
        self._gradients: dict[int, Tensor] = {}  # before the rules changed them
        self._waiting = False
        take_over(rules.model, self)
        self._trained = _trained(rules.model)
        hooks = [p.register_hook(partial(self._with_penalty, p)) for p in self._trained]
        hooks += [p.register_post_accumulate_grad_hook(self._accumulated) for p in self._trained]
        assert rules.optimizer is not None
        self._handles = [*hooks, rules.optimizer.register_step_post_hook(self._stepped)]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _with_penalty(self, p: nn.Parameter, gradient: Tensor) -> Tensor:
        """The gradient of a parameter, the first time in a step with that of the penalty."""
        self._restore_gradient(p)  # to which this one will be added
        if self._penalty is None:
            self._penalty = {}  # this hook is called for the penalty's own gradients, too
            self._penalty = self._penalty_gradients()
        own = self._penalty.pop(id(p), None)
        return gradient if own is None else gradient + own.to(gradient)

    def _penalty_gradients(self) -> dict[int, Tensor]:
        """id of a parameter -> the penalty's gradient."""
        with torch.enable_grad():
            penalty = self.rules.penalty()
        if not isinstance(penalty, Tensor) or not penalty.requires_grad:
            return {}
        gradients = torch.autograd.grad(penalty, self._trained, allow_unused=True)
        return {id(p): g for p, g in zip(self._trained, gradients, strict=True) if g is not None}

    def _accumulated(self, _: Tensor) -> None:
        if not self._waiting:
            self._waiting = True
            call_after_backward(self._complete)

    def _restore_gradient(self, p: nn.Parameter) -> None:
        before = self._gradients.pop(id(p), None)
        if before is not None and p.grad is not None:
            p.grad.copy_(before)

    @torch.no_grad()
    def _complete(self) -> None:
        """The end of a backward pass."""
        self._waiting = False
        for p in self._trained:  # those that this batch did not use, such as an idle expert's
            self._restore_gradient(p)
            if self._penalty and (own := self._penalty.pop(id(p), None)) is not None:
                p.grad = own.contiguous() if p.grad is None else p.grad + own
        self._gradients = {id(p): p.grad.clone() for p in self._trained if p.grad is not None}
        if self._before is None:
            self._before = _copied(self.rules.states)
        else:
            self.rules.states = _copied(self._before)
        self.rules.after_backward()

    def _stepped(self, *_: Any) -> None:
        self._penalty = self._before = None
        self._gradients = {}
        self.rules.after_step()


def take_over(model: nn.Module, hooks: AutomaticRules) -> None:
    """Let these hooks alone follow a model: two callbacks in one trainer, or one of a run that broke off, add up."""
    earlier = _FOLLOWS.get(model)
    if earlier is not None and (before := earlier()) is not None:
        before.remove()
    _FOLLOWS[model] = weakref.ref(hooks)


def call_after_backward(function: Callable[[], None]) -> None:
    """Call a function at the end of the running backward pass, after DDP has averaged the gradients.

    PyTorch has no public name for this; DDP and FSDP use the same one. DDP queues its own work in the course of the
    pass, so that what is queued at its end comes later. Without that name the function is called at once, after every
    parameter: slower, and the same in one process, since the last call counts.
    """
    queue = engine_queue()
    if queue is None:
        function()
    else:
        queue(lambda: queue(function))


def _trained(model: nn.Module) -> list[nn.Parameter]:
    """The adapters' parameters that train, each once."""
    every = (p for layer in adapted_layers(model).values() for p in layer.params.values() if p.requires_grad)
    return list({id(p): p for p in every}.values())


def _copied(states: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{name: t.clone() for name, t in state.items()} for state in states]
