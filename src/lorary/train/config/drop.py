"""The `method.drop` section of a configuration: LoRA-drop."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lorary.model.loading.source import Section
from lorary.train.config._fields import Integer, Number


class DropSection(Section):
    """LoRA-drop: layers that a short probe finds unimportant share one LoRA."""

    threshold: Annotated[Number, Field(gt=0, lt=1)] = Field(
        default=0.9, description="share of a module kind's importance that the layers with their own LoRA must hold"
    )
    sample: Annotated[Number, Field(gt=0, le=1)] = Field(
        default=0.1, description="share of the training rows that the probe trains on"
    )
    steps: Annotated[Integer, Field(ge=2, le=1_000_000_000)] | None = Field(
        default=None, description="optimizer steps of the probe; empty: one pass over its rows"
    )
