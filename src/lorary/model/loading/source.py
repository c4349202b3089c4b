"""The source of a base model: the `model` section of a configuration, and the checks of its folder before reading."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from lorary.errors import ConfigError, Diagnostic, FileError, did_you_mean, suggested_path
from lorary.files.home import expanded

BUILTIN = ("builtin:base",)


def _split(value: Any) -> Any:
    """The items of comma-separated text."""
    return [item.strip() for item in value.split(",")] if isinstance(value, str) else value


_Texts = tuple[str, ...]
Texts = Annotated[_Texts, BeforeValidator(_split, json_schema_input_type=str | _Texts)]


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
    tokens: Texts = Field(
        default=(), description='texts to add to the tokenizer, such as ["<a>", "<b>"]; their rows train'
    )

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


@dataclass(frozen=True)
class ModelClass:
    """The class and the configuration to load a model with; `lorary.model.loading.model_class` chooses them.

    Args:
        cls: of Transformers, possibly an Auto class.
        config: of the model, with the labels of its head.
        fresh: the parameters that the checkpoint does not hold, which Transformers draws at random: a new head.
    """

    cls: Any
    config: Any
    fresh: tuple[str, ...] = ()


def _problem(complaint: dict[str, Any]) -> Diagnostic:
    name = str(complaint["loc"][0])
    if complaint["type"] == "extra_forbidden":
        return Diagnostic(name, "unknown option", did_you_mean(name, list(ModelSection.model_fields)))
    if complaint["type"] == "string_too_short":
        return Diagnostic(name, "is empty")
    return Diagnostic(name, f"{complaint['msg'][0].lower()}{complaint['msg'][1:]}, not {complaint['input']!r}")


def location(section: ModelSection) -> str:
    """The folder or Hub id that Transformers takes.

    Raises:
        FileError: there is no built-in model of that name.
    """
    if not section.id.startswith("builtin:"):
        return str(expanded(section.id)) if section.id.startswith("~") else section.id
    if section.id not in BUILTIN:
        problem = Diagnostic("model.id", "no such model", did_you_mean(section.id, BUILTIN))
        raise FileError(f"cannot load {section.id}:", [problem])
    from lorary import builtin

    return str(builtin.path())


def check_folder(section: ModelSection) -> None:
    """Refuse a folder that does not hold a model, or would run code.

    Raises:
        FileError: every reason.
    """
    folder = Path(location(section))
    headline = f"cannot load the model {section.id}:"
    if not folder.exists():
        if section.id.startswith((".", "/", "~")) or section.id.count("/") > 1:
            fix = suggested_path(folder, folders=True)
            raise FileError(headline, [Diagnostic(section.id, "there is no such folder", fix)])
        return  # a Hub id
    if not (folder / "config.json").is_file():
        adapter = any((folder / name).is_file() for name in ("adapter_config.json", "lorary.json"))
        run = (folder / "run.json").is_file()
        what = "it is an adapter, not a model" if adapter else "there is no config.json in it"
        what = "it is a run, not a model" if run else what
        fix = f"`lorary merge {section.id} FOLDER` writes the model" if adapter or run else ""
        raise FileError(headline, [Diagnostic(section.id, what, fix)])
    problems = []
    try:
        written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileError(headline, [Diagnostic("config.json", f"is not valid JSON: {error}")]) from None
    if isinstance(written, dict) and "auto_map" in written and not section.trust_remote_code:
        fix = "read that code, then set model.trust_remote_code: true"
        problems.append(Diagnostic("config.json", "`auto_map`: the model would run its own Python code", fix))
    pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickles and not any(folder.glob("*.safetensors")):
        what = "weights as a pickle, which can run code when it is opened"
        problems.append(Diagnostic(pickles[0].name, what, "convert it to safetensors if you trust it"))
    if problems:
        raise FileError(headline, problems)
