"""Tied sites, which train one set of tensors (LoRA-drop): stored once in lorary's file, at every site in PEFT's.

After reading either, such a set is one tensor for all its sites, as in training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lorary.errors import Diagnostic
from lorary.files.strict_json import named, show
from lorary.files.tensor_file import name_problem
from lorary.spec.placement import AdaptedSite, inconsistent_ties

_BAR = "|"  # between a site and a role in the keys of lorary's file


def key(adapted: AdaptedSite, role: str) -> str:
    """The name of a tensor in lorary's file: one for all sites of a share."""
    return f"|{adapted.share}|{role}" if adapted.share else f"{adapted.site.name}|{role}"


def share_name(value: object) -> str:
    """The name of a share, checked.

    Raises:
        ValueError: a file cannot hold it.
    """
    if not isinstance(value, str) or not value or _BAR in value or name_problem(value):
        raise ValueError(f"`share` is {show(value)}; it is a name of printable ASCII without {_BAR}")
    return value


def problems(sites: Sequence[AdaptedSite]) -> list[Diagnostic]:
    """The sites that cannot be tied as recorded, or whose names a file could not tell from shared tensors."""
    found = inconsistent_ties(sites)
    for adapted in sites:
        name = adapted.site.name
        if adapted.share:
            try:
                share_name(adapted.share)
            except ValueError as error:
                found.append(Diagnostic(name, str(error)))
        if name.startswith(_BAR):
            what = f"begins with {_BAR}, like the names of shared tensors"
            found.append(Diagnostic(named(name), what, "rename the module"))
    return found


def rejoined(
    sites: Iterable[AdaptedSite], tensors: Mapping[str, dict[str, Tensor]]
) -> tuple[dict[str, dict[str, Tensor]], list[Diagnostic]]:
    """site -> role -> tensor, one for all sites of a share; and the sites whose tensors differ from the first one's."""
    joined, found = dict(tensors), []
    firsts: dict[str, str] = {}
    for adapted in sites:
        name = adapted.site.name
        if not adapted.share:
            continue
        first = firsts.setdefault(adapted.share, name)
        own, others = tensors[name], tensors[first]
        for role in sorted(own.keys() | others.keys()):
            if not _same(own.get(role), others.get(role)):
                found.append(Diagnostic(name, f"its {role} differs from that of {first}, to which it is tied"))
        joined[name] = others
    return joined, found


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is b or a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a, b)
