"""LoRA-GA: y = (W - s B0 A0) x + b + s B A x, where A0 = c V_1^T and B0 = c U_2 of the loss's gradient G = U S V^T.

U_2 and V_1 are singular directions r + 1 to 2 r and 1 to r, and c = out^(1/4) / gamma^(1/2). The first step then moves
s B A along G's first 2 r directions, as near to full fine-tuning as rank 2 r allows: r by B and r by A.

Wang et al. 2024, arXiv:2407.05000, theorems 3.1 and 3.2, algorithm 1. The defaults are those of their code: gamma 16,
8 rows, a randomised decomposition with 4 power iterations. They train with alpha 16 and rsLoRA's scale, which the
theorem of the factor c assumes; add `rslora`.

Differs from the authors' code: the gradient is measured in evaluation mode, so that dropout does not move the start,
and one group of layers at a time. PEFT's `lora_ga` departs from the paper: A0 has no factor c, and B0 is multiplied by
singular values of G, so that the start depends on how large the loss's gradient is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Any

import torch
from torch import Tensor

from lorary.methods.pissa import factors_by_parts, principal_directions, too_small
from lorary.spec.calibration import CalibratedInit, Statistic
from lorary.spec.fields import COUNT, POSITIVE, optional
from lorary.spec.interfaces import component
from lorary.spec.presets import preset
from lorary.spec.site import Site


@component
class GradientInit(CalibratedInit):
    """The start at singular directions of the gradient of W; the parts of a fused weight are decomposed one by one.

    Args:
        gamma: the start's size is out^(1/2) / gamma times s.
        samples: rows of the training data that the gradient is summed over.
        niter: power iterations of a randomised decomposition in 4 r directions, or None for the exact one.
    """

    gamma: float = field(default=16.0, metadata=POSITIVE)
    samples: int = field(default=8, metadata=COUNT)
    niter: int | None = field(default=4, metadata=optional(COUNT))

    fills = frozenset({"A", "B"})
    residual_init = True
    reads = "gradient"

    def measured(
        self,
        statistic: Statistic,
        W: Callable[[], Tensor],
        site: Site,
        r: int,
        scale: float,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        assert isinstance(statistic, Tensor)

        def directions(G: Tensor) -> tuple[Tensor, Tensor]:
            U, _, Vh = principal_directions(G, 2 * r, 4 * r, self.niter, generator)
            c = G.shape[0] ** 0.25 / self.gamma**0.5
            return c * U[:, r:], c * Vh[:r]

        return factors_by_parts(statistic, site, directions)

    def problems(self, site: Site, r: int) -> list[str]:
        return too_small(site, r, "singular directions", each=2)


@preset(
    "lora-ga",
    citation="Wang et al. 2024, arXiv:2407.05000",
    when="For fast convergence where a few backward passes through the whole base are affordable before training.",
    restrictions={
        "lora+": "the ratio was derived for B = 0 at the start: retune it",
        "qlora": "attach to a base in full precision: the residual of each weight is quantised",
    },
)
def lora_ga(gamma: float = 16.0, samples: int = 8, niter: int | None = 4) -> dict[str, Any]:
    """y = (W - s B0 A0) x + b + s B A x, B0 = c U_2, A0 = c V_1^T of the gradient U S V^T

    Args:
        gamma: the larger, the smaller the start.
        samples: rows of the training data whose gradient is decomposed.
        niter: power iterations of the randomised decomposition; None decomposes exactly.
    """
    return {"init": GradientInit(gamma, samples, niter)}
