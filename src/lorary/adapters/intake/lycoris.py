"""LyCORIS: LoHa and LoKr in single files, with the names of PEFT's types (`lorary.adapters.peft.lycoris`) and alphas.

The shapes say what the tool was told: the rank, the sizes of LoKr's C, and which of C and D are products. s is
alpha / r, and 1 where C and D are both whole, whatever the file's alpha is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from lorary.adapters.intake.diffusion import alphas_of, stored
from lorary.adapters.intake.layers import Layer
from lorary.adapters.peft.lycoris import LOHA, LOKR, hadamard_method, kronecker_method
from lorary.errors import Diagnostic
from lorary.files.findings import Findings
from lorary.files.strict_json import named
from lorary.files.tensor_file import TensorSource
from lorary.methods.dora import MagnitudeDirection
from lorary.methods.loha import LowRankHadamard
from lorary.methods.lokr import KroneckerProduct, factorization
from lorary.model.base import Base
from lorary.spec.method import Method
from lorary.spec.site import Site

_ROLES = {**LOHA.leaves, **LOKR.leaves}
LEAVES = {f".{leaf}": role for leaf, role in _ROLES.items()}
_HADAMARD, _KRONECKER = frozenset(LOHA.leaves.values()), frozenset(LOKR.leaves.values())
Grouped = dict[str, dict[str, str]]
Roles = Mapping[str, str]


def apart(grouped: Mapping[str, Mapping[str, str]], findings: Findings) -> tuple[Grouped, Grouped]:
    """(the layers with plain factors, those with LoHa's or LoKr's tensors): layer -> role -> name.

    Args:
        grouped: the layers of `layers.group`.
        findings: gets the layers with tensors of several methods.
    """
    plain: Grouped = {}
    products: Grouped = {}
    for layer, roles in grouped.items():
        families = [bool(roles.keys() & family) for family in ({"A", "B"}, _HADAMARD, _KRONECKER)]
        if sum(families) > 1:
            what = "has tensors of several methods: LoRA, LoHa and LoKr are each for a layer of its own"
            findings.fatal.append(Diagnostic(named(layer), what))
        (products if any(families[1:]) else plain)[layer] = dict(roles)
    return plain, products


def layers(
    grouped: Mapping[str, Roles], paths: Mapping[str, str], file: TensorSource, base: Base | None, findings: Findings
) -> list[Layer]:
    """The layers with LoHa's or LoKr's tensors, each with what its shapes say.

    Args:
        grouped: layer -> role -> name; `alpha` and `m` are roles here.
        paths: layer -> its path.
        file: the open file.
        base: the base, if at hand.
        findings: collects the problems.
    """
    if grouped and base is None:
        what = "holds LoHa's or LoKr's tensors, whose shapes do not say which layers are convolutions"
        fix = "read it onto its model: lorary.load_adapter(file, model=...)"
        findings.fatal.append(Diagnostic(file.name, what, fix))
    if not grouped or base is None:
        return []
    shapes = {x: {role: file.header.tensors[n].shape for role, n in roles.items()} for x, roles in grouped.items()}
    known = {layer: base.site(path) for layer, path in paths.items() if path in base.kinds and layer in grouped}
    for layer in grouped.keys() - known.keys():
        findings.fatal.append(Diagnostic(named(layer), "adapts a layer that the model does not have"))
    usable = [layer for layer in grouped if layer in known and not _incomplete(layer, shapes[layer], findings)]
    ranks = {layer: _rank(shapes[layer]) for layer in usable}
    alphas = alphas_of({layer: grouped[layer] for layer in usable}, ranks, file, findings)
    factor = _factor([(_sizes(shapes[x]), known[x]) for x in alphas if _is_kronecker(shapes[x])])
    found = []
    for layer, alpha in alphas.items():
        method = _method(shapes[layer], known[layer], ranks[layer], alpha, factor)
        if problems := list(_problems(layer, method, known[layer], grouped[layer])):
            findings.fatal += problems
        else:
            found.append(Layer(paths[layer], method, stored(grouped[layer])))
    return found


def _is_kronecker(shapes: Mapping[str, Any]) -> bool:
    return bool(shapes.keys() & _KRONECKER)


def _incomplete(layer: str, shapes: Mapping[str, tuple[int, ...]], findings: Findings) -> bool:
    """Whether the tensors that say the form of a layer are not there, or not matrices."""
    ways = [({"C"}, {"Cb", "Ca"}), ({"D"}, {"Db", "Da"})] if _is_kronecker(shapes) else [({"B1", "A1", "B2", "A2"},)]
    for way in ways:
        if not any(roles <= shapes.keys() for roles in way):
            nearest = max(way, key=lambda roles: len(roles & shapes.keys()))
            leaves = ", ".join(sorted(leaf for leaf, role in _ROLES.items() if role in nearest - shapes.keys()))
            findings.fatal.append(Diagnostic(named(layer), f"{leaves}: is missing, and the others are useless alone"))
            return True
    odd = [role for role, shape in shapes.items() if role in LEAVES.values() and (len(shape) < 2 or 0 in shape)]
    for role in odd:
        what = f"has the shape {list(shapes[role])}: no layer has such a factor"
        findings.fatal.append(Diagnostic(named(f"{layer}.{_leaf(role)}"), what))
    return bool(odd)


def _leaf(role: str) -> str:
    return next(leaf for leaf, r in _ROLES.items() if r == role)


def _rank(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The rank of the products; of two whole matrices, the least at which they are whole by LoKr's rule."""
    for role in ("A1", "Da", "Ca"):
        if role in shapes:
            return shapes[role][0]
    return math.ceil(max(shapes["D"][:2]) / 2)


