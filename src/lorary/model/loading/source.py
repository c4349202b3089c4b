"""The `model` section of a configuration: where a base model comes from and how it is loaded."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lorary.errors import ConfigError, Diagnostic, did_you_mean


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

    @classmethod
    def of(cls, source: str, **options: Any) -> ModelSection:
        """The section for a model by its Hub id, its folder or `builtin:base`.

        Raises:
            ConfigError: an unknown option or a value out of range; every one.
        """
        try:
            return cls(id=source, **options)
        except ValidationError as error:
            problems = [_problem(dict(complaint)) for complaint in error.errors(include_url=False)]
            raise ConfigError("invalid model options:", problems) from None


def _problem(complaint: dict[str, Any]) -> Diagnostic:
    name = str(complaint["loc"][0])
    if complaint["type"] == "extra_forbidden":
        return Diagnostic(name, "unknown option", did_you_mean(name, list(ModelSection.model_fields)))
    if complaint["type"] == "string_too_short":
        return Diagnostic(name, "is empty")
    return Diagnostic(name, f"{complaint['msg'][0].lower()}{complaint['msg'][1:]}, not {complaint['input']!r}")
