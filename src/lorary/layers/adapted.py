"""Adapted: the module that wraps a frozen layer and holds its adapter; and lookups in models that contain it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorary._deprecated import RenamedAttribute
from lorary.kernels.low_rank import under_the_same_autocast
from lorary.kernels.row_norms import linear
from lorary.kernels.torch_internals import children_of, forward_hooks_of, is_replica, parameters_of
from lorary.layers.experts import ExpertLayer
from lorary.layers.kinds import KINDS
from lorary.layers.multihead_attention import InProjection
from lorary.layers.parameters import parameter_layers
from lorary.layers.quantized_weight import is_quantized, stored_tensors, weight
from lorary.layers.shared_projections import SharedProjections, leading_slice
from lorary.layers.wrappers import named_modules, unwrapped
from lorary.spec.interfaces import Delta, Fused, Init, Join, is_fused
from lorary.spec.layer import Kind
from lorary.spec.per_expert import factors_at, fill, for_every_expert, merged_at
from lorary.spec.placement import AdaptedSite, adaptation, start_name
from lorary.spec.site import Site


class Adapted(nn.Module):
    """A frozen layer with an adapter.

    Args:
        base: the layer, unchanged; its parameters should be frozen already.
        site: the site, its method, and the method's rank and scale there.
        dtype: of the adapter's tensors; 32-bit masters keep small steps that a 16-bit weight would round away.
        shared: the tensors that all layers of the model share, if the method has any.
        params: the adapter tensors of another layer, if the plan ties the two.

    Attributes:
        params: role -> parameter: A and B for LoRA, the papers' letters for other methods.
        kind: the layer kind: how its weight is seen as an [out, in] matrix.
        dropout: the dropout probability of the adapter's input, 0 in evaluation mode.
        start: role -> initial value, on the CPU, if the base was reduced by the initial s B A (PiSSA, OLoRA).
        enabled: whether forward applies the adapter; `lorary.disabled` clears it temporarily.
        active_structure: the structure that a rule has drawn for this optimizer step (GLoRA's supernet), or None.
        kept: values that `once` has computed in a `lorary.cached` block; None outside of it.

    `weight` and `bias` are the base's, because other libraries read them (weight tying, dtype look-ups), as are its
    plain attributes, such as `in_features`, `stride` or `padding_idx`.

    Which functions compute the layer is decided when its mode, its method or its base changes (`_resolve`), not in
    every forward pass: for a small input that decision took longer than the arithmetic.
    """

    p = RenamedAttribute("params")

    delta: Delta
    init: Init
    join: Join
    kind: Kind
    dropout: float
    _fused: Callable[[Any, Tensor, Tensor, float], Tensor] | None
    _forward: Callable[[Adapted, Tensor], Tensor]

    def __init__(
        self,
        base: nn.Module,
        site: AdaptedSite,
        dtype: torch.dtype = torch.float32,
        shared: SharedProjections | None = None,
        params: Parameters | None = None,
    ) -> None:
        super().__init__()
        for name, value in vars(base).items():
            if not (name.startswith("_") or name == "training" or hasattr(Adapted, name)):
                vars(self)[name] = value
        self.site = site.site
        self.method = site.method
        self.scale = site.scale
        self.active_structure: Any = None
        self.base = base
        self.shared = shared
        self.kept: Kept | None = None
        self.start: dict[str, Tensor] = {}
        self.params = _zero_parameters(site, dtype, stored_tensors(base)[0].device) if params is None else params
        self.shared_shapes = {role: site.shapes[role] for role in sorted(site.delta.shared)}
        self._merged_into: tuple[nn.Module, ...] = ()  # a tuple, so that it is not registered as a submodule
        self.enabled = True  # last, because setting it resolves the layer

    def _resolve(self) -> None:
        """Decide which functions compute this layer, and look up what they need."""
        delta, init, _, join = adaptation(self.method)
        kind = KINDS[self.site.kind]
        # called with the layer, because a bound method would tie copies and replicas to this one
        forward = join.forward if self.enabled else Adapted.base_output
        found: dict[str, Any] = {"delta": delta, "init": init, "join": join, "kind": kind}
        found |= {name: module for name, module in children_of(self).items() if name in ("params", "shared")}
        # PyTorch's dictionaries are not asked for any of it: that would take longer than all else here
        vars(self).update(
            found,
            dropout=self.method.dropout if self.training else 0.0,
            _fused=_fused_path(delta, kind, self.site),
            _forward=Adapted._merged_output if self._merged_into else forward,
        )

    def merge_into(self, plain: nn.Module | None) -> None:
        """Let references to this layer that a merge left behind compute with the merged one; None: undo that."""
        self._merged_into = () if plain is None else (plain,)

    @property
    def weight(self) -> Tensor:
        """The base's weight in its own layout; for a quantised base, the first of its tensors."""
        return stored_tensors(self.base)[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base's dense weight."""
        return weight(self.base).dtype if is_quantized(self.base) else self.weight.dtype

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return getattr(self.base, "bias", None)

    @property
    def matrix(self) -> Tensor:
        """The base's weight as [out, in]; dequantised, if it is quantised."""
        return self.kind.matrix(self.base)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """role -> tensor: the layer's parameters and its slices of the shared tensors."""
        own: dict[str, Tensor] = dict(parameters_of(self.params))  # type: ignore[arg-type]  # none of them is None
        if self.shared is None:
            return own
        full = self.shared.tensors
        return own | {role: leading_slice(full[role], shape) for role, shape in self.shared_shapes.items()}

    def __setattr__(self, name: str, value: Any) -> None:
        # code that ties weights assigns `module.weight`: forward it to the base
        if name in ("weight", "bias"):
            setattr(self.base, name, value)
            return
        super().__setattr__(name, value)
        if name in _RESOLVES and "enabled" in vars(self):
            self._resolve()

    def _replicate_for_data_parallel(self) -> Any:
        replica: Any = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.kept = None  # its values are on another device
        return replica

    def initialise(self, seed: int, W: Tensor | None = None) -> None:
        """Fill the adapter's tensors by the method's init. The draw depends on the seed, the site's name and the task.

        Args:
            seed: of the random draw.
            W: [out, in] the weight to start from, if not the base's own.
        """
        if self.weight.is_meta:
            return
        with torch.no_grad():
            filled = {role: p for role, p in self.params.items() if role in self.delta.roles - self.delta.fixed_roles}
            values = {role: torch.zeros(p.shape, dtype=p.dtype) for role, p in filled.items()}
            W = self.kind.matrix(self.base).detach() if W is None else W
            fill(self.init, values, W, self.site, self.scale, self.generator(seed))
            if self.init.residual_init:
                values |= {start_name(role): value for role, value in values.items()}
            self.load(values)

    def generator(self, seed: int) -> torch.Generator:
        """The random numbers of this site: a function of the seed, its name and the task."""
        return self.site.generator(seed, self.delta.task_index)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy values into the adapter's tensors by role; shapes must match."""
        with torch.no_grad():
            for role, tensor in tensors.items():
                if role in self.params:
                    self.params[role].copy_(tensor)
                elif role not in self.shared_shapes:
                    self.start[role] = tensor.detach().to("cpu", copy=True)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(B [out, R], A [R, in]), without the scale; with a leading E for experts."""
        return for_every_expert(self.site, factors_at(self.delta, self.site, self.tensors))

    def start_factors(self) -> tuple[Tensor, Tensor] | None:
        """(B [out, R], A [R, in]) of the initial delta that the base was reduced by; None for an unreduced base."""
        if not self.start:
            return None
        return factors_at(self.delta, self.site, {role: self.start[start_name(role)] for role in self.delta.roles})

    def weight_times(self, A: Tensor) -> Tensor:
        """W A^T [out, R] of A [R, in], in A's precision, differentiable in A; keeps no second copy of W."""
        product: Any = getattr(self.base, "weight_times", None)
        if product is not None:
            return cast(Tensor, product(A)).T
        return linear(self.kind.matrix(self.base).detach(), A)

    def once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """make(), a tensor without a graph: computed once inside a `lorary.cached` block, in each call elsewhere."""
        kept = self.kept
        if kept is None or torch.compiler.is_compiling():
            return make()
        if name not in kept:
            # normal tensors even in inference mode, because a later backward pass may save them
            with torch.inference_mode(False), torch.no_grad():
                kept[name] = make(), under_the_same_autocast(make, self.weight.device.type)
        return kept[name][0]

    def run_base(self, x: Tensor) -> Tensor:
        """The base's output, in memory that the caller may overwrite."""
        y: Tensor = (base := cast(nn.Module, children_of(self)["base"]))(x)
        # hooks and replaced forwards may return a tensor that they keep
        return y.clone() if forward_hooks_of(base) or "forward" in vars(base) else y

    def add_delta(self, y: Tensor, x: Tensor, dropout: float | None = None) -> Tensor:
        """y + s B A x, by the delta's fused kernel where it has one. May write into y.

        Args:
            y: the layer's output.
            x: the layer's input.
            dropout: of the input; the method's by default.
        """
        dropout = self.dropout if dropout is None else dropout
        if self._fused is not None:
            return self._fused(self, y, x, dropout)
        B, A = factors_at(self.delta, self.site, self.tensors)
        return self.kind.add(self.base, y, x, A, B, self.scale, dropout)

    def forward(self, input: Tensor | None = None, *, x: Tensor | None = None) -> Tensor:
        """The adapted layer's output. `input` is the keyword of PyTorch's layers, `x` that of GPT-2's Conv1D."""
        return self._forward(self, input if x is None else x)  # type: ignore[arg-type]  # the base refuses None

    def _merged_output(self, x: Tensor) -> Tensor:
        """The merged layer's output, for references to this layer that the merge left behind."""
        return cast(Tensor, self._merged_into[0](x))

    def base_output(self, x: Tensor) -> Tensor:
        """The output of the original layer; a quantised residual base needs its initial delta added back."""
        y: Tensor = self.base(x)
        factors = self.start_factors() if is_quantized(self.base) else None
        if factors is None:
            return y
        B, A = (factor.to(y.device) for factor in factors)
        return self.kind.add(self.base, y, x, A, B, self.scale, 0.0)

    @torch.no_grad()
    def merged(self, W: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(W' [out, in], b' [out]) of the plain layer with the same function, unrounded, in at least 32 bits.

        `W` [out, in] stands for the base's own weight, if given. MethodError: no plain layer has the same function.
        """
        W = self.kind.matrix(self.base) if W is None else W
        exact = torch.promote_types(W.dtype, torch.float32)
        B, A = (factor.to(exact) for factor in self.factors())
        b = None if self.bias is None else self.bias.to(exact)
        return merged_at(self.join, self.site, self.tensors, W.to(exact), b, (self.scale * B, A), self.scale)

    def extra_repr(self) -> str:
        return f"{self.site.name}, " + (f"r={self.delta.r}, s={self.scale:g}" if self.delta.r else str(self.join))


# attributes that decide which functions compute the layer
_RESOLVES = frozenset({"training", "enabled", "_merged_into", "method", "site", "base", "params", "shared"})


def _zero_parameters(site: AdaptedSite, dtype: torch.dtype, device: torch.device) -> Parameters:
    """role -> parameter, all zero, for every role that is not shared."""
    own = {role: shape for role, shape in site.shapes.items() if role not in site.delta.shared}
    zeros = {role: torch.zeros(shape, dtype=dtype, device=device) for role, shape in own.items()}
    return Parameters({role: nn.Parameter(t, role in site.method.trained) for role, t in zeros.items()})


class Parameters(nn.ParameterDict):
    """role -> parameter. PyTorch's own look-up takes longer than a small product."""

    def __getitem__(self, role: str) -> nn.Parameter:
        return parameters_of(self)[role]  # type: ignore[return-value]  # none of them is None

    def __setattr__(self, name: str, value: Any) -> None:
        # DataParallel gives its replicas tensors of a graph, as plain attributes
        if isinstance(value, Tensor) and is_replica(self):
            parameters_of(self)[name] = cast(nn.Parameter, value)
            return
        super().__setattr__(name, value)


class Kept(dict[str, tuple[Tensor, Callable[[], Tensor]]]):
    """name -> the value that `Adapted.once` has computed in a `lorary.cached` block, and how to compute it again."""

    def __reduce__(self) -> Any:  # a copied layer is in no block
        return type(None), ()


def _fused_path(delta: Delta, kind: Kind, site: Site) -> Callable[[Any, Tensor, Tensor, float], Tensor] | None:
    """The delta's own way of adding itself, if it has one for such a layer."""
    possible = delta.fused_for_all_kinds or (kind.rowwise and not site.parts)
    return cast(Fused, delta).add if possible and is_fused(type(delta)) else None


def adapted_layers(model: nn.Module) -> dict[str, Adapted]:
    """The adapted layers of a model by site name, in module order."""
    return {m.site.name: m for m in model.modules() if isinstance(m, Adapted)}


def unwrapped_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the plain model by path; adapted layers appear as their bases, some parameters as layers."""
    layers = adapted_layers(model)
    inside = tuple(f"{name}." for name in layers)
    found: dict[str, nn.Module] = {}
    for name, module in named_modules(model):
        if name in layers or not name.startswith(inside):
            found[name] = layers[name].base if name in layers else module
            found |= {f"{name}.{own}".lstrip("."): layer for own, layer in parameter_layers(module).items()}
    return found


def base_parameters(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """The base parameters by their paths in the plain model; tied ones appear under each of their names."""
    model = unwrapped(model)
    if isinstance(model, Adapted):
        yield from base_parameters(model.base, prefix)
        return
    for name, parameter in model.named_parameters(recurse=False):
        yield prefix[:-1] if isinstance(model, ExpertLayer | InProjection) else f"{prefix}{name}", parameter
    for name, child in model.named_children():
        yield from base_parameters(child, f"{prefix}{name}.")
