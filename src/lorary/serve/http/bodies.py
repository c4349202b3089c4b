"""The bodies of requests: strict JSON, every field known, and every problem in one answer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar, get_args

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from lorary.errors import nearest
from lorary.files import strict_json
from lorary.files.strict_json import named, show
from lorary.serve.http.errors import ApiError

B = TypeVar("B", bound="Body")
_MOST_SHOWN = 8
_STOPS, _STOP_LENGTH = 16, 512

Unsupported = Mapping[str, tuple[tuple[Any, ...], str]]  # field -> (values that change nothing, why others are refused)


class Body(BaseModel):
    """A body: strict types; what is null counts as left out.

    Attributes:
        UNSUPPORTED: fields of the interface that are not supported.
        IGNORED: fields that are accepted, and change nothing.
    """

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False, protected_namespaces=())
    UNSUPPORTED: ClassVar[Unsupported] = {}
    IGNORED: ClassVar[frozenset[str]] = frozenset()

    def problems(self) -> list[tuple[str, str]]:
        """(field, problem) of what the types do not say."""
        return []


async def read_body(request: Request, kind: type[B]) -> B:
    """The body of a request.

    Raises:
        ApiError: it is not JSON, or not a valid body, with every reason.
    """
    return check_body(await read_json(request), kind)


def check_body(values: Mapping[str, Any], kind: type[B]) -> B:
    """The body with these values.

    Raises:
        ApiError: it is not a valid one, with every reason.
    """
    values = _without_nulls(values, kind)
    problems = _field_problems(values, kind)
    try:
        body = kind.model_validate(values)
        problems += _own_problems(body)
    except ValidationError as error:
        problems += [_problem(dict(complaint)) for complaint in error.errors(include_url=False)]
    if problems:
        raise invalid(problems)
    return body


def invalid(problems: list[tuple[str, str]]) -> ApiError:
    """The error for (field, problem) of a body."""
    texts = [f"`{where}`: {what}" for where, what in problems[:_MOST_SHOWN]]
    texts += [f"and {len(problems) - _MOST_SHOWN} more"] if len(problems) > _MOST_SHOWN else []
    return ApiError(400, "; ".join(texts), param=problems[0][0])


async def read_json(request: Request) -> dict[str, Any]:
    """The JSON object in a body.

    Raises:
        ApiError: the content type is another, or the body is not a JSON object in valid Unicode.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a page on another site cannot send this type unasked
        raise ApiError(415, f"the body must be application/json, not {show(kind) if kind else 'of no type'}")
    data = await request.body()
    try:
        values = strict_json.parse(data, len(data))
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError(400, "the body holds half of a surrogate pair, which is not Unicode text") from None
    except ValueError as error:
        raise ApiError(400, f"the body cannot be read: {error}" if data else "the body is empty") from None
    if not isinstance(values, dict):
        raise ApiError(400, f"the body must be a JSON object, not {type(values).__name__}")
    return values


def _without_nulls(values: Mapping[str, Any], kind: type[Body]) -> dict[str, Any]:
    """Values of a body without its nulls and those of the bodies in it."""
    kept = {key: value for key, value in values.items() if value is not None}
    inner = {key: found for key, value in kept.items() if isinstance(value, dict) and (found := _inner(kind, key))}
    return kept | {key: _without_nulls(kept[key], found) for key, found in inner.items()}


def _own_problems(body: Body) -> list[tuple[str, str]]:
    """The problems that a body and those in it find in themselves."""
    inner = [(key, value) for key, value in body if isinstance(value, Body)]
    return body.problems() + [(f"{key}.{name}", why) for key, value in inner for name, why in _own_problems(value)]


def _field_problems(values: Mapping[str, Any], kind: type[Body]) -> list[tuple[str, str]]:
    """Fields that are not supported, and unknown ones that are almost a known one: these were meant to do something."""
    known, problems = [*kind.model_fields, *kind.UNSUPPORTED, *kind.IGNORED], []
    for key, value in values.items():
        neutral, why = kind.UNSUPPORTED.get(key, ((value,), ""))
        if not any(value == same and type(value) is type(same) for same in neutral):
            problems.append((key, why))
        if key not in known and (near := nearest(key, known, most=1, cutoff=0.75)):
            problems.append((named(key), f"no such field: did you mean `{near[0]}`?"))
        if (inner := _inner(kind, key)) is not None and isinstance(value, dict):
            problems += [(f"{key}.{name}", why) for name, why in _field_problems(value, inner)]
    return problems


def _inner(kind: type[Body], key: str) -> type[Body] | None:
    """The body that is the value of a field, if it is one."""
    info = kind.model_fields.get(key)
    types = () if info is None else (info.annotation, *get_args(info.annotation))
    return next((found for found in types if isinstance(found, type) and issubclass(found, Body)), None)


def _problem(complaint: dict[str, Any]) -> tuple[str, str]:
    where = ".".join(str(part) for part in complaint["loc"] if part not in ("", "[key]"))  # a key of a mapping
    if complaint["type"] == "missing":
        return where, "is missing"
    if complaint["type"] == "model_type":
        return where, "must be a JSON object"
    what = str(complaint["msg"]).replace(" after validation", "")
    what = re.sub(r"^(Input|String|List|Tuple|Dictionary) should", "must", what)
    if complaint["type"] == "value_error":  # of our own
        return where, what.removeprefix("Value error, ")
    given = "" if isinstance(complaint["input"], dict | list) else f", not {show(complaint['input'], most=40)}"
    return where, f"{what[0].lower()}{what[1:]}{given}"


def _stops(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("must be a text or a list of texts")
    if len(texts) > _STOPS:
        raise ValueError(f"{len(texts)} texts, more than the {_STOPS} that are accepted")
    if not all(0 < len(text) <= _STOP_LENGTH for text in texts):
        raise ValueError(f"each text must have 1 to {_STOP_LENGTH} characters")
    return tuple(texts)


# The fields that several interfaces have.
Name = Annotated[str, Field(min_length=1, max_length=512)]
NewTokens = Annotated[int, Field(ge=1, le=10_000_000)]
Choices = Annotated[int, Field(ge=1, le=128)]
Stops = Annotated[tuple[str, ...], PlainValidator(_stops)]
