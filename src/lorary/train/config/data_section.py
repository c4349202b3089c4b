"""The `data` section of a configuration: the rows, their format, and how they become tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lorary.model.loading.source import Section
from lorary.train.config._fields import Fraction, Integer, SomeNames
from lorary.train.config.sources import RowFormatName, Source, Sources


class DataSection(Section):
    """The training and held-out data."""

    train: Sources = Field(
        description="file, folder, Hub id, builtin:NAME, or a list; one may be {path: a.jsonl, weight: 2, limit: 1000}"
    )
    validation: Sources | None = Field(default=None, description="the same for held-out data")
    validation_split: Fraction = Field(
        default=0.0, description="share of the training rows to hold out when validation is empty"
    )
    seed: Annotated[Integer, Field(ge=0, le=2**32 - 1)] | None = Field(
        default=None, description="seed of these rows and of those that a weight draws; empty: training.seed"
    )
    subset: str | None = Field(default=None, description="configuration name of a Hub data set")
    format: RowFormatName = Field(
        default="auto", description="format of a row; auto: detected from the fields of each source, and shown"
    )
    labels: SomeNames | None = Field(
        default=None, description="classification: the labels in the order of the outputs; empty: those of the data"
    )
    columns: dict[str, str] = Field(default={}, description="your field names, such as {prompt: question}")
    max_length: Annotated[Integer, Field(ge=8, le=10_000_000)] = Field(
        default=1024, description="maximum tokens per row"
    )
    overlong: Literal["auto", "error", "drop", "truncate", "split"] = Field(
        default="auto", description="rows beyond max_length; auto: plain text is split, anything else is an error"
    )
    packing: bool = Field(default=False, description="pack several examples into one row of max_length")
    loss: Literal["auto", "completion", "all"] = Field(
        default="auto", description="tokens in the loss; auto: the answers, or all of a plain text"
    )
    chat_template: str | None = Field(
        default=None, description="Jinja file or builtin:chatml; empty: the tokenizer's own template"
    )
    separator: str | None = Field(
        default=None, min_length=1, description='text before every completion, such as "\\n"; empty: rows as they are'
    )
    special_tokens: Literal["keep", "escape", "refuse"] = Field(
        default="keep",
        description="those inside the rows' texts: kept as such and counted, escaped to plain text, or refused",
    )
    streaming: bool = Field(
        default=False, description="read the training rows while training, for data beyond memory; needs max_steps"
    )

    @property
    def draws_rows(self) -> bool:
        """Whether rows are drawn at random: those that are held out, or those of a source with a weight."""
        weighted = any(isinstance(source, Source) and source.weight != 1 for source in self.train)
        return self.validation_split > 0 or weighted
