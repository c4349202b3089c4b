"""Adapted: the one adapter module. A frozen layer, and what is being learnt about it; and what all of them share."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorary._deprecated import RenamedAttribute
from lorary.kernels.row_norms import linear
from lorary.kernels.shared_projection import LastProductCache
from lorary.layers.cache import TensorCache
from lorary.layers.kinds import KINDS
from lorary.layers.quantized_weight import is_quantized, stored_tensors, weight
from lorary.spec.interfaces import Fused
from lorary.spec.layer import Kind
from lorary.spec.method import Method
from lorary.spec.placement import AdaptedSite, adaptation, shared_shapes, start_name


class SharedProjections(nn.Module):
    """The frozen tensors of which every adapted layer holds a part: one bank for the whole model.

    They are buffers of one module that all layers have in common, so that they are no parameters of any optimizer,
    move with the model as one tensor, and stay one when it is copied.

    Args:
        placed: all sites; each tensor is as large as the largest of them asks for.
        dtype: of the tensors.
        device: where they are.
    """

    def __init__(self, placed: Sequence[AdaptedSite], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        for role, size in shared_shapes(placed).items():
            self.register_buffer(role, torch.zeros(size, dtype=dtype, device=device), persistent=False)
        self.once = LastProductCache()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """role -> tensor, whole."""
        return dict(self.named_buffers(recurse=False))

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy values into the leading corner of each tensor."""
        with torch.no_grad():
            for role, tensor in tensors.items():
                leading_slice(self.tensors[role], tuple(tensor.shape)).copy_(tensor)


