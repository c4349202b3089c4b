"""The five terms by definition, for any kind of layer: the measure of the fast ways, and the way of rare layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorary.serve.forms.serving_form import SiteForm
from lorary.spec.layer import Kind


def with_terms(kind: Kind, layer: Any, y0: Tensor, x: Tensor, form: SiteForm, weight: float = 1.0) -> Tensor:
    """gain * y0 + weight * (b * (B (d * (A x))) + shift), in y0's dtype.

    Args:
        kind, layer: the base layer and its kind.
        y0: [n, ...] the base's output, bias included; it is not changed.
        x: [n, ...] the layer's input.
        form: the form at this site.
        weight: of the adapter in a weighted sum; 1 if it has a gain.
    """
    y = y0 if form.gain is None else y0 * _as_columns(kind, form.gain, y0)
    if form.A is not None and form.B is not None:
        A = form.A if form.d is None else form.d[:, None] * form.A
        B = form.B if form.b is None else form.b[:, None] * form.B
        y = kind.add(layer, y, x, A.to(y.dtype), B.to(y.dtype), weight, 0.0)
    if form.shift is not None:
        y = y + weight * _as_columns(kind, form.shift, y0)
    return y


def _as_columns(kind: Kind, v: Tensor, y: Tensor) -> Tensor:
    return kind.broadcast_over_rows(v.to(y.dtype))


def rows_with_terms(y0: Tensor, x: Tensor, form: SiteForm, weight: float = 1.0) -> Tensor:
    """The same for a linear layer's rows: y0 [n, out], x [n, in]; computed in fp32 and rounded once."""
    y = y0.float()
    if form.gain is not None:
        y = y * form.gain.float()
    if form.A is not None and form.B is not None:
        h = torch.einsum("ni,ri->nr", x.float(), form.A.float())
        h = h if form.d is None else h * form.d.float()
        delta = torch.einsum("nr,or->no", h, form.B.float())
        y = y + weight * (delta if form.b is None else delta * form.b.float())
    if form.shift is not None:
        y = y + weight * form.shift.float()
    return y.to(y0.dtype)
