"""The interfaces of a method's components: one protocol per axis.

A component is a frozen dataclass marked `@component`, so that a method can be printed, compared, hashed and written to
a file. `lorary.spec.method` is the record of components; `lorary.spec.presets` gives some of them a paper's name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from lorary.spec.site import Kind, Site

Tensors = Mapping[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


class Layer(Protocol):
    """What the words see of an adapted layer (`lorary.layers.adapted.Adapted` is the one that exists)."""

    site: Site
    scale: float
    method: Any  # Method, whose words these are
    params: Any  # role -> Parameter
    base: nn.Module
    shared: Any  # the bank of what all layers share, or None
    training: bool
    active_structure: Any  # what a rule has drawn for the present step; None: nothing

    @property
    def kind(self) -> Kind: ...
    @property
    def stored_tensors(self) -> Sequence[Tensor]:
        """The tensors in which the base keeps its weight, for `remember`."""

    @property
    def bias(self) -> Tensor | None: ...
    @property
    def tensors(self) -> Tensors:
        """role -> tensor: what is the layer's own, and its share of what all layers share."""
        ...

    @property
    def dropout(self) -> float:
        """The probability of dropping an input of the adapter now: 0 outside training."""
        ...

    def factors(self) -> tuple[Tensor, Tensor]: ...
    def weight_times(self, A: Tensor) -> Tensor:
        """W A^T [out, R] of A [R, inp], in A's precision, differentiable in A; keeps W as the base keeps it."""
        ...

    def add_delta(self, y: Tensor, x: Tensor, dropout: float | None = None) -> Tensor: ...
    def cached(self, name: str, of: Sequence[Tensor], make: Callable[[], Tensor]) -> Tensor:
        """make(), or what it gave before while none of these tensors has changed since."""
        ...


# A word derives from its axis' protocol, and inherits what it is silent on.
@runtime_checkable
class Delta(Protocol):
    """What is learnt: the tensors of a site, and the two factors that they stand for.

    Attributes:
        r: the rank that the scale is taken of.
        shared: roles of which all sites hold a part of one tensor, its leading corner. They never train.
        given: roles that no init fills: zero until a plan or a rule gives them their values. They never train.
        free: whether the factors can be any two matrices, so that an init may choose them.
        extras: roles that are no part of the factors; the join reads them.
        known_as: how presets that speak of A and B reach its roles, such as {"A": "Q", "B": "P"}.
        everywhere: whether its own path (`Fused`) goes through layers of every kind.
        turn: how many tasks have gone before: each starts at a draw of its own, whatever the seed.
        weighs: whether every step takes the dense weight itself, element by element.
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

    @property
    def roles(self) -> frozenset[str]: ...
    @property
    def changes_bias(self) -> bool:
        """Whether the layer's bias changes, too: then it cannot train in full as well."""
        return False

    def shapes(self, site: Site) -> Shapes: ...
    def factors(self, site: Site, p: Tensors) -> tuple[Tensor, Tensor]:
        """(B [out, R], A [R, inp]) with delta = scale * B A."""
        ...

    def problems(self, site: Site) -> list[str]:
        """Why it cannot be at this site."""
        return []


@runtime_checkable
class Fused(Protocol):
    """A delta with a path of its own through layers that take rows [..., inp]; its factors stay the specification."""

    def add(self, layer: Layer, y: Tensor, x: Tensor, dropout: float) -> Tensor:
        """y + s * B A dropout(x). May write into y."""
        ...


