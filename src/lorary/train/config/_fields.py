"""Types of configuration fields: numbers, and lists that may be given as one text."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, Strict
from pydantic_core import PydanticCustomError

from lorary.errors import did_you_mean
from lorary.model.layer_ranges import normalised_layers
from lorary.model.patterns import EXPRESSION, expression_error
from lorary.train.config.optimization import OPTIMIZERS, REFUSED_OPTIMIZERS, REFUSED_SCHEDULES, SCHEDULES

_DECIMAL = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def _number(value: Any) -> Any:
    """A number from decimal text; YAML 1.1 reads `2e-4` as text."""
    return float(value) if isinstance(value, str) and _DECIMAL.fullmatch(value) else value


def _split(value: Any) -> Any:
    """The items of comma-separated text; a comma inside brackets, or in a regular expression, separates nothing."""
    if isinstance(value, str) and value.startswith(EXPRESSION):
        return [value]
    return [item.strip() for item in re.split(r",(?![^\[]*\])", value)] if isinstance(value, str) else value


Integer = Annotated[int, Strict()]  # a boolean, a text or 4.5 is not a whole number
Number = Annotated[float, BeforeValidator(_number), Strict(), Field(allow_inf_nan=False)]
Fraction = Annotated[Number, Field(ge=0, lt=1)]
Alpha = Annotated[Number, Field(gt=0, le=1e6)]
Size = Annotated[Integer, Field(ge=1, le=65_536)]  # a rank or a batch size
Count = Annotated[Integer, Field(ge=1, le=1_000_000_000)]


def _valid_pattern(pattern: str) -> str:
    if why := expression_error(pattern):
        raise _problem(f"is {why}" if why.startswith("not") else f"is a regular expression that is not accepted: {why}")
    return pattern


def _valid_layers(value: Any) -> Any:
    try:
        return normalised_layers(value)
    except ValueError as error:
        raise _problem(str(error)) from None


def _named(known: Collection[str], refused: Mapping[str, str]) -> Callable[[str], str]:
    """The check of a name of Transformers'; `refused` says why some cannot be used."""

    def check(name: str) -> str:
        if name in refused:
            raise _problem(f"cannot be {name}: {refused[name]}")
        if name not in known:
            longer = [each for each in known if each.startswith(name)]
            fix = f"did you mean `{longer[0]}`?" if longer else did_you_mean(name, known)
            raise _problem(f"is {name!r}, which is not a name that Transformers knows", fix)
        return name

    return check


def _problem(what: str, fix: str = "") -> PydanticCustomError:
    """A validation error whose sentence continues the key: "`layers` is empty"."""
    return PydanticCustomError("problem", "{what}", {"what": what, "fix": fix})


def _completed(known: Collection[str]) -> Any:
    """The known names in the JSON schema, for editors."""
    names: Any = {"enum": sorted(known)}
    return Field(json_schema_extra=names)


Optimizer = Annotated[str, Strict(), AfterValidator(_named(OPTIMIZERS, REFUSED_OPTIMIZERS)), _completed(OPTIMIZERS)]
Schedule = Annotated[str, Strict(), AfterValidator(_named(SCHEDULES, REFUSED_SCHEDULES)), _completed(SCHEDULES)]
PathPattern = Annotated[str, AfterValidator(_valid_pattern)]
_Layers = str | dict[str, str]
Layers = Annotated[
    _Layers, BeforeValidator(_valid_layers, json_schema_input_type=int | str | list[int | str] | dict[str, Any])
]

Task = Literal["sft", "dpo", "kto", "grpo", "reward", "classification"]

_Texts = tuple[PathPattern, ...]
Names = Annotated[_Texts, BeforeValidator(_split, json_schema_input_type=str | _Texts)]
SomeNames = Annotated[Names, Field(min_length=1)]
_Trackers = tuple[Literal["none", "tensorboard", "wandb", "trackio"], ...]
Trackers = Annotated[_Trackers, BeforeValidator(_split, json_schema_input_type=str | _Trackers), Field(min_length=1)]
