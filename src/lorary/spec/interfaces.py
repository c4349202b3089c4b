"""The interfaces of a method's components: one protocol per axis.

A component is a class marked `@component`, which makes it a frozen dataclass, so that a method can be printed,
compared, hashed and saved. It derives from the protocol of its axis and inherits that protocol's defaults.
`lorary.spec.method` is the record of components; `lorary.spec.presets` names some of them after a paper. The join
and the context axis have files of their own, `lorary.spec.join` and `lorary.spec.context`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol, TypeVar, cast, dataclass_transform, runtime_checkable

import torch
from torch import Tensor, nn

from lorary.spec.join import Join as Join  # a component's file imports all of these from here
from lorary.spec.layer import Factors as Factors
from lorary.spec.layer import Layer as Layer
from lorary.spec.layer import Run as Run
from lorary.spec.layer import Shapes as Shapes
from lorary.spec.layer import Tensors as Tensors
from lorary.spec.site import Site


@runtime_checkable
class Delta(Protocol):
    """The trained update s B A of a site: its tensors, and its two factors.

    Attributes:
        r: the rank that determines the scale.
        shared: roles that are the leading slice of one tensor for the whole model. They never train.
        fixed_roles: roles that no init fills: zero until a plan or a rule sets them. They never train.
        arbitrary_factors: whether the factors can be any two matrices, so that an init may choose them.
        join_roles: roles that the join uses and the factors do not.
        role_aliases: its roles for A and B, which presets refer to, such as {"A": "Q", "B": "P"}.
        fused_for_all_kinds: whether `Fused.add` supports every kind of layer.
        task_index: mixed into the seed, so that every task gets its own initialisation.
        needs_dense_weight: whether every step uses the elements of the weight.
        batched: whether `factors`, and an `add` for all kinds of layers, also take tensors with a leading E of experts.
        chains: the roles of each of several products that make the update, in the order in which an input meets them.
        chains_meet: how these products meet, as a sign.
        decayed_vectors: roles that take weight decay even where their tensors are vectors, as in the authors' code.
    """

    r: int
    shared: frozenset[str] = frozenset()
    fixed_roles: frozenset[str] = frozenset()
    arbitrary_factors: bool = False
    join_roles: frozenset[str] = frozenset()
    role_aliases: Mapping[str, str] = MappingProxyType({})
    fused_for_all_kinds: bool = False
    task_index: int = 0
    needs_dense_weight: bool = False
    batched: bool = False
    decayed_vectors: frozenset[str] = frozenset()
    chains: tuple[tuple[str, ...], ...] = ()
    chains_meet: str = "+"

    @property
    def roles(self) -> frozenset[str]: ...
    @property
    def changes_bias(self) -> bool:
        """Whether it changes the layer's bias, which then cannot train in full."""
        return False

    def shapes(self, site: Site) -> Shapes: ...
    def factors(self, site: Site, params: Tensors) -> Factors:
        """(B [out, R], A [R, in]), without the scale."""
        ...

    def problems(self, site: Site) -> list[str]:
        """The reasons why it cannot adapt this site."""
        return []


@runtime_checkable
class Fused(Protocol):
    """A delta with a faster path for rowwise layers; its factors remain the specification."""

    def add(self, layer: Layer, y: Tensor, x: Tensor, dropout: float) -> Tensor:
        """y + s * B A dropout(x). May write into y."""
        ...


def has_rank(delta: Delta | None) -> bool:
    """Whether a delta has a rank; `NoUpdate` has none."""
    return delta is not None and any(field.name == "r" for field in dataclasses.fields(cast(Any, delta)))


def all_in_join(delta: Delta | type[Delta]) -> bool:
    """Whether the join takes all of a delta's tensors, so that no product of factors is added to the weight (HiRA)."""
    return bool(delta.join_roles) and delta.join_roles == delta.roles


@functools.cache
def is_fused(cls: type) -> bool:
    """Whether deltas of a class have a faster path. A class with factors of its own inherits none: it is of others."""
    if not issubclass(cls, Fused):
        return False
    path, factors = (next(c for c in cls.__mro__ if name in vars(c)) for name in ("add", "factors"))
    return issubclass(path, factors)


@runtime_checkable
class Sequential(Protocol):
    """A delta that keeps the frozen factors of earlier tasks beside its own."""

    def after(self, past: Sequence[Factors], scale: float) -> tuple[Delta, dict[str, Tensor]]:
        """The delta of the next task, and the values of its fixed roles.

        Args:
            past: the factors of each earlier task, the oldest first, with their scales in B.
            scale: the new task's s.
        """
        ...

    def tasks(self, B: Tensor, A: Tensor) -> list[Factors]:
        """The factors of every task, the oldest first."""
        ...


@runtime_checkable
class PrunableDelta(Protocol):
    """A delta that is a sum of rank directions, each of which can be removed.

    Attributes:
        directions: role -> the dimension of its tensor that counts the directions, from the end: -1 for the last.
    """

    directions: Mapping[str, int]

    def with_directions(self, R: int) -> Delta:
        """The delta with R directions left."""
        ...

    def active_directions(self, params: Tensors) -> Tensor:
        """[..., R] bool: the directions that contribute to the update."""
        ...


