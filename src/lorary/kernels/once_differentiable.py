"""once_differentiable: for the backward passes of fused nodes, whose gradients can be taken once, not twice."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_Backward = Callable[..., Any]


def once_differentiable(backward: _Backward) -> _Backward:
    """A backward pass whose gradients raise an error wherever a second derivative would need their graph.

    PyTorch's decorator of this name raises only where a whole graph is run backward. `torch.autograd.grad` runs the
    nodes on the way to its inputs and passes by that error, and so gives a second derivative without these terms.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *gradients: Any) -> Any:
        with torch.no_grad():
            outputs = backward(ctx, *gradients)
        if not torch.is_grad_enabled():
            return outputs
        depends_on = [t for t in (*gradients, *ctx.saved_tensors) if isinstance(t, Tensor) and t.requires_grad]
        places = [i for i, output in enumerate(outputs) if output is not None]
        if not depends_on or not places:
            return outputs
        marked: Any = _Once.apply(len(places), *(outputs[i] for i in places), *depends_on)  # type: ignore[no-untyped-call]
        found = dict(zip(places, marked, strict=True))
        return tuple(found.get(i) for i in range(len(outputs)))

    return once


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.detach() for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        what = "the gradient of an adapted layer's fused node is once_differentiable: it has no second derivative"
        raise RuntimeError(f"{what}. `torch.func.grad` takes plain operations, which have one")
