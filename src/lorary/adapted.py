"""Adapted: the one adapter module. A frozen layer, and what is being learnt about it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorary.placed import Placed
from lorary.record import Method
from lorary.sites import KINDS, Kind
from lorary.words import Delta, Join


class Adapted(nn.Module):
    """A frozen layer and what is being learnt about it.

    Args:
        base: the layer; it is kept as it is, and its parameters are expected to be frozen already.
        placed: the site and the method that it takes there, with the site's own rank and scale.
        dtype: of the learnt tensors; 32-bit masters keep small steps that a 16-bit weight would round away.

    Attributes:
        p: role -> parameter. A and B for LoRA; the papers' letters for the others.
        enabled: whether forward adds what was learnt; `lorary.disabled` clears it for a while.

    `weight` and `bias` are those of the base, because foreign code reads them (weight tying, dtype look-ups), and so
    are its plain attributes, such as `in_features`, `stride` or `padding_idx`.
    """

    def __init__(self, base: nn.Module, placed: Placed, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for name, value in vars(base).items():
            if not (name.startswith("_") or name == "training" or hasattr(Adapted, name)):
                vars(self)[name] = value
        self.site = placed.site
        self.method: Method = placed.method
        self.scale = placed.scale
        self.enabled = True
        self.base = base
        like = cast(Tensor, base.weight)
        self.p = nn.ParameterDict(
            {
                role: nn.Parameter(
                    torch.zeros(shape, dtype=dtype, device=like.device), requires_grad=role not in self.method.frozen
                )
                for role, shape in placed.shapes.items()
            }
        )

    @property
    def kind(self) -> Kind:
        """How this sort of layer deals with [out, inp] matrices."""
        return KINDS[self.site.kind]

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, in its own layout."""
        return cast(Tensor, self.base.weight)

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return getattr(self.base, "bias", None)

    def __setattr__(self, name: str, value: Any) -> None:
        # tying code assigns `module.weight`: the base is meant
        if name in ("weight", "bias"):
            setattr(self.base, name, value)
        else:
            super().__setattr__(name, value)

    def initialise(self, seed: int) -> None:
        """Fill the tensors so that nothing moves at step 0. The draw depends on the seed and the site's name only."""
        if self.weight.is_meta:
            return
        digest = hashlib.sha256(f"{seed}/{self.site.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        init = self.method.init
        with torch.no_grad():
            W = self.kind.matrix(self.base).detach()
            cpu = {role: torch.zeros(t.shape, dtype=t.dtype) for role, t in self.p.items()}
            if init is not None:
                init(cpu, W, self.site, self.scale, generator)
            self.load(cpu)
            join = cast(Join, self.method.join)
            if join.roles:
                B, A = self.factors()
                join.setup(cast(Any, self.p), torch.addmm(W.float(), B.float(), A.float(), alpha=self.scale))

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Copy values in, role by role; shapes have been checked by whoever read them."""
        with torch.no_grad():
            for role, tensor in tensors.items():
                self.p[role].copy_(tensor)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(B [out, R], A [R, inp]), without the scale."""
        return cast(Delta, self.method.delta).factors(self.site, cast(Any, self.p))

    def add_delta(self, y: Tensor, x: Tensor) -> Tensor:
        """y + s * B A x: the seam where fused kernels plug in. May write into y."""
        B, A = self.factors()
        dropout = self.method.dropout if self.training else 0.0
        return self.kind.add(self.base, y, x, A, B, self.scale, dropout)

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return cast(Tensor, self.base(x))
        return cast(Join, self.method.join).forward(self, x)

    @torch.no_grad()
    def merged(self) -> tuple[Tensor, Tensor | None]:
        """(W' [out, inp], b' [out]) of the plain layer with the same function, in at least 32 bits, not yet rounded."""
        W = self.kind.matrix(self.base)
        exact = torch.promote_types(W.dtype, torch.float32)
        B, A = (factor.to(exact) for factor in self.factors())
        b = None if self.bias is None else self.bias.to(exact)
        return cast(Join, self.method.join).merged(cast(Any, self.p), W.to(exact), b, (self.scale * B, A))

    def extra_repr(self) -> str:
        return f"{self.site.name}, r={cast(Delta, self.method.delta).r}, s={self.scale:g}"


def adapted(model: nn.Module) -> dict[str, Adapted]:
    """The adapted layers of a model by site name, in the model's order."""
    return {m.site.name: m for m in model.modules() if isinstance(m, Adapted)}


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the plain model by path, whatever is attached to it."""
    layers = adapted(model)
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
