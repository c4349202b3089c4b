"""The size of a micro-batch and the options of its computation."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lorary.errors import Diagnostic, PlanError
from lorary.spec.fields import COUNT, PORTION, field_errors


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
        PlanError: every invalid field.
    """

    batch: int = field(default=1, metadata=COUNT)
    length: int = field(default=512, metadata=COUNT)
    dtype: torch.dtype | None = None
    autocast: bool = False
    padding: bool = False
    labelled: float = field(default=1.0, metadata=PORTION)
    checkpointing: bool = False

    def __post_init__(self) -> None:
        if problems := [Diagnostic("", what) for what in field_errors(self)]:
            raise PlanError("cannot predict the memory of this training:", problems)
