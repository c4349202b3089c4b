"""The limits of methods at the projections of nn.MultiheadAttention, which PyTorch's forward reads and never calls."""

from __future__ import annotations

from typing import Any

from lorary.spec.calibration import CalibratedInit
from lorary.spec.site import Site

PROJECTIONS = ("in_projection", "out_projection")


def why_not_in_attention(site: Site, method: Any) -> list[str]:
    """The reasons why a method cannot adapt a projection of nn.MultiheadAttention."""
    if site.kind not in PROJECTIONS:
        return []
    why = []
    changing = method.delta if method.delta.changes_bias else method.join
    if site.kind == "in_projection" and (changing.changes_bias or method.join.scales_bias):
        what = f"{type(changing).__name__} changes the bias of a layer"
        why.append(f"{what}, and that of an in-projection belongs to nn.MultiheadAttention (in_proj_bias)")
    if isinstance(method.init, CalibratedInit):
        why.append(f"no calibration pass measures a projection of nn.MultiheadAttention ({type(method.init).__name__})")
    return why
