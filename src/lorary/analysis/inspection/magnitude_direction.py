"""Magnitude and direction: how far the rows of a weight grew, and how far they turned (DoRA's analysis).

    dM = mean |‖w'ᵢ‖ − ‖wᵢ‖|          dD = mean (1 − cos(w'ᵢ, wᵢ))

Liu et al. 2024, arXiv:2402.09353, equations 2 and 3. The paper's weights are [in, out], and it takes their columns:
in PyTorch's layout those are the rows, one for each output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class MagnitudeDirection(NamedTuple):
    """The mean change of the rows of one weight.

    Args:
        magnitude: dM, in the units of the weight.
        direction: dD: 0 for no turn, 1 for a right angle.
    """

    magnitude: float
    direction: float


def magnitude_direction(before: Tensor, after: Tensor) -> MagnitudeDirection:
    """The mean changes of the rows of a weight, computed in 64 bits.

    Args:
        before: W [out, in].
        after: W' [out, in].

    Returns:
        The means over all rows; a row that is zero in either has no direction, and counts in the magnitude alone.
    """
    before, after = before.double(), after.double()
    m, m_after = before.norm(dim=1), after.norm(dim=1)  # [out]
    turned = (m > 0) & (m_after > 0)
    v, v_after = before[turned] / m[turned, None], after[turned] / m_after[turned, None]
    # 1 - cos = |v' - v|^2 / 2 of unit vectors, without the cancellation of 1 - (1 - 1e-9)
    angles = (v_after - v).square().sum(1) / 2
    direction = float(angles.mean()) if len(angles) else 0.0
    return MagnitudeDirection(float((m_after - m).abs().mean()), direction)


def correlation(points: Sequence[MagnitudeDirection]) -> float | None:
    """Pearson's correlation of magnitude and direction over several weights.

    Returns:
        From -1 to 1: the paper finds it negative for full fine-tuning and DoRA, positive for LoRA. None for fewer than
        three weights, or where one of the two does not vary.
    """
    if len(points) < 3:
        return None
    x, y = (torch.tensor(values, dtype=torch.float64) for values in zip(*points, strict=True))
    x, y = x - x.mean(), y - y.mean()
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale and math.isfinite(scale) else None
