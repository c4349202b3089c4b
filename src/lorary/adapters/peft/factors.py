"""The tensors of a site in PEFT's LoRA files: their names, shapes, and how the parts of a fused weight are packed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lorary.adapters.peft import attention, experts
from lorary.adapters.peft.keys import BIAS, MAGNITUDE
from lorary.adapters.tensor_checks import Layout
from lorary.errors import Diagnostic, FileError
from lorary.spec.placement import AdaptedSite
from lorary.spec.site import Site


def factor_names(site: Site) -> tuple[str, str]:
    """The names of A and B of a site, without prefix."""
    middle, ending = ("embedding_", "") if site.kind == "embedding" else ("", ".weight")
    return f"{site.name}.lora_{middle}A{ending}", f"{site.name}.lora_{middle}B{ending}"


def blocks_of_parts(adapted: AdaptedSite, B: Tensor, name: str) -> Tensor:
    """[rows of the parts, r] of PEFT's B [out, parts * r] of this name at a fused site; elsewhere B itself.

    Experts are in front of both.

    Raises:
        FileError: it is not zero outside the parts' blocks.
    """
    site, r = adapted.site, adapted.r
    if not site.parts:
        return B
    blocks = torch.cat([B[..., part.rows(), i * r : (i + 1) * r] for i, part in enumerate(site.parts)], -2)
    if not torch.equal(site.place(blocks), B):
        what = f"is not zero outside the blocks of {', '.join(part.name for part in site.parts)}"
        raise FileError("", [Diagnostic(name, what)])
    return blocks


def bias_of_parts(adapted: AdaptedSite, c: Tensor) -> Tensor:
    """[rows of the parts] of PEFT's bias beside B [out] at a fused site; elsewhere the bias itself.

    Raises:
        FileError: it is not zero outside the parts' rows.
    """
    site = adapted.site
    if not site.parts:
        return c
    rows = c[site.part_rows()]
    if not torch.equal(adapted.join.whole(site, {"c": rows})["c"], c):
        what = f"is not zero outside the rows of {', '.join(part.name for part in site.parts)}"
        raise FileError("", [Diagnostic(f"{site.name}.{BIAS}", what)])
    return rows


def factor_shapes(site: Site, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of A and B of rank r, which PEFT keeps as filters at a convolution."""
    channels, ones = site.in_features // math.prod(site.kernel_size), (1,) * len(site.kernel_size)
    return (r, channels, *site.kernel_size), (site.out_features, r, *ones)


def factor_layout(site: Site, r: int, *, dora: bool, bias: bool) -> Layout:
    """role -> (name, shape) of a LoRA of rank r, with DoRA's magnitudes or a bias beside B."""
    shapes = experts.shapes(site, r) if site.experts else factor_shapes(site, r)
    found = dict(zip("AB", zip(factor_names(site), shapes, strict=True), strict=True))
    m = (1, site.out_features, *(1,) * len(site.kernel_size)) if site.kernel_size else (site.out_features,)
    own = {"m": (f"{site.name}.{MAGNITUDE}", m)} if dora else {}
    return found | own | ({"c": (f"{site.name}.{BIAS}", (site.out_features,))} if bias else {})


def encode_factors(
    site: Site, A: Tensor, B: Tensor, m: Tensor | None = None, c: Tensor | None = None
) -> dict[str, Tensor]:
    """The tensors of a LoRA at one site by their names without prefix.

    Args:
        site: the site.
        A: [R, in], or [E, R, in] for experts.
        B: [out, R], or [rows of the parts, r] at a fused site, or [E, out, R].
        m: [out], DoRA's magnitudes.
        c: [out], the bias beside B.
    """
    if site.experts:
        return dict(zip(factor_names(site), experts.encode(site, A, B), strict=True))
    B = site.place(B) if site.parts and tuple(B.shape) != (site.out_features, A.shape[0]) else B
    B = attention.up_factor_in_file(site, B)
    roles = {role: t for role, t in {"A": A, "B": B, "m": m, "c": c}.items() if t is not None}
    packed = factor_layout(site, A.shape[0], dora=m is not None, bias=c is not None)
    return {name: roles[role].reshape(shape) for role, (name, shape) in packed.items()}
