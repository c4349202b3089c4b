"""GLoRA's terms: the forms of each, and their tensors (see `glora`).

A supernet's tensors serve every structure of a layer: the vector of a term is the first column of its down part, its
scalar that column's first number (the authors' weight entanglement).
"""

from __future__ import annotations

import itertools
from dataclasses import field
from functools import cache

import torch
from torch import Tensor

from lorary.spec.fields import COUNT, one_of
from lorary.spec.interfaces import Delta, Factors, Shapes, Tensors, component
from lorary.spec.site import Site

# term -> its forms, the most general first: each is a special case of the one before it
FORMS: dict[str, tuple[str, ...]] = {
    "A": ("lora", "vector", "scalar", "none"),
    "B": ("lora", "vector", "scalar", "none"),
    "C": ("lora", "vector", "none"),
    "D": ("vector", "scalar", "none"),
    "E": ("vector", "scalar", "none"),
}
DOWN = {"A": "Ad", "B": "Bd", "C": "Cd", "D": "D", "E": "E"}  # term -> the role of all of its forms
ROLES = frozenset({"Ad", "Au", "Bd", "Bu", "Cd", "Cu", "D", "E"})
JOIN_ROLES = ROLES - {"Bd", "Bu"}  # only B is a low-rank change of W


@component
class GLoRADelta(Delta):
    """Ad [out, r] Au [r, in], Bd Bu likewise, Cd [in, r] Cu [r, 1], D and E [out]; a scalar is a vector of one.

    A vector of A, B, D or E has one number for every output, of C one for every input. A layer without a bias has no
    D, which would multiply it.
    """

    r: int = field(metadata=COUNT)
    A: str = field(default="lora", metadata=one_of(*FORMS["A"]))
    B: str = field(default="lora", metadata=one_of(*FORMS["B"]))
    C: str = field(default="lora", metadata=one_of(*FORMS["C"]))
    D: str = field(default="vector", metadata=one_of(*FORMS["D"]))
    E: str = field(default="vector", metadata=one_of(*FORMS["E"]))

    roles = ROLES
    join_roles = JOIN_ROLES
    decayed_vectors = ROLES

    @property
    def changes_bias(self) -> bool:
        return {self.C, self.D, self.E} != {"none"}

    @property
    def needs_dense_weight(self) -> bool:  # type: ignore[override]
        return self.A == "lora"

    def form(self, term: str) -> str:
        """The form of a term."""
        return str(getattr(self, term))

    def shapes(self, site: Site) -> Shapes:
        shapes: Shapes = {}
        for term, down in DOWN.items():
            rows, columns = (site.in_features, 1) if term == "C" else (site.out_features, site.in_features)
            match self.form(term):
                case "lora":
                    shapes |= {down: (rows, self.r), f"{term}u": (self.r, columns)}
                case "vector":
                    shapes[down] = (rows,)
                case "scalar":
                    shapes[down] = (1,)
        if not site.bias:
            shapes.pop("D", None)
        return shapes

    def factors(self, site: Site, params: Tensors) -> Factors:
        return pair(site, params)

    def problems(self, site: Site) -> list[str]:
        if site.parts:
            return ["GLoRA's terms are over all rows, not over single projections: adapt the fused weight as a whole"]
        if site.kind == "embedding" and self.changes_bias:
            return ["C, D and E change the bias, and an embedding has none: set C='none', D='none', E='none' for it"]
        if not self.shapes(site):
            return ["every term that applies to this layer is none: nothing could train"]
        return []

    def slices(self, params: Tensors) -> dict[str, Tensor]:
        """The tensors of this structure, as views of those of a more general one."""
        found: dict[str, Tensor] = {}
        for term, down in DOWN.items():
            whole, form = params.get(down), self.form(term)
            if whole is None or form == "none":
                continue
            if form == "lora":
                found |= {down: whole, f"{term}u": params[f"{term}u"]}
                continue
            vector = whole[:, 0] if whole.dim() == 2 else whole
            found[down] = vector if form == "vector" else vector[:1]
        return found


@cache
def structures(terms: GLoRADelta, bias: bool = True) -> tuple[GLoRADelta, ...]:
    """Every structure whose terms are special cases of these; the most general terms have 432.

    Args:
        terms: the most general form of every term.
        bias: whether the layer has a bias; D needs one.
    """
    return tuple(GLoRADelta(terms.r, *chosen) for chosen in itertools.product(*special_forms(terms, bias).values()))


def special_forms(terms: GLoRADelta, bias: bool = True) -> dict[str, tuple[str, ...]]:
    """term -> its form in these terms and every special case of it; without a bias no D."""
    forms = {term: some[some.index(terms.form(term)) :] for term, some in FORMS.items()}
    return forms if bias else forms | {"D": ("none",)}


def pair(site: Site, params: Tensors) -> Factors:
    """The factors of B: a vector or a scalar is multiplied by the sum of all inputs."""
    Bd = params.get("Bd")
    if Bd is None:
        like = next(iter(params.values()), torch.empty(0))
        return like.new_zeros(site.out_features, 0), like.new_zeros(0, site.in_features)
    if Bd.dim() == 2:
        return Bd, params["Bu"]
    return Bd.expand(site.out_features)[:, None], Bd.new_ones(1, site.in_features)
