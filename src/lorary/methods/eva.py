"""EVA: y = W x + b + s B A x, where A starts at the principal directions of the layer's inputs, and B at 0.

The directions of all layers compete for the ranks: those that explain the largest shares of their layer's variance
win, at most rho r in a layer, so that the sum of the ranks does not change. A layer that wins none gets no adapter.

Paischer et al. 2024, arXiv:2410.07170, section 3 and algorithm 1. rho 2, the centred inputs and labelled tokens alone
are those of the authors' code and PEFT's; alpha follows the rank, as in PEFT, so that s stays as it was.

Differs from the authors' code: the directions are the exact ones of all rows that are read, not the outcome of an
incremental decomposition that stops when it has converged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any

import torch
from torch import Tensor

from lorary.methods.corda import linear_only
from lorary.spec.calibration import CalibratedInit, Moments, Statistic
from lorary.spec.fields import AT_LEAST_ONE, COUNT, FLAG
from lorary.spec.interfaces import component
from lorary.spec.presets import preset
from lorary.spec.site import Site

_EXPLAINED = "explained"  # beside the roles: the shares of the variance


@component
class InputDirectionsInit(CalibratedInit):
    """A at the principal directions of the inputs, B = 0; all parts of a fused weight start alike.

    Args:
        rho: a layer gets at most rho r directions; 1 leaves every rank as it is.
        samples: rows of the training data whose inputs are read.
        whiten: divide each direction by the root of its singular value.
    """

    rho: float = field(default=2.0, metadata=AT_LEAST_ONE)
    samples: int = field(default=128, metadata=COUNT)
    whiten: bool = field(default=False, metadata=FLAG)

    fills = frozenset({"A", "B"})
    reads = "inputs"
    labelled_only = True

    def zeros(self, site: Site) -> frozenset[str]:
        return frozenset({"B"})

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
        most = min(round(r * self.rho), site.in_features)
        if statistic.count <= most:
            what = (
                f"{statistic.count} tokens have no {most} principal directions, as r = {r} and rho = {self.rho:g} need"
            )
            raise ValueError(what)
        scatter, directions = torch.linalg.eigh(statistic.centred)
        scatter, V = scatter.flip(0).clamp(min=0)[:most], directions.T.flip(0)[:most]
        if not scatter[0] > 0:
            raise ValueError("its inputs are all the same, so that they have no principal directions")
        largest = V.gather(1, V.abs().argmax(1, keepdim=True))
        V = V * largest.sign()  # the sign is free: the largest number of each direction is positive, as in PEFT
        if self.whiten:
            V = V / scatter[:, None] ** 0.25
        share = scatter / statistic.centred.diagonal().sum()
        return {"A": V.repeat(len(site.rows), 1), "B": V.new_zeros(sum(site.rows), most), _EXPLAINED: share}

    def distributed(self, found: Mapping[str, tuple[int, dict[str, Tensor]]]) -> dict[str, dict[str, Tensor]]:
        """The largest shares of variance over all layers win; of equal ones those of the first layer."""
        ranked = sorted(
            ((-share, i, name) for i, name in enumerate(found) for share in found[name][1][_EXPLAINED].tolist()),
        )
        budget = sum(r for r, _ in found.values())
        won = [name for _, _, name in ranked[:budget]]
        return {name: _first(tensors, won.count(name)) for name, (_, tensors) in found.items()}

    def problems(self, site: Site, r: int) -> list[str]:
        most = site.in_features
        what = f"it has {most} inputs, and r is {r}"
        return linear_only(site, "EVA") or ([what] if r > most else [])


def _first(tensors: Mapping[str, Tensor], r: int) -> dict[str, Tensor]:
    """A and B with their first r directions, of every part."""
    A, B = tensors["A"], tensors["B"]
    return {"A": A.unflatten(0, (-1, B.shape[1]))[:, :r].flatten(0, 1).contiguous(), "B": B[:, :r].contiguous()}


@preset(
    "eva",
    citation="Paischer et al. 2024, arXiv:2410.07170",
    when="For fast convergence, and ranks where the data needs them, at the cost of a few forward passes.",
)
def eva(rho: float = 2.0, samples: int = 128, whiten: bool = False) -> dict[str, Any]:
    """y = W x + b + s B A x, A = the principal directions of the inputs

    Args:
        rho: a layer's rank is at most rho r; 1 leaves the ranks as they are.
        samples: rows of the training data whose inputs are read.
        whiten: divide each direction by the root of its singular value, which the authors do for images.
    """
    return {"init": InputDirectionsInit(rho, samples, whiten)}
