"""Sources of rows in the `data` section: a path alone, or a path with its weight, limit, split, format and columns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_serializer

from lorary.model.loading.source import Section
from lorary.train.config._fields import Count, Number

_Answers = Literal["text", "prompt-completion", "messages", "alpaca", "sharegpt"]
RowFormatName = Literal["auto", _Answers, "preference", "prompt-completion-label", "prompt", "classification"]


class Source(Section):
    """One source of rows, with what differs from the rest of the `data` section."""

    path: str = Field(min_length=1, description="file, folder, Hub id or builtin:NAME")
    weight: Annotated[Number, Field(gt=0, le=1000)] = Field(
        default=1.0, description="how often each of its rows occurs in an epoch; 0.5: a random half of them"
    )
    limit: Count | None = Field(default=None, description="only its first rows")
    split: str | None = Field(default=None, min_length=1, description="split of a folder or data set")
    subset: str | None = Field(default=None, description="configuration name of a Hub data set")
    format: RowFormatName | None = Field(default=None, description="format of its rows; empty: data.format")
    columns: dict[str, str] | None = Field(default=None, description="its field names; empty: data.columns")

    @model_serializer
    def _short(self) -> dict[str, Any]:
        """Only what was set, as it would be written."""
        return {
            key: value
            for key in type(self).model_fields
            if key in self.model_fields_set and (value := getattr(self, key)) is not None
        }

    def __str__(self) -> str:
        """The path with the split, as a source is written in one text."""
        return f"{self.path}#{self.split}" if self.split else self.path


def as_source(source: str | Source) -> Source:
    """A source that is written as a path alone, in full."""
    return Source(path=source) if isinstance(source, str) else source


def paths(sources: Iterable[str | Source] | None) -> tuple[str, ...]:
    """The paths of sources, with their splits."""
    return tuple(str(source) for source in sources or ())


def _as_list(value: Any) -> Any:
    """One source as a list: a path may contain a comma."""
    return [value] if isinstance(value, str | dict | Source) else value


def _tag(value: Any) -> str:
    return "[source]" if isinstance(value, dict | Source) else "[path]"


_Path = Annotated[str, Field(min_length=1), Tag("[path]")]
_Written = Annotated[_Path | Annotated[Source, Tag("[source]")], Discriminator(_tag)]
_Several = tuple[_Written, ...]
Sources = Annotated[
    _Several, BeforeValidator(_as_list, json_schema_input_type=str | Source | _Several), Field(min_length=1)
]
