"""CorDA: y = (W - s B0 A0) x + b + s B A x, where s B0 A0 = U_r S_r V_r^T C^-1 of W C = U S V^T, and C = X^T X.

The decomposition is weighted by X, the inputs of the layer. In the knowledge-preserved mode the adapter gets the r
smallest directions, so that what matters for the data stays frozen; sample the knowledge to keep. In the
instruction-previewed mode it gets the r largest; sample the task.

Yang et al. 2024, arXiv:2406.05223, equations 2 to 5. The damping of C before it is inverted, 256 rows and the roots of
the singular values in both factors are those of the authors' code; the division by s, for any alpha, is PEFT's.

As in their code, C is the mean of X^T X over the rows of the data, each row's X divided by its largest number: the
paper has X^T X, whose size would decide how much of the singular values goes to B, and how much to A. Padding does not
count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Any

import torch
from torch import Tensor

from lorary.methods.pissa import factors_by_parts, too_small
from lorary.spec.calibration import CalibratedInit, Moments, Statistic
from lorary.spec.fields import COUNT, one_of
from lorary.spec.interfaces import component
from lorary.spec.presets import preset
from lorary.spec.site import Site

_DAMPING = 0.01  # of the mean of C's diagonal, doubled until the inverse is good
_ERROR = 0.05  # of the inverse: the Frobenius norm of C C^-1 - I
_MOST = 100  # doublings


@component
class ContextInit(CalibratedInit):
    """The start at directions of W C; the parts of a fused weight are decomposed one by one.

    Args:
        mode: "instruction" for the r largest directions, "knowledge" for the r smallest.
        samples: rows of the training data whose inputs make C.
    """

    mode: str = field(default="instruction", metadata=one_of("instruction", "knowledge"))
    samples: int = field(default=256, metadata=COUNT)

    fills = frozenset({"A", "B"})
    residual_init = True
    reads = "inputs"

    def prepared(self, X: Tensor) -> Tensor:
        largest = X.max().abs()
        return X / largest if largest else X  # after a ReLU a row may have none

    def measured(
        self,
        statistic: Statistic,
        W: Callable[[], Tensor],
        site: Site,
        r: int,
        scale: float,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        assert isinstance(statistic, Moments)
        C, inverse = damped(statistic.products / statistic.rows)

        def weighted(part: Tensor) -> tuple[Tensor, Tensor]:
            U, S, Vh = torch.linalg.svd(part @ C, full_matrices=False)
            chosen = slice(r) if self.mode == "instruction" else slice(-r, None)
            root = (S[chosen] / scale).sqrt()
            return U[:, chosen] * root, root[:, None] * (Vh[chosen] @ inverse)

        return factors_by_parts(W().to(C), site, weighted)

    def problems(self, site: Site, r: int) -> list[str]:
        return linear_only(site, "CorDA") or too_small(site, r, "singular directions")


def damped(C: Tensor) -> tuple[Tensor, Tensor]:
    """C with enough on its diagonal that its inverse is good, and that inverse.

    Raises:
        ValueError: no damping was enough.
    """
    eye = torch.eye(len(C), dtype=C.dtype, device=C.device)
    damping = _DAMPING * C.diagonal().mean()
    for _ in range(_MOST):
        raised = C + damping * eye
        inverse = torch.linalg.inv(raised)
        if torch.dist(raised @ inverse, eye) < _ERROR:
            return raised, inverse
        damping = 2 * damping
    raise ValueError("the covariance of its inputs has no inverse")


def linear_only(site: Site, name: str) -> list[str]:
    """The error of an init that reads the inputs of a layer that is not linear."""
    if site.kind in ("linear", "transposed"):
        return []
    return [f"{name} reads the inputs of linear layers, and this is of kind {site.kind}"]


@preset(
    "corda",
    citation="Yang et al. 2024, arXiv:2406.05223",
    when="To keep what the base knows of some data while training on other data, or for fast convergence.",
    restrictions={
        "lora+": "the ratio was derived for B = 0 at the start: retune it",
        "qlora": "attach to a base in full precision: the residual of each weight is quantised",
    },
)
def corda(mode: str = "instruction", samples: int = 256) -> dict[str, Any]:
    """y = (W - s B0 A0) x + b + s B A x, s B0 A0 = directions of W C, C = X^T X of the inputs

    Args:
        mode: `instruction` trains the directions that matter most for the sampled data, `knowledge` those that matter
            least.
        samples: rows of the training data whose inputs are read.
    """
    return {"init": ContextInit(mode, samples)}