def _sizes(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """(c1, c2) of LoKr's C."""
    rows, columns = (shapes["C"], shapes["C"]) if "C" in shapes else (shapes["Cb"], shapes["Ca"])
    return rows[0], columns[1]


def _factor(found: list[tuple[tuple[int, int], Site]]) -> int:
    """The one factor that gives all of these sizes; 0 if none does."""
    candidates = [-1, *sorted({size for sizes, _ in found for size in sizes})]
    return next((f for f in candidates if all(_by_rule(site, f) == sizes for sizes, site in found)), 0)


def _by_rule(site: Site, factor: int) -> tuple[int, int]:
    channels = site.in_features // math.prod(site.kernel_size)
    return factorization(site.out_features, factor)[0], factorization(channels, factor)[0]


def _method(shapes: Mapping[str, tuple[int, ...]], site: Site, rank: int, alpha: float, factor: int) -> Method:
    """The method of a layer whose tensors have these shapes."""
    if _is_kronecker(shapes):
        alpha = float(rank) if {"C", "D"} <= shapes.keys() else alpha
        sizes = () if factor else _sizes(shapes)
        found = kronecker_method(KroneckerProduct(rank, factor or -1, "Ca" in shapes, "T" in shapes, sizes), alpha)
    else:
        found = hadamard_method(LowRankHadamard(rank, "T1" in shapes or "T2" in shapes), alpha)
    return found.replace(join=MagnitudeDirection()) if "m" in shapes else found


def _problems(layer: str, method: Method, site: Site, roles: Roles) -> Iterator[Diagnostic]:
    """Why the tensors are not those of the method at this site."""
    assert method.delta is not None
    if problems := method.delta.problems(site):
        yield from (Diagnostic(named(layer), what) for what in problems)
        return
    expected = method.delta.shapes(site).keys()
    for role in sorted(expected - roles.keys()):
        yield Diagnostic(named(f"{layer}.{_leaf(role)}"), "is missing, and the others are useless alone")
    for role in sorted(roles.keys() - expected - {"alpha", "m"}):
        yield Diagnostic(named(roles[role]), "does not belong to such a layer beside its other tensors")
