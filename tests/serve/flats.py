"""Serving forms with one value in all tensors, so that a tensor that was overwritten shows it."""

from __future__ import annotations

import torch
from torch import Tensor

from lorary.serve.forms.flat import Flat, flatten
from lorary.serve.forms.serving_form import ServingForm, SiteForm

_SHARED = {"A": torch.full((8, 6), 0.5), "B": torch.full((7, 8), 0.25)}


def form(uid: str, value: float, size: int = 4, *, shared: bool = False) -> ServingForm:
    """A form of about `64 * size` bytes; with `shared`, of less and 416 bytes that all such forms share."""
    value = float(value)
    if shared:
        A, B = _SHARED["A"][:, :4], _SHARED["B"][:5]
        site = SiteForm(A, B, d=torch.full((8,), value), b=torch.full((5,), value), shared="key")
        return ServingForm(uid, {"q": site}, shared={"key": _SHARED})
    site = SiteForm(torch.full((size, 3), value), torch.full((5, size), value), torch.full((5,), value).double())
    norm = torch.full((size * 8,), value)
    return ServingForm(uid, {"q": site, "v": SiteForm(shift=torch.full((3,), value).bfloat16())}, {"norm": {"w": norm}})


def flat(uid: str, value: float, size: int = 4, *, shared: bool = False) -> Flat:
    return flatten(form(uid, value, size, shared=shared))


def own_tensors(form: ServingForm) -> list[Tensor]:
    """All tensors of a form but the shared ones."""
    sites = [
        t
        for site in form.sites.values()
        for name, t in site._asdict().items()
        if isinstance(t, Tensor) and not (site.shared and name in "AB")
    ]
    return sites + [t for own in form.overrides.values() for t in own.values()]


def intact(form: ServingForm, value: float) -> bool:
    """Whether all tensors hold what they were made with."""
    shared = [torch.equal(t, _SHARED[role]) for tensors in form.shared.values() for role, t in tensors.items()]
    slices = [
        torch.equal(site.A, _SHARED["A"][:, :4]) and torch.equal(site.B, _SHARED["B"][:5])
        for site in form.sites.values()
        if site.shared and site.A is not None and site.B is not None
    ]
    return all(bool((t == value).all()) for t in own_tensors(form)) and all(shared) and all(slices)
