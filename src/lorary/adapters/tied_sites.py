"""Sites that train one set of tensors in common (LoRA-drop): once in our own file, at every site in PEFT's.

Wherever it was read from, such a set is one tensor for all its sites afterwards, as it was before it was saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lorary.adapters.adapter import Adapter
from lorary.errors import Diagnostic
from lorary.files.safetensors_header import name_problem
from lorary.files.strict_json import named, show
from lorary.spec.placement import AdaptedSite, inconsistent_ties

_BAR = "|"  # between a site and a role in our own file's keys


def key(p: AdaptedSite, role: str) -> str:
    """The name of a tensor in our own file: of what sites share the same for all of them."""
    return f"|{p.share}|{role}" if p.share else f"{p.site.name}|{role}"


def named_share(value: object) -> str:
    """The name of a share as a file has it.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, str) or not value or _BAR in value or name_problem(value):
        raise ValueError(f"`share` is {show(value)}; it is a name of printable ASCII without {_BAR}")
    return value


def problems(placed: Sequence[AdaptedSite]) -> list[Diagnostic]:
    """Why the sites cannot share as they say, or could not be told apart in a file."""
    found = inconsistent_ties(placed)
    for p in placed:
        if p.share:
            try:
                named_share(p.share)
            except ValueError as error:
                found.append(Diagnostic(p.site.name, str(error)))
        if p.site.name.startswith(_BAR):
            what = f"begins with {_BAR}, as the names of what sites share do"
            found.append(Diagnostic(named(p.site.name), what, "rename the module"))
    return found


def inconsistent_copies(adapter: Adapter) -> list[Diagnostic]:
    """The sites whose tensors are not those of the site that they share them with."""
    return _rejoined(adapter.sites, adapter.tensors)[1]


def rejoined(
    placed: Iterable[AdaptedSite], tensors: Mapping[str, dict[str, Tensor]]
) -> tuple[dict[str, dict[str, Tensor]], list[Diagnostic]]:
    """site -> role -> tensor, one for all sites of a share; and the sites where a file has something else."""
    first, found = _rejoined(placed, tensors)
    return {name: tensors[first.get(name, name)] for name in tensors}, found


def _rejoined(
    placed: Iterable[AdaptedSite], tensors: Mapping[str, Mapping[str, Tensor]]
) -> tuple[dict[str, str], list[Diagnostic]]:
    """site -> the first site of its share, and the sites whose tensors differ from that one's."""
    firsts: dict[str, str] = {}
    where: dict[str, str] = {}
    found = []
    for p in placed:
        name = p.site.name
        if not p.share:
            continue
        where[name] = first = firsts.setdefault(p.share, name)
        own, others = tensors[name], tensors[first]
        for role in sorted(own.keys() | others.keys()):
            a, b = own.get(role), others.get(role)
            if a is not b and (a is None or b is None or a.dtype != b.dtype or not torch.equal(a, b)):
                what = f"its {role} is not that of {first}, with which it shares what it learns"
                found.append(Diagnostic(name, what))
    return where, found
