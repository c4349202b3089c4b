"""The state of a model while a method is attached, and `lorary.attached`, its public summary."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from lorary.errors import Diagnostic, StateError
from lorary.kernels.torch_internals import children_of
from lorary.layers.adapted import Adapted
from lorary.layers.rope import max_context, text_config
from lorary.layers.wrappers import set_submodule, submodule, unwrapped
from lorary.model.ambient import mode_independent
from lorary.model.bias_flags import BiasFlags
from lorary.model.buffers import EvaluationMode
from lorary.model.checks import not_a_module
from lorary.model.fingerprint import STATE, Fingerprint
from lorary.model.plan import FullParameter, trainable_size, trained_table
from lorary.model.reach.first_forward import FirstForward
from lorary.spec.context import ContextPatch
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite

TiedParameter = tuple[nn.Module, str, nn.Parameter]  # the module that holds it, and its name there


class Merged(NamedTuple):
    """A merged site: the base's weight and bias and the adapted layer from before, and the plain layer there now.

    `dtype` is the precision of the merged weight: the model may be converted to another one before it is unmerged.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    layer: Adapted
    plain: nn.Module
    dtype: torch.dtype


@dataclass
class Suspended:
    """The state that a model gets back when its last `disabled` block ends.

    Args:
        enabled: each adapted layer, and whether it was enabled.
        values: each base parameter that has changed, and its adapted values.
        context_patch: the context that was reverted.
        buffers: puts the buffers back.
        blocks: how many blocks the model is in.
    """

    enabled: list[tuple[Adapted, bool]]
    values: list[tuple[nn.Parameter, Tensor]]
    context_patch: ContextPatch | None = None
    buffers: ExitStack = field(default_factory=ExitStack)
    blocks: int = 0

    def __reduce__(self) -> Any:
        """A copy could never leave the block.

        Raises:
            StateError: always.
        """
        what = "the adapter is disabled, and the model has the base's values"
        raise StateError("cannot copy:", [Diagnostic("model", what, "leave the `disabled` block first")])


class Holder(Protocol):
    """An adapter that a model holds under a name."""

    name: str

    def keep(self, model: nn.Module, state: AttachedState) -> None:
        """Take over the values that the base is about to lose."""


@dataclass
class AttachedState:
    """The record by which everything that attaching or merging did to a model can be undone.

    Args:
        method: the method.
        sites: the adapted sites.
        full: base parameters and buffers that train in full -> their values before training.
        trained: the names of the parameters that required gradients before.
        paths: site -> every path of its layer, more than one for a shared layer.
        fingerprint: of the base, taken before anything changed or was sharded.
        total: parameters of the base, tied ones counted once.
        replaced_weights: site -> its weight before the start was subtracted: a copy on the CPU, or the parameter itself
            if other layers hold it too and this one got its own.
        untied: the configurations whose `tie_word_embeddings` attaching cleared, because a tied layer got a weight of
            its own that the next `tie_weights` would remove.
        merged: once merged, site -> the replaced layer and its replacement.
        tied: the tied parameters that a merge replaced by copies, and the configurations where it cleared that flag.
        bias_flags: the configuration's bias flags that a merge set.
        suspended: while the model is in `disabled` blocks, the way back.
        context_patch: the context's change to the model.
        buffers: persistent buffers that do not train -> their values before.
        evaluating: the layers whose statistics are frozen, which stay in evaluation mode.
        first_forward: the watch over sites that no dry forward has shown to run.
        restored_from: the folder that the adapter's values were read from last, after it was attached.
        stepped: whether an optimizer has changed the adapter since it was attached.
        rules_ran: whether the method's rules have followed a step; True once their absence has been said.
        active: `Holder` -> weight, of the held adapters that are attached by name.
        holder: the one whose parameters the layers have; None for a weighted sum, and without a name.
    """

    method: Method
    sites: tuple[AdaptedSite, ...]
    full: dict[str, Tensor]
    trained: frozenset[str]
    paths: dict[str, list[str]]
    fingerprint: Fingerprint
    total: int
    replaced_weights: dict[str, Tensor] = field(default_factory=dict)
    untied: list[Any] = field(default_factory=list)
    merged: dict[str, Merged] | None = None
    tied: tuple[list[TiedParameter], list[Any]] | None = None
    bias_flags: BiasFlags = field(default_factory=BiasFlags)
    suspended: Suspended | None = None
    context_patch: ContextPatch | None = None
    buffers: dict[str, Tensor] = field(default_factory=dict)
    evaluating: list[EvaluationMode] = field(default_factory=list)
    first_forward: FirstForward | None = None
    restored_from: Path | None = None
    stepped: bool = False
    rules_ran: bool = False
    active: dict[Any, float] = field(default_factory=dict)
    holder: Holder | None = None


