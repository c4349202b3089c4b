"""How PEFT names and shapes the tensors of an adapter, and the same as lorary's tensors by role.

    linear, transposed   <site>.lora_A.weight (R, inp)          <site>.lora_B.weight (out, R)
    embedding            <site>.lora_embedding_A (R, vocabulary)  <site>.lora_embedding_B (width, R)
    convolution          <site>.lora_A.weight (R, in, *window)  <site>.lora_B.weight (out, R, 1, ...)
    DoRA                 and <site>.lora_magnitude_vector (out,), of a convolution (1, out, 1, ...)
    AdaLoRA              <site>.lora_A (R, inp)                 <site>.lora_B (out, R), and <site>.lora_E (R, 1)
    VeRA                 <site>.vera_lambda_b (out,)            <site>.vera_lambda_d (r,)
                         and for all sites base_model.vera_A (r, widest inp), base_model.vera_B (widest out, r)

A site whose fused weight is adapted part by part is, for PEFT, one LoRA of rank R = parts * r whose B is zero off
the parts' blocks: the same update, number for number. What earlier tasks have learnt there (O-LoRA) follows as further
directions. Every other name in a file begins with `base_model.model.`;
files written from a bare module have no such prefix, and both are read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lorary.errors import FileError, Problem
from lorary.methods.adalora import Spectral
from lorary.methods.dora import Direction
from lorary.methods.vera import Vectors
from lorary.placed import Placed
from lorary.sites import Site

_PAST = {"A": "A_past", "B": "B_past"}  # what earlier tasks have learnt, below the new task's
PREFIX = "base_model.model."
MAGNITUDE = "lora_magnitude_vector"
BANKS = {"A": "vera_A", "B": "vera_B"}
_OUTER = {f"base_model.{name}": name for name in BANKS.values()}
_LORA = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
}
LEAVES = {  # of each sort of adapter: the end of a name -> the role
    "AdaLoRA": {"lora_A": "Q", "lora_B": "P", "lora_E": "E"},
    "LoRA": _LORA,
    "DoRA": _LORA | {MAGNITUDE: "m"},
    "VeRA": {"vera_lambda_b": "b", "vera_lambda_d": "d"},
}


class Key(NamedTuple):
    """A tensor's name in a PEFT file, taken apart."""

    site: str
    role: str


def short(name: str) -> str:
    """A tensor's name without what every file puts before it."""
    return _OUTER.get(name, name.removeprefix(PREFIX))


def full(name: str) -> str:
    """The name in a file of a tensor whose short name this is."""
    return f"base_model.{name}" if name in BANKS.values() else PREFIX + name


def parsed(name: str, sort: str) -> Key | None:
    """The site and role that a short name stands for; None for what is no tensor of a site in this sort of adapter."""
    leaves = "|".join(map(re.escape, LEAVES[sort]))
    match = re.fullmatch(rf"(?:(?P<site>.*)\.)?(?P<leaf>{leaves})", name)
    return None if match is None else Key(match["site"] or "", LEAVES[sort][match["leaf"]])


def rank(p: Placed) -> int:
    """The rank that PEFT sees at a site: r for each part, and that of each earlier task."""
    return sum(p.shapes[role][0] for role in ("A", _PAST["A"]) if role in p.shapes)


def layout(p: Placed) -> dict[str, tuple[str, tuple[int, ...]]]:
    """role -> (the short name, the shape) of a site's own tensors, as PEFT has them."""
    if sort := own_sort(p):
        names = {role: leaf for leaf, role in LEAVES[sort].items()}
        sizes = p.shapes | ({"E": (*p.shapes["E"], 1)} if "E" in names else {})
        return {role: (f"{p.site.name}.{leaf}", sizes[role]) for role, leaf in names.items()}
    found = shapes(p.site, rank(p))
    if isinstance(p.method.join, Direction):
        found["m"] = (f"{p.site.name}.{MAGNITUDE}", magnitudes(p.site)[0])
    return found


def own_sort(p: Placed) -> str:
    """The sort of a site whose tensors PEFT has one by one, as we do; empty for a LoRA's factors."""
    return next((sort for delta, sort in ((Vectors, "VeRA"), (Spectral, "AdaLoRA")) if isinstance(p.delta, delta)), "")