@runtime_checkable
class Sequential(Protocol):
    """A delta with a place for what earlier tasks have learnt, beneath what is being learnt now."""

    def after(self, past: Sequence[tuple[Tensor, Tensor]], scale: float) -> tuple[Delta, dict[str, Tensor]]:
        """The delta of the next task, and the values of its roles that are given.

        Args:
            past: (B [out, R], A [R, inp]) of each earlier task, the first one first, scales within B.
            scale: the new task's s.
        """
        ...

    def tasks(self, B: Tensor, A: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The factors of all tasks, taken apart, the first one first."""
        ...


@runtime_checkable
class Join(Protocol):
    """How the delta joins the frozen weight W [out, inp] and bias b [out].

    Attributes:
        roles: its own tensors.
        reads: the delta's extra roles that it makes use of.
        drops: whether there is an input of the adapter, apart from the layer's own, of which dropout can drop some.
    """

    roles: frozenset[str] = frozenset()
    uses: frozenset[str] = frozenset()
    supports_dropout: bool = True

    def shapes(self, site: Site) -> Shapes:
        """role -> shape of its own tensors."""
        return {}

    def setup(self, layer: Layer) -> None:
        """Fill the join's own tensors once the delta has started, so that nothing moves at step 0."""
        return None

    def forward(self, layer: Layer, x: Tensor) -> Tensor: ...
    def merged(
        self, p: Tensors, W: Tensor, b: Tensor | None, BA: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """(W', b') with the same function as `forward`; BA is (s B, A). The specification of `forward`."""
        ...

    def on_output(
        self, p: Tensors, W: Callable[[], Tensor], b: Callable[[], Tensor | None], BA: tuple[Tensor, Tensor]
    ) -> tuple[tuple[Tensor, Tensor], Tensor | None, Tensor | None]:
        """((B, A), gain, shift) with `forward` = gain * (W x + B A x) + b + shift; None is 1, and 0.

        Args:
            p, BA: as for `merged`.
            W, b: give the weight and the bias, and raise MethodError where the base is not at hand.

        Raises:
            MethodError: it has no such form.
        """
        ...

    def problems(self, site: Site) -> list[str]:
        """Why it cannot be at this site."""
        return []


@runtime_checkable
class Init(Protocol):
    """Where the delta starts.

    Attributes:
        fills: the delta's roles, all of them.
        moves_base: whether s B A is not zero at the start, so that the base must give it up.
        saved: whether a file holds what all sites share, even where the init can draw it again.
        rounds: how often it starts: from the second time on at what a packed base has lost, W - Dq(Q(W - s B A)).
        within: whether s B A starts at a part of W, however large s is, so that it may start several times.
    """

    residual_init: bool = False
    store_shared: bool = True
    rounds: int = 1
    scale_free_start: bool = True

    @property
    def fills(self) -> frozenset[str]: ...
    def zeros(self, site: Site) -> frozenset[str]:
        """The roles that start at zero: were they all frozen, nothing could ever be learnt."""
        return frozenset()

    def share(self, shared: Tensors) -> None:
        """Fill the tensors that all sites share."""
        return None

    def __call__(self, p: Tensors, W: Tensor, site: Site, scale: float, generator: torch.Generator) -> None:
        """Fill a site's own tensors; W [out, inp] is its weight."""
        ...

    def problems(self, site: Site, r: int) -> list[str]:
        """Why it cannot start a delta of rank r at this site."""
        return []


@runtime_checkable
class Scale(Protocol):
    """The factor s before B A, as a function of the rank."""

    def __call__(self, r: int) -> float: ...


class Run(Protocol):
    """What a rule may do to the run beside its layers (`lorary.Rules` is the one that exists).

    Attributes:
        optimizer: the one that trains; None where the loop has kept it to itself.
    """

    optimizer: torch.optim.Optimizer | None

    def shrink(self, keep: Mapping[str, Tensor]) -> bool:
        """Keep these directions alone (site -> bool [R]) in the tensors and in the optimizer's state, for good.

        Returns:
            whether it could be done: not without the optimizer, and not where its state or the parameters are in
            other hands (several ranks).
        """
        ...


@runtime_checkable
class Rule(Protocol):
    """What happens while training: a frozen specification; its state is carried by `lorary.rules`.

    Attributes:
        needs: the roles that it works on.
        writes_base: whether it writes the base weights of the adapted layers.
        steers: whether it has to reach into the optimizer's state.
    """

    needs_optimizer: bool = False

    @property
    def needs(self) -> frozenset[str]: ...
    @property
    def writes_base(self) -> bool: ...
    def problems(self, method: Any) -> list[str]:
        """Why it cannot go together with the other words of a method."""
        return []

    def start(self, layers: Sequence[Layer], steps: int) -> dict[str, Tensor]:
        """Its state at the start of a run of so many optimizer steps.

        Raises:
            ConfigError: so many steps leave no room for it.
        """
        return {}

    def state_bytes(self, shapes: Shapes) -> int:
        """Bytes of its state, at most, for a site with tensors of these shapes."""
        return 0

    def before_step(self, layers: Sequence[Layer], state: dict[str, Tensor], step: int) -> None:
        """Optimizer step `step` (from 1) is next: the first one of a run, of a resumed run, or the one after."""
        return None

    def penalty(self, layers: Sequence[Layer], state: dict[str, Tensor]) -> Tensor | float:
        """Added to the training loss."""
        return 0.0

    def after_backward(self, layers: Sequence[Layer], state: dict[str, Tensor], step: int) -> None:
        """Gradients of optimizer step `step` (from 1) are complete and unclipped."""
        return None

    def after_step(self, layers: Sequence[Layer], state: dict[str, Tensor], step: int, run: Run) -> None:
        """Parameters have moved; gradients are still there."""
        return None

    def report(self, layers: Sequence[Layer], state: dict[str, Tensor]) -> dict[str, Any]:
        """Figures of the present moment for the log: numbers, or numbers by site."""
        return {}


@runtime_checkable
class Storage(Protocol):
    """How the frozen weights of the base are kept.

    Attributes:
        writable: whether a rule may write a weight while training; False for what packs.
    """

    writable: bool = True

    def quantizes(self, layer: nn.Module) -> bool:
        """Whether it keeps the weight of such a layer in another form than the layer does."""
        return False

    def quantize(self, layer: nn.Module, W: Tensor | None = None) -> nn.Module:
        """A frozen layer that does what this one does, with the matrix W [out, inp] packed; None for its own."""
        return layer

    def bytes(self, numbers: int, width: int) -> int:
        """What a weight of so many numbers takes, once packed; `width` is the bytes of each before."""
        return numbers * width


COMPONENTS: dict[str, type] = {}
W_ = TypeVar("W_", bound=type)


def component(cls: W_) -> W_:
    """Register a frozen dataclass by its name, so that files can name it."""
    if not dataclasses.is_dataclass(cls) or COMPONENTS.get(cls.__name__, cls) is not cls:
        raise TypeError(f"{cls.__name__} cannot be a component: it must be a dataclass with a unique name")
    COMPONENTS[cls.__name__] = cls
    return cls


@component
@dataclasses.dataclass(frozen=True)
class Unquantized(Storage):
    """Every layer keeps its weight as it is."""
