"""What a model remembers while a method is attached to it, and the summary of it that `lorary.attached` gives."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from lorary.errors import Diagnostic, StateError
from lorary.layers.adapted import Adapted, base_parameters
from lorary.layers.kinds import KINDS, kind_of
from lorary.layers.quantized_weight import is_quantized, stored_tensors
from lorary.model.bias_flags import BiasFlags
from lorary.model.fingerprint import STATE, Fingerprint
from lorary.model.plan import FullParameter, full_table, site_table
from lorary.spec.context import ContextPatch
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite, unique_tensor_sets


class Merged(NamedTuple):
    """What a merge replaced at a site: the weight and bias of the base, the adapted layer; and the layer there now,
    with the precision that the merge gave it."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    layer: Adapted
    plain: nn.Module
    dtype: torch.dtype


@dataclass
class AttachedState:
    """What a model remembers while adapters are attached, so that everything can be put back.

    Args:
        method: the method.
        sites: the adapted sites.
        full: base parameters that train in full -> their values before training.
        trained: the names of parameters that required gradients before.
        paths: site -> every path of its layer, more than one for a shared layer.
        moved: site -> what its weight was before the base gave up a part of it: the values, on the CPU, or the
            parameter itself where others hold it too and the layer got one of its own.
        untied: whether the model's configuration says that its embeddings are no longer tied, because one of them
            has got a weight of its own: else the next `tie_weights` would take it away again.
        fingerprint: of the base, taken before anything changed or was sharded.
        merged: once merged, site -> what the merge replaced, and by what.
        tied: the parameters that a merge untied from each other: module, name, and what it held there before.
        room: what a merge did to the model so that it may have biases which it had not.
        off: how many `disabled` blocks the model is in.
        reading: what the method's context did to the model.
    """

    method: Method
    sites: tuple[AdaptedSite, ...]
    full: dict[str, Tensor]
    trained: frozenset[str]
    paths: dict[str, list[str]]
    fingerprint: Fingerprint
    replaced_weights: dict[str, Tensor] = field(default_factory=dict)
    untied: bool = False
    merged: dict[str, Merged] | None = None
    tied: list[tuple[nn.Module, str, nn.Parameter]] | None = None
    bias_flags: BiasFlags = field(default_factory=BiasFlags)
    disabled_depth: int = 0
    context_patch: ContextPatch | None = None


@dataclass(frozen=True)
class Attachment:
    """What is attached to a model, as a value. Prints like a plan.

    Args:
        method: the method, at the rank that sites without one of their own take.
        sites: the adapted sites, each with its rank, scale and shapes.
        full: the base parameters that train in full.
        total: parameters of the base model, tied ones counted once.
        base: the fingerprint of the base.
        merged: whether the adapter is merged into the base (`merge(keep=True)`).
        enabled: False inside a `disabled` block.
    """

    method: Method
    sites: tuple[AdaptedSite, ...]
    full: tuple[FullParameter, ...]
    total: int
    base: Fingerprint
    merged: bool = False
    enabled: bool = True

    @property
    def trainable(self) -> int:
        """How many numbers the method trains, whether or not they require gradients now."""
        return sum(p.trainable for p in unique_tensor_sets(self.sites)) + sum(f.size for f in self.full if f.trains)

    @property
    def share(self) -> float:
        """Trained numbers over the base model's parameters."""
        return self.trainable / self.total

    def __str__(self) -> str:
        base = " ".join(filter(None, (self.base.architecture, self.base.name, self.base.weights[-64:][:12])))
        state = ("merged" if self.merged else "attached") + ("" if self.enabled else ", disabled")
        return "\n".join(
            [
                str(self.method),
                *site_table(self.sites),
                *full_table(self.full),
                "",
                f"trains    {self.trainable:,} of {self.total:,} parameters ({self.share:.4%})",
                f"base      {base}",
                f"state     {state}",
            ]
        )


def attached(model: nn.Module) -> Attachment | None:
    """What is attached to a model, or None.

    Returns:
        A summary of this moment, which does not follow later changes; None for a plain model, also after `detach` and
        after a `merge` without `keep`.

    Example:
        >>> print(lorary.attached(model))
    """
    state = state_of(model)
    if state is None:
        return None
    adapted_weights = {f"{p.site.name}.weight" for p in state.sites}  # a rule writes these, no optimizer trains them
    full = []
    for name in state.full:
        value = base_parameter(model, name)
        size = value.numel() * value.element_size()
        full.append(FullParameter(name, tuple(value.shape), size, trains=name not in adapted_weights))
    merged, enabled = state.merged is not None, not state.disabled_depth
    return Attachment(state.method, state.sites, tuple(full), _total(model), state.fingerprint, merged, enabled)


def _total(model: nn.Module) -> int:
    """Parameters of the base; tied ones and packed layers that share a weight count once."""
    packed = {id(stored_tensors(m)[0]): m for m in model.modules() if is_quantized(m)}.values()
    inside = {id(t) for m in packed for t in stored_tensors(m)}
    plain = {id(p): p.numel() for _, p in base_parameters(model) if id(p) not in inside}
    return sum(plain.values()) + sum(math.prod(KINDS[str(kind_of(m))].size(m)) for m in packed)


def state_of(model: nn.Module) -> AttachedState | None:
    """The live state behind `attached`, or None."""
    return cast("AttachedState | None", getattr(model, STATE, None))


def require(model: nn.Module, verb: str) -> AttachedState:
    """What is attached to a model.

    Raises:
        StateError: nothing is, it has been merged, or it is disabled for now.
    """
    state = state_of(model)
    if state is None:
        raise StateError(f"nothing to {verb}:", [Diagnostic("model", "no adapter is attached", "attach one first")])
    if state.merged is not None:
        raise StateError(f"cannot {verb}:", [Diagnostic("model", "the adapter is merged", "unmerge it first")])
    if state.disabled_depth and verb != "disable":
        what, fix = "the adapter is disabled, and the model has the base's values", "leave the `disabled` block first"
        raise StateError(f"cannot {verb}:", [Diagnostic("model", what, fix)])
    return state


def base_parameter(model: nn.Module, name: str) -> nn.Parameter:
    """A base parameter by its path in the plain model, wherever an adapter has moved it to."""
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    return cast(nn.Parameter, getattr(module, last))


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """In evaluation mode inside, without dropout; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
