"""Inits that read training data: what a calibration pass measures at every site, and what they make of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from lorary.spec.interfaces import Init, Tensors
from lorary.spec.site import Site


@dataclass(frozen=True)
class Moments:
    """The moments of a layer's inputs.

    Args:
        rows: the number of rows of the data.
        count: the number of their tokens.
        total: [in] the sum of the tokens' inputs x.
        products: [in, in] the sum of their outer products, X^T X.
    """

    rows: int
    count: int
    total: Tensor
    products: Tensor

    @property
    def centred(self) -> Tensor:
        """[in, in] X^T X of the inputs less their mean."""
        return torch.addr(self.products, self.total, self.total, alpha=-1 / self.count)


Statistic = Tensor | Moments


@runtime_checkable
class CalibratedInit(Init, Protocol):
    """An init that reads training data: `lorary.calibrate` measures it, and puts the start into the plan.

    Attributes:
        reads: "gradient", that of the loss with respect to W [out, in], summed over the batches; or "inputs", the
            `Moments` of the layer's inputs.
        samples: how many rows of the data it reads.
        labelled_only: whether it reads the inputs at labelled tokens alone; otherwise at all but padding.
    """

    reads: Literal["gradient", "inputs"]
    samples: int
    labelled_only: bool = False

    def __call__(self, params: Tensors, W: Tensor, site: Site, scale: float, generator: torch.Generator) -> None:
        """Leave a site's tensors at zero: those that were measured are loaded over them."""
        return None

    def prepared(self, X: Tensor) -> Tensor:
        """[tokens, in] the inputs of one row of the data as they count."""
        return X

    def measured(
        self,
        statistic: Statistic,
        W: Callable[[], Tensor],
        site: Site,
        r: int,
        scale: float,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """role -> start of a site's tensors, and whatever else `distributed` needs.

        Args:
            statistic: what it reads.
            W: returns the weight [out, in], dequantised where it is quantised.
            site, r, scale, generator: as for other inits, with the site's rank.

        Raises:
            ValueError: the data does not determine a start, with the reason.
        """
        ...

    def distributed(self, found: Mapping[str, tuple[int, dict[str, Tensor]]]) -> dict[str, dict[str, Tensor]]:
        """site -> role -> start, of site -> (rank, what `measured` returned). Other ranks may come out; 0 is none."""
        return {site: tensors for site, (_, tensors) in found.items()}
