"""Copies of a model that share its weights: one for every adapter, and one that computes the rows of all."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lorary.layers.wrappers import submodule
from lorary.model.plan import Plan
from lorary.model.reach.twin import refuse_functions_around
from lorary.model.scan import scan


def sharing_copy(model: nn.Module) -> Any:
    """A copy of a model's modules over the same tensors, frozen. The flags of the model's parameters do not change.

    Raises:
        RuntimeError: the model holds a function that would run the model itself, not the copy.
        Exception: any error of an attribute that cannot be copied.
    """
    memo: dict[int, Any] = {id(p): _same_memory(p) for p in model.parameters()}
    with _SharedTensors():
        copied = copy.deepcopy(model, memo)
    refuse_functions_around(model, copied)
    return copied


def give_own_weights(copied: nn.Module, plan: Plan) -> None:
    """Give a sharing copy parameters of its own, where attaching or training will write them.

    Those are the base parameters that train in full, and the weights from which the start of a residual init is
    subtracted (PiSSA, OLoRA). A tied weight is left to the layers that hold it: attaching replaces it.
    """
    scanned = scan(copied)
    residual = [s.site.name for s in plan.sites if s.init.residual_init and not scanned.modules[s.site.name].tied_to]
    for name in {*(f.name for f in plan.full), *(f"{path}.weight" for path in residual)}:
        path, _, last = name.rpartition(".")
        value = scanned.parameter(name).detach()
        setattr(submodule(copied, path), last, nn.Parameter(value.clone(), requires_grad=False))


def _same_memory(p: nn.Parameter) -> nn.Parameter:
    """A parameter over the same memory, with a flag and a gradient of its own; a quantised weight itself."""
    return nn.Parameter(p.detach(), requires_grad=False) if type(p) is nn.Parameter else p


class _SharedTensors(TorchFunctionMode):
    """Copies of tensors are the tensors themselves."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            args[1][id(args[0])] = args[0]
            return args[0]
        return func(*args, **(kwargs or {}))