def leading_slice(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The leading slice of a tensor, a view of this shape."""
    return tensor[tuple(slice(n) for n in shape)]


class Adapted(nn.Module):
    """A frozen layer and what is being learnt about it.

    Args:
        base: the layer; it is kept as it is, and its parameters are expected to be frozen already.
        placed: the site and the method that it takes there, with the site's own rank and scale.
        dtype: of the learnt tensors; 32-bit masters keep small steps that a 16-bit weight would round away.
        shared: what all layers of the model share, where the method has such tensors.
        p: the tensors of another layer, where the plan says that the two share what they learn.

    Attributes:
        p: role -> parameter. A and B for LoRA; the papers' letters for the others.
        start: role -> its start, on the CPU, where the base gave up s B A for it.
        enabled: whether forward adds what was learnt; `lorary.disabled` clears it for a while.
        chosen: what a rule has drawn for the present optimizer step; None where none draws.

    `weight` and `bias` are those of the base, because foreign code reads them (weight tying, dtype look-ups), and so
    are its plain attributes, such as `in_features`, `stride` or `padding_idx`.
    """

    p = RenamedAttribute("params")

    def __init__(
        self,
        base: nn.Module,
        placed: AdaptedSite,
        dtype: torch.dtype = torch.float32,
        shared: SharedProjections | None = None,
        p: nn.ParameterDict | None = None,
    ) -> None:
        super().__init__()
        for name, value in vars(base).items():
            if not (name.startswith("_") or name == "training" or hasattr(Adapted, name)):
                vars(self)[name] = value
        self.site = placed.site
        self.method = placed.method
        self.scale = placed.scale
        self.enabled = True
        self.active_structure: Any = None
        self.base = base
        self.shared = shared
        self.cached = TensorCache()
        self.start: dict[str, Tensor] = {}
        self.params = p if p is not None else _zeros(placed, dtype, stored_tensors(base)[0].device)
        # role -> the corner of the shared tensor that is this site's
        self.shared_shapes = {role: placed.shapes[role] for role in sorted(placed.delta.shared)}

    @property
    def method(self) -> Method:
        """The method at this site. Its delta, init and join are resolved when it is set, not in every step."""
        return self._method

    @method.setter
    def method(self, method: Method) -> None:
        words = adaptation(method)
        self._method, self.delta, self.init, self.join = method, words.delta, words.init, words.join

    @property
    def kind(self) -> Kind:
        """How this sort of layer deals with [out, inp] matrices."""
        return KINDS[self.site.kind]

    @property
    def weight(self) -> Tensor:
        """The base layer's weight as the layer keeps it: in its own layout, or the first tensor of a packed one."""
        return stored_tensors(self.base)[0]

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the base layer's dense weight."""
        return weight(self.base).dtype if is_quantized(self.base) else self.weight.dtype

    @property
    def stored_tensors(self) -> list[Tensor]:
        """The tensors in which the base layer keeps its weight."""
        return stored_tensors(self.base)

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return getattr(self.base, "bias", None)

    @property
    def dropout(self) -> float:
        """The probability of dropping an input of the adapter now."""
        return self.method.dropout if self.training else 0.0

    @property
    def tensors(self) -> dict[str, Tensor]:
        """role -> tensor: its own parameters, and its part of what all layers share."""
        own: dict[str, Tensor] = dict(self.params.items())
        if self.shared is None:
            return own
        whole = self.shared.tensors
        return own | {role: leading_slice(whole[role], shape) for role, shape in self.shared_shapes.items()}

    def __setattr__(self, name: str, value: Any) -> None:
        # tying code assigns `module.weight`: the base is meant
        if name in ("weight", "bias"):
            setattr(self.base, name, value)
        else:
            super().__setattr__(name, value)

    def initialise(self, seed: int, W: Tensor | None = None) -> None:
        """Fill the tensors so that nothing moves at step 0. The draw depends on the seed, the site's name and turn.

        Args:
            seed: of the draw.
            W: [out, inp] what to start at instead of the layer's own weight.
        """
        if self.weight.is_meta:
            return
        delta, init = self.delta, self.init
        turn = f"/{delta.task_index}" if delta.task_index else ""
        digest = hashlib.sha256(f"{seed}/{self.site.name}{turn}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        with torch.no_grad():
            own = [role for role in self.params if role in delta.roles - delta.fixed_roles]
            cpu = {role: torch.zeros(self.params[role].shape, dtype=self.params[role].dtype) for role in own}
            W = self.kind.matrix(self.base).detach() if W is None else W
            init(cpu, W, self.site, self.scale, generator)
            if init.residual_init:
                cpu |= {start_name(role): t for role, t in cpu.items()}
            self.load(cpu)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy values in, role by role; shapes have been checked by whoever read them."""
        with torch.no_grad():
            for role, tensor in tensors.items():
                if role in self.params:
                    self.params[role].copy_(tensor)
                elif role not in self.shared_shapes:
                    self.start[role] = tensor.detach().to("cpu", copy=True)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(B [out, R], A [R, inp]), without the scale."""
        return self.delta.factors(self.site, self.tensors)

    def start_factors(self) -> tuple[Tensor, Tensor] | None:
        """(B [out, R], A [R, inp]) at the start, without the scale, where the base gave up s B A for them."""
        if not self.start:
            return None
        return self.delta.factors(self.site, {role: self.start[start_name(role)] for role in self.delta.roles})

    def weight_times(self, A: Tensor) -> Tensor:
        """W A^T [out, R] of A [R, inp], in A's precision, differentiable in A; keeps W as the base keeps it."""
        lean: Any = getattr(self.base, "product", None)
        if lean is not None:
            return cast(Tensor, lean(A)).T
        return linear(self.kind.matrix(self.base).detach(), A)

    def add_delta(self, y: Tensor, x: Tensor, dropout: float | None = None) -> Tensor:
        """y + s * B A x: the seam where fused kernels plug in. May write into y.

        Args:
            y: the layer's output, or what stands for it.
            x: its input.
            dropout: of the input; the method's where nothing is said.
        """
        dropout = self.dropout if dropout is None else dropout
        delta = self.delta
        if isinstance(delta, Fused) and (delta.fused_for_all_kinds or (self.kind.rowwise and not self.site.parts)):
            return delta.add(self, y, x, dropout)
        B, A = self.factors()
        return self.kind.add(self.base, y, x, A, B, self.scale, dropout)

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self.base_output(x)
        return self.join.forward(self, x)

    def base_output(self, x: Tensor) -> Tensor:
        """The base's function of x; a packed base keeps what it gave up at the start in the start's factors alone."""
        y: Tensor = self.base(x)
        factors = self.start_factors() if is_quantized(self.base) else None
        if factors is None:
            return y
        B, A = (factor.to(y.device) for factor in factors)
        return self.kind.add(self.base, y, x, A, B, self.scale, 0.0)

    @torch.no_grad()
    def merged(self) -> tuple[Tensor, Tensor | None]:
        """(W' [out, inp], b' [out]) of the plain layer with the same function, in at least 32 bits, not yet rounded."""
        W = self.kind.matrix(self.base)
        exact = torch.promote_types(W.dtype, torch.float32)
        B, A = (factor.to(exact) for factor in self.factors())
        b = None if self.bias is None else self.bias.to(exact)
        return self.join.merged(self.tensors, W.to(exact), b, (self.scale * B, A))

    def extra_repr(self) -> str:
        return f"{self.site.name}, r={self.delta.r}, s={self.scale:g}"


def _zeros(placed: AdaptedSite, dtype: torch.dtype, device: torch.device) -> nn.ParameterDict:
    """role -> parameter, all zero, of everything that is a site's own."""
    own = {role: shape for role, shape in placed.shapes.items() if role not in placed.delta.shared}
    trained = placed.method.trained
    return nn.ParameterDict(
        {
            role: nn.Parameter(torch.zeros(shape, dtype=dtype, device=device), requires_grad=role in trained)
            for role, shape in own.items()
        }
    )


def adapted_layers(model: nn.Module) -> dict[str, Adapted]:
    """The adapted layers of a model by site name, in the model's order."""
    return {m.site.name: m for m in model.modules() if isinstance(m, Adapted)}


def unwrapped_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the plain model by path, whatever is attached to it."""
    layers = adapted_layers(model)
    inside = tuple(f"{name}." for name in layers)
    return {
        name: layers[name].base if name in layers else module
        for name, module in model.named_modules()
        if name in layers or not name.startswith(inside)
    }


def base_parameters(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """All base parameters by their paths in the plain model, tied ones under each of their names."""
    if isinstance(model, Adapted):
        yield from base_parameters(model.base, prefix)
        return
    for name, parameter in model.named_parameters(recurse=False):
        yield f"{prefix}{name}", parameter
    for name, child in model.named_children():
        yield from base_parameters(child, f"{prefix}{name}.")
