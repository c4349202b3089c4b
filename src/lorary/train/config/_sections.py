"""Sections of a configuration: the base with the adapter to go on from, and one of several methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pydantic import Field, model_validator

from lorary.methods.token_rows import TokenRows, with_new_tokens
from lorary.model.loading import source
from lorary.model.loading.source import Section
from lorary.model.planning import default_targets
from lorary.spec.interfaces import has_rank
from lorary.spec.method import Method
from lorary.spec.presets import method, resolve_presets
from lorary.train.config._fields import Alpha, Fraction, Size, SomeNames

_LORA_OPTIONS = ("r", "alpha", "dropout")


class ModelSection(source.ModelSection):
    """The base model, and the adapter that training goes on from."""

    adapter: str | None = Field(
        default=None,
        min_length=1,
        description="run or adapter folder to go on from; it brings its method, ranks and targets",
    )

    @model_validator(mode="before")
    @classmethod
    def _of_a_base(cls, value: Any) -> Any:
        """A section of the base alone, as the loaders take it, names no adapter."""
        return value.model_dump(exclude_unset=True) if type(value) is source.ModelSection else value


class AlsoSection(Section):
    """One more method, for other layers: their exceptions, ranks and alphas by glob stand beside `also`."""

    name: SomeNames = Field(description="presets to combine")
    targets: SomeNames = Field(description="its layers")
    r: Size | None = Field(default=None, description="rank; empty: the method's default")
    alpha: Alpha | None = Field(default=None, description="alpha, likewise")
    dropout: Fraction | None = Field(default=None, description="dropout on the adapter's input; empty: 0")
    options: dict[str, Any] = Field(default={}, description="presets' parameters")

    def build(self) -> Method:
        """The method of this section; see `MethodSection.build`."""
        return build_method(self)


class OneMethod(Protocol):
    """The part of a section that says a method."""

    @property
    def name(self) -> Sequence[str]: ...
    @property
    def options(self) -> dict[str, Any]: ...


def build_method(section: OneMethod) -> Method:
    """The method that a section says.

    Raises:
        MethodError: unknown presets or options, and every contradiction between them.
    """
    options = {key: value for key in _LORA_OPTIONS if (value := getattr(section, key)) is not None}
    return method(*section.name, **options, **section.options)


def token_ids(section: source.ModelSection) -> dict[str, int]:
    """Text -> id of the tokens that a section adds to its model's tokenizer."""
    from lorary.model.loading.from_pretrained import load_tokenizer

    ids = load_tokenizer(section).convert_tokens_to_ids(list(section.tokens))
    return dict(zip(section.tokens, map(int, ids), strict=True))


def methods_with_rows(methods: Mapping[Any, Method], tokens: Mapping[str, int]) -> dict[Any, Method]:
    """targets -> method, with the rows of new tokens in the method that trains rows, or in one of their own."""
    found = {
        targets: with_new_tokens(one, list(tokens.values()), list(tokens)) if isinstance(one.join, TokenRows) else one
        for targets, one in methods.items()
    }
    if found == dict(methods):
        found[TokenRows.targets] = with_new_tokens(method("rows"), list(tokens.values()), list(tokens))
    return found


def method_defaults(section: OneMethod) -> dict[str, Any]:
    """r, alpha, dropout and targets of the presets, as far as the method has them."""
    found: dict[str, Any] = {}
    for preset in resolve_presets(section.name):
        found |= {key: preset.parameters[key] for key in _LORA_OPTIONS if key in preset.parameters}
    built = build_method(section)
    if not hasattr(built.scale, "alpha"):  # another preset replaced LoRA's scale
        found.pop("alpha", None)
    if not has_rank(built.delta):  # and its delta
        found.pop("r", None)
    return found | {"targets": default_targets(built)}
