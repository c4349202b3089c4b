"""OLoRA: y = (W - s B0 A0) x + b + s B A x, where B0 = Q_r and A0 = R_r of W = Q R.

B starts with orthonormal columns, and the base keeps the residual. Without pivoting B0 spans the first r columns of W,
so that B0 A0 = B0 B0^T W: only those columns are decomposed, and one product gives A0.

Buyukakyuz 2024, arXiv:2406.01775, section 3; the residual with s is that of the author's code in PEFT.

Differs from the authors' code: transposed weights, convolutions and embeddings work; there, a transposed weight fails,
or changes the output if it is square.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any

import torch
from torch import Tensor

from lorary.methods.pissa import start_by_parts, too_small
from lorary.spec.fields import COUNT, FLAG, added_later
from lorary.spec.interfaces import Init, Tensors, component
from lorary.spec.presets import preset
from lorary.spec.site import Site


@component
class QRInit(Init):
    """B starts with orthonormal columns, A upper trapezoidal; the parts of a fused weight are decomposed one by one.

    Args:
        divide: start with s B A = Q_r R_r, by dividing A by s, instead of s Q_r R_r: with a large s the latter makes
            base and delta two large terms that cancel.
        rounds: as for PiSSA's `SVDInit`; more than one needs `divide`, or the error would grow by s in each.
    """

    divide: bool = field(default=False, metadata=FLAG)
    rounds: int = field(default=1, metadata=added_later(COUNT))

    fills = frozenset({"A", "B"})
    residual_init = True

    @property
    def scale_free_start(self) -> bool:  # type: ignore[override]  # a constant of most inits
        return self.divide

    def __call__(self, params: Tensors, W: Tensor, site: Site, scale: float, generator: torch.Generator) -> None:
        r = params["B"].shape[1]

        def orthonormal(part: Tensor) -> tuple[Tensor, Tensor]:
            Q, _ = torch.linalg.qr(part[:, :r])
            return Q, Q.T @ part / (scale if self.divide else 1.0)

        start_by_parts(params, W, site, orthonormal)

    def problems(self, site: Site, r: int) -> list[str]:
        return too_small(site, r, "orthonormal columns")


@preset(
    "olora",
    citation="Buyukakyuz 2024, arXiv:2406.01775",
    when="Like PiSSA, if a singular value decomposition of every weight takes too long.",
    restrictions={
        "lora+": "the ratio was derived for B = 0 at the start: retune it",
        "qlora": "attach to a base in full precision: the residual of each weight is quantised; "
        "set divide=True: with a large s the residual is larger than the weight",
    },
)
def olora(divide: bool = False, rounds: int = 1) -> dict[str, Any]:
    """y = (W - s B0 A0) x + b + s B A x, B0 = Q_r, A0 = R_r of W = Q R

    Args:
        divide: start A at R_r / s, so that the start does not grow with alpha.
        rounds: with qlora, decompositions of W and then of the quantisation error.
    """
    return {"init": QRInit(divide, rounds)}
