"""The `model` section of a configuration: where a base model comes from and how it is loaded."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A section of a configuration: frozen, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelSection(Section):
    """The base model."""

    id: str = Field(min_length=1, description="Hub id, folder, or builtin:base (shipped with lorary, works offline)")
    revision: str | None = Field(default=None, description="Hub branch, tag or commit")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="dtype of the frozen weights; auto: as saved (float32 where 16-bit arithmetic is slow)",
    )
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flex_attention"] | None = Field(
        default=None, description="attention kernel; empty: what Transformers chooses"
    )
    trust_remote_code: bool = Field(default=False, description="run Python code that comes with the model")
