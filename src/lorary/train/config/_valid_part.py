"""The valid part of a configuration with invalid keys, so that the checks of the others run in the same round."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pydantic import ValidationError

from lorary.errors import Diagnostic, suggested_path
from lorary.files.home import expanded
from lorary.train.config.config import Config
from lorary.train.config.yaml_source import Place

_LEAST: dict[str, dict[str, Any]] = {"model": {"id": "builtin:base"}, "data": {"train": ["builtin:docstrings"]}}
_FILES = (".jsonl", ".json", ".csv", ".parquet", ".txt", ".jinja")


class ValidPart:
    """A configuration without its invalid keys.

    Args:
        tree: section -> key -> value.

    Attributes:
        config: the configuration, invalid keys at their defaults; None if too little of it is valid.
        error: pydantic's; None if everything is valid.
        invalid: the sections and keys that are invalid or missing.
    """

    def __init__(self, tree: dict[str, Any]) -> None:
        self.config: Config | None = None
        self.error: ValidationError | None = None
        self.invalid: set[tuple[str, ...]] = set()
        try:
            self.config = Config.model_validate(tree)
        except ValidationError as error:
            self.error = error
            self.invalid = {tuple(map(str, details["loc"][:2])) for details in error.errors()}
            self.config = self._without_invalid(tree)

    def _without_invalid(self, tree: dict[str, Any]) -> Config | None:
        left = {key: dict(value) if isinstance(value, dict) else value for key, value in tree.items()}
        for section, *keys in self.invalid:
            if not keys:
                left.pop(section, None)
            elif isinstance(left.get(section), dict):
                left[section].pop(keys[0], None)
        for section, required in _LEAST.items():
            left[section] = required | left.get(section, {})
        try:
            return Config.model_validate(left)
        except ValidationError:
            return None

    def problems(self, *checks: Callable[[Config], Iterable[Diagnostic]]) -> Iterator[Diagnostic]:
        """The problems that checks find; a check that asks for an invalid value ends there."""
        if self.config is None:
            return
        config = self.config.model_copy()
        for section, *keys in self.invalid:
            if keys and hasattr(config, section):
                part = getattr(config, section).model_copy()
                part.__dict__.pop(keys[0], None)
                config.__dict__[section] = part
        for section in (place[0] for place in self.invalid if len(place) == 1):
            config.__dict__.pop(section, None)
        for check in checks:
            try:
                yield from check(config)
            except AttributeError:
                if self.error is None:
                    raise

    def missing_files(self) -> Iterator[tuple[Place, str, str]]:
        """(key, what, hint) of the files that do not exist: those that are named as a file, not as a data set."""
        if self.config is None:
            return
        data = self.config.data
        named = {"train": data.train, "validation": data.validation or (), "chat_template": (data.chat_template,)}
        for key, sources in named.items():
            for source in sources:
                path = expanded(source.partition("#")[0]) if isinstance(source, str) else None
                if path and path.suffix.lower() in _FILES and "\0" not in str(path) and not path.exists():
                    yield ("data", key), f"`data.{key}`: there is no file {source}", suggested_path(path)