def shapes(site: Site, r: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """role -> (the short name, the shape) of a LoRA of rank r at a site, as PEFT has them."""
    if site.kind == "embedding":
        names = {"A": "lora_embedding_A", "B": "lora_embedding_B"}
    else:
        names = {"A": "lora_A.weight", "B": "lora_B.weight"}
    channels = site.inp // math.prod(site.window) if site.window else site.inp
    ones = (1,) * len(site.window)
    found = {"A": (r, channels, *site.window), "B": (site.out, r, *ones)}
    return {role: (f"{site.name}.{names[role]}", shape) for role, shape in found.items()}


def magnitudes(site: Site) -> list[tuple[int, ...]]:
    """The shapes that DoRA's magnitudes have been written in, one for every output; PEFT's own is the first.

    A row (1, out) can be told from magnitudes of the inputs, which other programs have, only where the layer is not
    square.
    """
    ones = (1,) * len(site.window)
    column, row = (site.out, 1, *ones), (1, site.out, *ones)
    if site.window:
        return [row, (site.out,), column]
    return [(site.out,), column] + ([row] if site.out != site.inp else [])


def written(p: Placed, roles: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that a PEFT file has of a site, short names."""
    if own_sort(p):
        return {name: roles[role].reshape(shape) for role, (name, shape) in layout(p).items()}
    A, B = roles["A"], roles["B"]
    if _PAST["A"] in roles:
        B = torch.cat([p.site.place(B), roles[_PAST["B"]]], 1)
        A = torch.cat([A, roles[_PAST["A"]]])
    return encoded(p.site, A, B, roles.get("m"))


def encoded(site: Site, A: Tensor, B: Tensor, m: Tensor | None = None) -> dict[str, Tensor]:
    """The tensors of a PEFT LoRA at one site, short names.

    Args:
        site: the site.
        A: [R, inp].
        B: [out, R], or stacked by parts [rows of the parts, r] at a fused site.
        m: [out], DoRA's magnitudes.
    """
    B = site.place(B) if site.parts and tuple(B.shape) != (site.out, A.shape[0]) else B
    found = shapes(site, A.shape[0])
    tensors = {name: t.reshape(shape) for (name, shape), t in ((found["A"], A), (found["B"], B))}
    return tensors if m is None else tensors | {f"{site.name}.{MAGNITUDE}": m.reshape(magnitudes(site)[0])}


def decoded(p: Placed, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """role -> tensor of a site's own, from a PEFT file's tensors of the right names and shapes.

    Raises:
        FileError: B is not zero off the blocks of a fused site's parts.
    """
    site, names = p.site, {role: name for role, (name, _) in layout(p).items()}
    if own_sort(p):
        return {role: tensors[name].reshape(p.shapes[role]) for role, name in names.items()}
    found = {"m": tensors[names["m"]].reshape(site.out)} if "m" in names else {}
    A = tensors[names["A"]].reshape(rank(p), site.inp)
    B = tensors[names["B"]].reshape(site.out, rank(p))
    if _PAST["A"] in p.shapes:
        sizes = [p.shapes["A"][0], p.shapes[_PAST["A"]][0]]
        (A, found[_PAST["A"]]), (B, found[_PAST["B"]]) = A.split(sizes), B.split(sizes, 1)
        found = {role: t.clone() for role, t in found.items()}
        A, B = A.clone(), B.clone()
    if not site.parts:
        return {"A": A, "B": B} | found
    blocks = [B[part.rows(), i * p.r : (i + 1) * p.r] for i, part in enumerate(site.parts)]
    stacked = torch.cat(blocks)
    if not torch.equal(site.place(stacked), B):
        what = f"is not zero off the blocks of {', '.join(part.name for part in site.parts)}"
        raise FileError("", [Problem(names["B"], what)])
    return {"A": A, "B": stacked} | found


def full_name(parameter: str, sites: set[str]) -> str:
    """The short name of a base parameter that a file holds whole: PEFT moves an adapted layer's inwards."""
    path, _, last = parameter.rpartition(".")
    return f"{path}.base_layer.{last}" if path in sites else parameter
