"""What the fields of a configuration may hold, and what its sections have in common."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Strict

_DECIMAL = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def _number(value: Any) -> Any:
    """YAML 1.1 reads `2e-4` as text; whoever writes it means the number."""
    return float(value) if isinstance(value, str) and _DECIMAL.fullmatch(value) else value


def words_of(value: Any) -> Any:
    """`"lora, rslora"` is the list of its words; the comma in `c_attn[q,v]` divides nothing."""
    return [word.strip() for word in re.split(r",(?![^\[]*\])", value)] if isinstance(value, str) else value


def _one(value: Any) -> Any:
    """One path stands for the list of it."""
    return [value] if isinstance(value, str) else value


Whole = Annotated[int, Strict()]  # a boolean, a text or 4.5 is not a whole number
Real = Annotated[float, BeforeValidator(_number), Strict(), Field(allow_inf_nan=False)]
Rank = Annotated[Whole, Field(ge=1, le=65_536)]
Alpha = Annotated[Real, Field(gt=0, le=1e6)]
Count = Annotated[Whole, Field(ge=1, le=1_000_000_000)]
Words = Annotated[tuple[str, ...], BeforeValidator(words_of), Field(min_length=1)]
Sources = Annotated[tuple[str, ...], BeforeValidator(_one), Field(min_length=1)]
Tracker = Literal["none", "tensorboard", "wandb", "trackio"]
Optimizer = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "paged_adamw",
    "paged_adamw_32bit",
    "adamw_bnb_8bit",
    "adafactor",
    "sgd",
]
