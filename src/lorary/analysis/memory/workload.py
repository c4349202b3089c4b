"""The sizes of a micro-batch, and how it is computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorary.errors import Diagnostic, PlanError


@dataclass(frozen=True)
class Workload:
    """One micro-batch on one device.

    Args:
        batch: sequences.
        length: tokens in a sequence, padding included.
        dtype: of the frozen weights; None: as they are.
        autocast: compute in bfloat16 although the weights are kept in another dtype.
        padding: whether shorter sequences are padded: attention then takes a mask, and keeps more.
        labelled: share of the tokens that have a label and reach the LM head.
        checkpointing: whether every block is computed again in the backward pass.

    Raises:
        PlanError: `batch` or `length` is not positive, or `labelled` is not a share.
    """

    batch: int = 1
    length: int = 512
    dtype: torch.dtype | None = None
    autocast: bool = False
    padding: bool = False
    labelled: float = 1.0
    checkpointing: bool = False

    def __post_init__(self) -> None:
        problems = [
            Diagnostic(name, f"{value} is not a positive number")
            for name, value in (("batch", self.batch), ("length", self.length))
            if value < 1
        ]
        if not 0 < self.labelled <= 1:
            problems.append(Diagnostic("labelled", f"{self.labelled} is no share of the tokens"))
        if problems:
            raise PlanError("the memory of this training cannot be predicted:", problems)
