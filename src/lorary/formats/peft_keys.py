"""How PEFT names and shapes the tensors of a LoRA, and the same as lorary's A [R, inp] and B [out, R].

    linear, transposed   <site>.lora_A.weight (R, inp)          <site>.lora_B.weight (out, R)
    embedding            <site>.lora_embedding_A (R, vocabulary)  <site>.lora_embedding_B (width, R)
    convolution          <site>.lora_A.weight (R, in, *window)  <site>.lora_B.weight (out, R, 1, ...)

A site whose fused weight is adapted part by part is, for PEFT, one LoRA of rank R = parts * r whose B is zero off
the parts' blocks: the same update, number for number. Every name in a file begins with `base_model.model.`; files
written from a bare module have no such prefix, and both are read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lorary.errors import FileError, Problem
from lorary.placed import Placed
from lorary.sites import Site

PREFIX = "base_model.model."
_ADAPTER = re.compile(r"(?:(?P<site>.*)\.)?(?P<leaf>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B)")
_LEAVES = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
}


class Key(NamedTuple):
    """A tensor's name in a PEFT file, taken apart."""

    site: str
    role: str
    embedding: bool


def parsed(name: str) -> Key | None:
    """The site and role that a name (without prefix) stands for; None for what is no factor of a LoRA."""
    match = _ADAPTER.fullmatch(name)
    if match is None:
        return None
    leaf = match["leaf"]
    return Key(match["site"] or "", _LEAVES[leaf], leaf.startswith("lora_embedding"))


def rank(p: Placed) -> int:
    """The rank that PEFT sees at a site: r for each part."""
    return p.r * max(1, len(p.site.parts))


def shapes(site: Site, r: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """role -> (the name without prefix, the shape) of a LoRA of rank r at a site, as PEFT has them."""
    if site.kind == "embedding":
        names = {"A": "lora_embedding_A", "B": "lora_embedding_B"}
    else:
        names = {"A": "lora_A.weight", "B": "lora_B.weight"}
    channels = site.inp // math.prod(site.window) if site.window else site.inp
    ones = (1,) * len(site.window)
    found = {"A": (r, channels, *site.window), "B": (site.out, r, *ones)}
    return {role: (f"{site.name}.{names[role]}", shape) for role, shape in found.items()}


def encoded(site: Site, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """The tensors of a PEFT file for one site, names without prefix.

    Args:
        site: the site.
        A: [R, inp].
        B: [out, R], or stacked by parts [rows of the parts, r] at a fused site.
    """
    B = site.place(B) if site.parts and tuple(B.shape) != (site.out, A.shape[0]) else B
    layout = shapes(site, A.shape[0])
    return {name: t.reshape(shape) for (name, shape), t in ((layout["A"], A), (layout["B"], B))}


def decoded(p: Placed, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """role -> tensor at a site, from a PEFT file's tensors of the right names and shapes.

    Raises:
        FileError: B is not zero off the blocks of a fused site's parts.
    """
    site = p.site
    layout = shapes(site, rank(p))
    A = tensors[layout["A"][0]].reshape(rank(p), site.inp)
    B = tensors[layout["B"][0]].reshape(site.out, rank(p))
    if not site.parts:
        return {"A": A, "B": B}
    blocks = [B[part.rows(), i * p.r : (i + 1) * p.r] for i, part in enumerate(site.parts)]
    stacked = torch.cat(blocks)
    if not torch.equal(site.place(stacked), B):
        what = f"is not zero off the blocks of {', '.join(part.name for part in site.parts)}"
        raise FileError("", [Problem(layout["B"][0], what)])
    return {"A": A, "B": stacked}


def full_name(parameter: str, sites: set[str]) -> str:
    """The name, without prefix, of a base parameter that a file holds whole: PEFT moves an adapted layer's
    inwards."""
    path, _, last = parameter.rpartition(".")
    return f"{path}.base_layer.{last}" if path in sites else parameter