@runtime_checkable
class Init(Protocol):
    """The initialisation of a delta.

    Attributes:
        fills: all roles of the delta that it fills.
        residual_init: whether s B A is not zero at the start and is subtracted from the base.
        store_shared: whether files hold the shared tensors although they can be regenerated.
        rounds: how often it runs; from the second time on, on the quantisation error W - Dq(Q(W - s B A)).
        scale_free_start: whether the start is independent of s, so that it can be iterated with quantisation.
        starts_at_error: whether the first run is on the quantisation error W - Dq(Q(W)) already.
    """

    residual_init: bool = False
    store_shared: bool = True
    rounds: int = 1
    scale_free_start: bool = True
    starts_at_error: bool = False

    @property
    def fills(self) -> frozenset[str]: ...
    def zeros(self, site: Site) -> frozenset[str]:
        """The roles that start at zero; with all of them frozen nothing could train."""
        return frozenset()

    def share(self, shared: Tensors) -> None:
        """Fill the shared tensors."""
        return None

    def __call__(self, params: Tensors, W: Tensor, site: Site, scale: float, generator: torch.Generator) -> None:
        """Fill a site's own tensors; W [out, in] is its weight."""
        ...

    def problems(self, site: Site, r: int) -> list[str]:
        """The reasons why it cannot start a delta of rank r at this site."""
        return []


@runtime_checkable
class Scale(Protocol):
    """The factor s before B A, as a function of the rank."""

    def __call__(self, r: int) -> float: ...


@runtime_checkable
class Rule(Protocol):
    """A change to training: a frozen specification, whose state `lorary.rules` carries.

    Attributes:
        needs: the roles that it works on.
        writes_base: whether it writes the base weights of the adapted layers.
        needs_optimizer: whether it changes the optimizer's state.
        per_expert: whether it also works on layers of experts, whose tensors have a leading E.
    """

    writes_base: bool = False
    needs_optimizer: bool = False
    per_expert: bool = False

    @property
    def needs(self) -> frozenset[str]: ...
    def problems(self, method: Any) -> list[str]:
        """The reasons why it cannot work with the method's other components."""
        return []

    def resized(self, r: int) -> Rule:
        """The rule for an adapter whose rank has changed."""
        return self

    def start(self, layers: Sequence[Layer], steps: int) -> dict[str, Tensor]:
        """Its state at the start of a run.

        Raises:
            ConfigError: a run of this many optimizer steps is too short.
        """
        return {}

    def state_bytes(self, shapes: Shapes) -> int:
        """An upper bound on the bytes of its state for a site with tensors of these shapes."""
        return 0

    def before_step(self, layers: Sequence[Layer], state: dict[str, Tensor], step: int) -> None:
        """Called before the forward pass of optimizer step `step` (from 1), also after a resume."""
        return None

    def penalty(self, layers: Sequence[Layer], state: dict[str, Tensor]) -> Tensor | float:
        """A term added to the training loss."""
        return 0.0

    def after_backward(self, layers: Sequence[Layer], state: dict[str, Tensor], step: int) -> None:
        """Called when the gradients of step `step` are complete and not yet clipped."""
        return None

    def after_step(self, layers: Sequence[Layer], state: dict[str, Tensor], step: int, run: Run) -> None:
        """Called after the optimizer's update; the gradients are still there."""
        return None

    def report(self, layers: Sequence[Layer], state: dict[str, Tensor]) -> dict[str, Any]:
        """Current figures for the log: numbers, or numbers by site."""
        return {}


@runtime_checkable
class Storage(Protocol):
    """The form in which the frozen base weights are stored.

    Attributes:
        writable: whether a rule may write a weight in training; False for quantised weights.
    """

    writable: bool = True

    def quantizes(self, layer: nn.Module) -> bool:
        """Whether it quantises the weight of such a layer."""
        return False

    def quantize(self, layer: nn.Module, W: Tensor | None = None) -> nn.Module:
        """A frozen layer with the same function and the quantised matrix W [out, in]; None for the layer's own."""
        return layer

    def bytes(self, numbers: int, width: int) -> int:
        """The stored bytes of a weight of this many numbers, of `width` bytes each before."""
        return numbers * width


COMPONENTS: dict[str, type] = {}
ComponentT = TypeVar("ComponentT")


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def component(cls: type[ComponentT]) -> type[ComponentT]:
    """Make a class a frozen dataclass, and register it under its name, which files refer to.

    Raises:
        TypeError: another component has this name.
    """
    if "__dataclass_fields__" not in vars(cls):
        cls = dataclasses.dataclass(frozen=True)(cls)
    if COMPONENTS.setdefault(cls.__name__, cls) is not cls:
        raise TypeError(f"the component {cls.__name__} is already registered")
    return cls


@component
class Unquantized(Storage):
    """The weights as they are."""
