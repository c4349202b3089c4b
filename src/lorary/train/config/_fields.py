"""Types of configuration fields: numbers, and lists that may be given as one text."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Strict

_DECIMAL = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def _number(value: Any) -> Any:
    """A number from decimal text; YAML 1.1 reads `2e-4` as text."""
    return float(value) if isinstance(value, str) and _DECIMAL.fullmatch(value) else value


def _split(value: Any) -> Any:
    """The items of comma-separated text; a comma inside brackets, as in `c_attn[q,v]`, separates nothing."""
    return [item.strip() for item in re.split(r",(?![^\[]*\])", value)] if isinstance(value, str) else value


Integer = Annotated[int, Strict()]  # a boolean, a text or 4.5 is not a whole number
Number = Annotated[float, BeforeValidator(_number), Strict(), Field(allow_inf_nan=False)]
Fraction = Annotated[Number, Field(ge=0, lt=1)]
Alpha = Annotated[Number, Field(gt=0, le=1e6)]
Size = Annotated[Integer, Field(ge=1, le=65_536)]  # a rank or a batch size
Count = Annotated[Integer, Field(ge=1, le=1_000_000_000)]

Optimizer = Literal[
    "adamw_torch", "adamw_torch_fused", "paged_adamw", "paged_adamw_32bit", "adamw_bnb_8bit", "adafactor", "sgd"
]

_Texts = tuple[str, ...]
Names = Annotated[_Texts, BeforeValidator(_split, json_schema_input_type=str | _Texts)]
SomeNames = Annotated[Names, Field(min_length=1)]
_Trackers = tuple[Literal["none", "tensorboard", "wandb", "trackio"], ...]
Trackers = Annotated[_Trackers, BeforeValidator(_split, json_schema_input_type=str | _Trackers), Field(min_length=1)]