@dataclass(frozen=True)
class Attachment:
    """A summary of what is attached to a model. Prints like a plan.

    Args:
        method: the method, at the default rank.
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
        """The number of parameters that the method trains, whether or not they require gradients now."""
        return trainable_size(self.sites, self.full)

    @property
    def share(self) -> float:
        """Trained parameters over the base model's."""
        return self.trainable / self.total

    def __str__(self) -> str:
        base = " ".join(filter(None, (self.base.architecture, self.base.name, self.base.weights[-64:][:12])))
        state = ("merged" if self.merged else "attached") + ("" if self.enabled else ", disabled")
        return "\n".join(
            [*trained_table(self.method, self.sites, self.full, self.total), f"base      {base}", f"state     {state}"]
        )


@mode_independent
def attached(model: nn.Module) -> Attachment | None:
    """A summary of what is attached to a model.

    Returns:
        A value that does not follow later changes; None for a plain model, also after `detach` and after a `merge`
        without `keep`.

    Raises:
        StateError: `model` is not a module.

    Example:
        >>> print(lorary.attached(model))
    """
    if problems := not_a_module(model):
        raise StateError("nothing can be attached:", problems)
    state = state_of(model)
    if state is None:
        return None
    adapted_weights = {p.site.weight_name for p in state.sites}  # written by a rule, not by the optimizer
    full = []
    for name in state.full:
        value = base_parameter(model, name)
        size = value.numel() * value.element_size()
        trains = name not in adapted_weights and isinstance(value, nn.Parameter)
        full.append(FullParameter(name, tuple(value.shape), size, trains))
    merged, enabled = state.merged is not None, state.suspended is None
    return Attachment(state.method, state.sites, tuple(full), state.total, state.fingerprint, merged, enabled)


def state_of(model: nn.Module) -> AttachedState | None:
    """The state of a model with a method attached; None for a plain one."""
    return cast("AttachedState | None", getattr(unwrapped(model), STATE, None))


def max_text(model: nn.Module) -> int | None:
    """The tokens of text that a model reads: its context, less the positions of a prefix or a prompt; None: unknown."""
    state, known = state_of(model), max_context(text_config(unwrapped(model)))
    taken = 0 if state is None or state.method.context is None else state.method.context.taken
    return None if known is None else known - taken


def require_attached(model: nn.Module, verb: str) -> AttachedState:
    """The state of a model with a method attached, unmerged and enabled.

    Args:
        model: the model.
        verb: the refused action, for the error.

    Raises:
        StateError: nothing is attached, it has been merged, or it is disabled for now.
    """
    state = state_of(model)
    if state is None:
        raise StateError(f"nothing to {verb}:", [Diagnostic("model", "no adapter is attached", "attach one first")])
    if state.merged is not None:
        raise StateError(f"cannot {verb}:", [Diagnostic("model", "the adapter is merged", "unmerge it first")])
    if state.suspended is not None and verb != "disable":
        what, fix = "the adapter is disabled, and the model has the base's values", "leave the `disabled` block first"
        raise StateError(f"cannot {verb}:", [Diagnostic("model", what, fix)])
    return state


def require_values(model: nn.Module) -> None:
    """Refuse to measure a model that has no values.

    Raises:
        StateError: a parameter is on the meta device.
    """
    if any(p.is_meta for p in model.parameters()):
        what, fix = "is on the meta device and has no values", "load its weights first"
        raise StateError("cannot measure:", [Diagnostic("model", what, fix)])


def base_parameter(model: nn.Module, name: str) -> nn.Parameter:
    """A base parameter, or a buffer, by its path in the plain model, also inside an adapted layer."""
    path, _, last = name.rpartition(".")
    module = submodule(model, path)
    module = module.base if isinstance(module, Adapted) else module
    if isinstance(child := children_of(module).get(last), Adapted):  # a fused parameter of experts
        return cast(nn.Parameter, child.base.weight)
    return cast(nn.Parameter, getattr(module, last))


def value_before(model: nn.Module, name: str) -> Tensor:
    """The value of a base parameter or buffer without the adapter that may be attached, which may train it in full."""
    state = state_of(model)
    saved = None if state is None else state.full.get(name)
    return base_parameter(model, name).detach() if saved is None else saved


def set_submodules(model: nn.Module, paths: Iterable[str], module: nn.Module) -> None:
    """Put a module at each of these paths."""
    for path in paths:
        set_submodule(model, path, module)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block, without dropout; afterwards every module has its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
