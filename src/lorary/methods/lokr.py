"""LoKr: y = W x + b + s (C kron D) x with s = alpha / r, where D = Db Da, and so is C if `decompose_both`.

The Kronecker product of a small matrix C [c1, c2] and a larger one D [d1, d2] has the weight's size, c1 d1 = out and
c2 d2 = in, and the product of their ranks. D is a low-rank product unless r is at least half of its larger side.

Yeh et al. 2023, arXiv:2309.14859, section 3 (LyCORIS), whose start and defaults these are; KronA (Edalati et al. 2022,
arXiv:2212.10650) has both matrices whole.

Differs from LyCORIS: s = alpha / r also where C and D are both whole, as in PEFT (LyCORIS: 1); a `factor` above the
root of a size makes C the larger one, as in PEFT (LyCORIS exchanges the two). Files of either are read as their own
tool computes. A fused site has one product for all of its parts.
"""

from __future__ import annotations

import math
from dataclasses import field
from typing import Any

import torch
from torch import Tensor, nn

from lorary.kernels.kronecker import add_kronecker
from lorary.methods.loha import has_core, matrix_factors, with_core
from lorary.methods.lora import AlphaOverRank
from lorary.spec.fields import COUNT, FLAG, SIZES
from lorary.spec.interfaces import Delta, Factors, Init, Layer, Shapes, Tensors, component
from lorary.spec.presets import preset
from lorary.spec.site import Site

FACTOR: dict[str, Any] = {
    "check": lambda value: type(value) is int and (value == -1 or 0 < value < 2**31),
    "expects": "a whole number of at least 1, or -1 for the two nearest divisors",
}
_ROLES = frozenset({"C", "Cb", "Ca", "D", "Db", "Da", "T"})


@component
class KroneckerProduct(Delta):
    """C [c1, c2] or Cb [c1, r], Ca [r, c2]; D [d1, d2] or Db [d1, r], Da [r, d2], with T [r, r, window] in Tucker form.

    Args:
        factor: c1 and c2, where it divides the sizes; otherwise the divisors nearest to their roots, up to it.
        decompose_both: whether C is a product too, where r is below half of its larger side.
        tucker: whether the windows of convolutions have a core.
        sizes: (c1, c2), if not those of `factor`.
    """

    r: int = field(metadata=COUNT)
    factor: int = field(default=-1, metadata=FACTOR)
    decompose_both: bool = field(default=False, metadata=FLAG)
    tucker: bool = field(default=False, metadata=FLAG)
    sizes: tuple[int, ...] = field(default=(), metadata=SIZES)

    roles = _ROLES
    batched = True
    chains = (("C", "Ca", "Cb"), ("D", "Da", "Db"))
    chains_meet = "\N{CIRCLED TIMES}"

    def blocks(self, site: Site) -> tuple[int, int, int, int]:
        """(c1, c2, d1, d2), d2 in channels."""
        out, channels = sum(site.rows), site.in_features // math.prod(site.kernel_size)
        c1, c2 = self.sizes or (factorization(out, self.factor)[0], factorization(channels, self.factor)[0])
        return c1, c2, out // c1, channels // c2

    def shapes(self, site: Site) -> Shapes:
        r, window = self.r, math.prod(site.kernel_size)
        c1, c2, d1, d2 = self.blocks(site)
        split = self.decompose_both and r < max(c1, c2) / 2
        found: Shapes = {"Ca": (r, c2), "Cb": (c1, r)} if split else {"C": (c1, c2)}
        if r >= max(d1, d2) / 2:
            return found | {"D": (d1, d2 * window)}
        if has_core(site, self.tucker):
            return found | {"Da": (r, d2), "T": (r, r, window), "Db": (d1, r)}
        return found | {"Da": (r, d2 * window), "Db": (d1, r)}

    def factors(self, site: Site, params: Tensors) -> Factors:
        (Cb, Ca), (Db, Da) = (_pair(*chain) for chain in _chains(params))
        return site.place_rows(_kron(Cb, Db)), _kron(Ca, Da)

    def add(self, layer: Layer, y: Tensor, x: Tensor, dropout: float) -> Tensor:
        return add_kronecker(y, x, *_chains(layer.params), layer.scale, dropout)

    def problems(self, site: Site) -> list[str]:
        if not self.sizes:
            return []
        out, channels = sum(site.rows), site.in_features // math.prod(site.kernel_size)
        if len(self.sizes) == 2 and out % self.sizes[0] == 0 and channels % self.sizes[1] == 0:
            return []
        return [f"sizes = {self.sizes} does not divide its {out} output and {channels} input features"]


def factorization(size: int, factor: int = -1) -> tuple[int, int]:
    """Two divisors of a size: the factor and the rest, or the two nearest to its root, the first at most the factor.

    >>> factorization(128), factorization(128, 4), factorization(127, 4)
    ((8, 16), (4, 32), (1, 127))
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = min(math.isqrt(size), size if factor < 0 else factor)
    first = next(m for m in range(most, 0, -1) if size % m == 0)
    return first, size // first


def _chains(params: Tensors) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """C and D, each as a matrix or as the two factors of one."""
    C = (params["C"],) if "C" in params else (params["Cb"], params["Ca"])
    D = (params["D"],) if "D" in params else (params["Db"], with_core(params["Da"], params.get("T")))
    return C, D


def _pair(*chain: Tensor) -> Factors:
    """Two factors of a matrix with the narrowest middle: its own, or itself and an identity."""
    if len(chain) == 2 and chain[0].shape[-1] < min(chain[0].shape[-2], chain[1].shape[-1]):
        return chain[0], chain[1]
    return matrix_factors(chain[0] if len(chain) == 1 else chain[0] @ chain[1])


def _kron(C: Tensor, D: Tensor) -> Tensor:
    """The Kronecker product of the last two dimensions."""
    blocks = C[..., :, None, :, None] * D[..., None, :, None, :]
    return blocks.flatten(-4, -3).flatten(-2)


@component
class KroneckerInit(Init):
    """D = 0, or Da = 0; all others as a linear layer's weight: ~ U(-1/sqrt(columns), 1/sqrt(columns))."""

    fills = _ROLES

    def zeros(self, site: Site) -> frozenset[str]:
        return frozenset({"D", "Da"})

    def __call__(self, params: Tensors, W: Tensor, site: Site, scale: float, generator: torch.Generator) -> None:
        for role, tensor in params.items():
            if role in ("D", "Da"):
                nn.init.zeros_(tensor)
            else:
                nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)


@preset(
    "lokr",
    citation="Yeh et al. 2023, arXiv:2309.14859",
    when="For a high rank from very few parameters, and for the files of diffusion tools.",
)
def lokr(
    r: int = 4, alpha: float = 1.0, factor: int = -1, decompose_both: bool = False, tucker: bool = False
) -> dict[str, Any]:
    """y = W x + b + s (C kron D) x, D = Db Da

    Args:
        r: the rank of D; from half of its larger side on, D is one matrix.
        alpha: s = alpha / r.
        factor: the size of C where it divides the layer's; -1 for the two divisors nearest to the root.
        decompose_both: C is a product of rank r too.
        tucker: convolutions have cores for their windows, and so fewer parameters.
    """
    return {
        "delta": KroneckerProduct(r, factor, decompose_both, tucker),
        "init": KroneckerInit(),
        "scale": AlphaOverRank(alpha),
    }
