"""The size of a micro-batch and the options of its computation."""

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
        dtype: of the frozen weights; None: unchanged.
        autocast: compute in bfloat16 with weights in another dtype.
        padding: whether sequences are padded: attention then takes a mask and saves more.
        labelled: share of the tokens with a label, which reach the LM head.
        checkpointing: whether blocks are recomputed in the backward pass.

    Raises:
        PlanError: `batch` or `length` is not positive, or `labelled` not in (0, 1].
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
            problems.append(Diagnostic("labelled", f"{self.labelled} is not in (0, 1]"))
        if problems:
            raise PlanError("cannot predict the memory of this training:", problems)
