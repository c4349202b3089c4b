"""A strict YAML reader that records the line and column of every key.

Scalars follow YAML 1.2's core schema, so that `no` is text and `2e-4` is a number. Duplicate keys, tags, merge keys,
several documents, tabs, deep nesting, files over a megabyte and exponential aliases are refused, with as many mistakes
at once as possible.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from lorary.errors import ConfigError, Diagnostic

MAX_BYTES = 1_000_000
MAX_DEPTH = 20
MAX_VALUES = 20_000  # after aliases are followed

Place = tuple[str | int, ...]

_NAMED: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")  # 010 is eight in YAML 1.1 and ten in 1.2: it stays text
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass(frozen=True)
class ParsedYaml:
    """A parsed document.

    Args:
        tree: plain dicts, lists and scalars.
        marks: place of a key or item -> its position, such as `train.yaml:14:3`.
    """

    tree: Any
    marks: dict[Place, str] = field(default_factory=dict)

    def where(self, place: Place) -> str:
        """The position of `place`, or of its nearest parent that has one."""
        return nearest_mark(self.marks, place)


def nearest_mark(marks: dict[Place, str], place: Place) -> str:
    """The mark of `place`, or of its nearest parent that has one; empty if none has."""
    return next((marks[place[:i]] for i in range(len(place), -1, -1) if place[:i] in marks), "")


def read(path: str | Path) -> ParsedYaml:
    """The document in the file `path`.

    Raises:
        ConfigError: the file cannot be read, is not UTF-8 text, or is not YAML that is accepted here.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise OSError(0, "it is not a regular file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot read the configuration {path}: {reason}") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"cannot read the configuration {path}: it is larger than {MAX_BYTES:,} bytes")
    return parse(_decoded(data, path.name), path.name)


def _decoded(data: bytes, name: str) -> str:
    for mark, encoding in ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if data.startswith(mark):
            return data.decode(encoding, errors="replace")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        what = f"byte 0x{data[error.start]:02x} is not UTF-8"
        raise ConfigError(f"{name} is not text:", [Diagnostic(f"{name}:{line}", what, "save it as UTF-8")]) from None


def parse(text: str, name: str) -> ParsedYaml:
    """The document in `text`; messages call it `name`.

    Raises:
        ConfigError: every reason why the text is not accepted.
    """
    reader = _Reader(text, name)
    try:
        reader.read()
    except _RejectedError as error:
        reader.problems.append(error.args[0])
    except yaml.MarkedYAMLError as error:
        reader.problems.append(_syntax(error, name, text))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        reader.problems.append(Diagnostic(f"{name}:{line}", f"the character U+{error.character:04X} is not allowed"))
    if reader.problems:
        raise ConfigError(f"cannot read {name}:", reader.problems)
    return ParsedYaml(reader.root, reader.marks)


def scalar(text: str) -> Any:
    """The value of an unquoted YAML 1.2 scalar."""
    if text in _NAMED:
        return _NAMED[text]
    if _INT.fullmatch(text) and len(text) < 400:
        return int(text)
    if _FLOAT.fullmatch(text) and not re.fullmatch(r"[-+]?0[0-9]+", text):
        return float(text)
    if special := _SPECIAL.fullmatch(text):
        return float("nan") if special[3] else float(f"{special[1]}inf")
    return text


def dump(tree: Any) -> str:
    """`tree` as YAML that `parse`, and any YAML 1.1 or 1.2 reader, reads back equal."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would read as something else."""


def _represent_text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = None if isinstance(scalar(value), str) else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _represent_text)


def _syntax(error: yaml.MarkedYAMLError, name: str, text: str) -> Diagnostic:
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return Diagnostic(name, str(error.problem))
    where = f"{name}:{mark.line + 1}:{mark.column + 1}"
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    if "\t" in line[: mark.column + 1]:
        return Diagnostic(where, "a tab", "YAML indents with spaces")
    what = " ".join(part for part in (error.context, error.problem) if part)
    fix = "close every bracket, and quote text that contains `: `, `#`, `*`, `%` or `@`"
    return Diagnostic(where, f"this is not YAML: {what}", fix)


class _RejectedError(Exception):
    """A mistake that ends the reading; carries its `Diagnostic`."""


class _Reader:
    """The values of a document, read from the parser's events by recursion of limited depth."""

    def __init__(self, text: str, name: str) -> None:
        self.events = yaml.parse(text, Loader=yaml.SafeLoader)
        self.name, self.root = name, None
        self.marks: dict[Place, str] = {}
        self.problems: list[Diagnostic] = []
        self._anchors: dict[str, Any] = {}
        self._values = 0

    def read(self) -> None:
        """Read the only document, if there is one."""
        documents = 0
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    self._reject(event, "a second document", "keep one configuration per file")
                self.root = self._value(next(self.events), (), ())

    def _value(self, event: Any, place: Place, inside: tuple[Any, ...]) -> Any:
        """The value that begins with an event; `inside` are the containers around it."""
        value = self._begin(event, inside)
        self.marks.setdefault(place, self._where(event))
        inside = (*inside, value)
        if isinstance(event, yaml.SequenceStartEvent):
            while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
                value.append(self._value(event, (*place, len(value)), inside))
        elif isinstance(event, yaml.MappingStartEvent):
            while not isinstance(event := next(self.events), yaml.MappingEndEvent):
                key = self._key(event, place, inside)
                value[key] = self._value(next(self.events), (*place, key), inside)
        return value

    def _begin(self, event: Any, inside: tuple[Any, ...]) -> Any:
        """The value of a scalar or an alias, or a container that is still empty."""
        if getattr(event, "tag", None) not in (None, "!"):
            self._report(event, f"the tag `{event.tag}`", "a configuration holds plain values only")
        if isinstance(event, yaml.AliasEvent):
            value = self._alias(event, inside)
        elif isinstance(event, yaml.ScalarEvent):
            value = scalar(event.value) if event.implicit[0] and event.style is None else event.value
        else:
            value = {} if isinstance(event, yaml.MappingStartEvent) else []
        self._values += 1
        if self._values > MAX_VALUES:
            self._reject(event, f"more than {MAX_VALUES:,} values")
        if len(inside) >= MAX_DEPTH:
            self._reject(event, f"nested deeper than {MAX_DEPTH} levels")
        if event.anchor is not None and not isinstance(event, yaml.AliasEvent):
            self._anchors[event.anchor] = value
        return value

    def _alias(self, event: yaml.AliasEvent, inside: tuple[Any, ...]) -> Any:
        if event.anchor not in self._anchors:
            return self._report(event, f"`*{event.anchor}` refers to nothing before it")
        value = self._anchors[event.anchor]
        if any(value is container for container in inside):
            self._reject(event, f"`*{event.anchor}` contains itself")
        self._values += _size(value)
        return value

    def _key(self, event: Any, place: Place, inside: tuple[Any, ...]) -> str:
        value = self._begin(event, inside)
        if isinstance(value, dict | list):
            self._reject(event, "a key that is a list or a mapping")
        key = str(getattr(event, "value", value))
        if key == "<<":
            self._report(event, "a merge key `<<`", "write the keys out")
        if key in inside[-1]:
            first = self.marks[(*place, key)].removeprefix(f"{self.name}:")
            self._report(event, f"`{key}` is given twice; the first is at {first}", "keep one of them")
        self.marks.setdefault((*place, key), self._where(event))
        return key

    def _where(self, event: Any) -> str:
        return f"{self.name}:{event.start_mark.line + 1}:{event.start_mark.column + 1}"

    def _report(self, event: yaml.Event, what: str, fix: str = "") -> None:
        self.problems.append(Diagnostic(self._where(event), what, fix))

    def _reject(self, event: yaml.Event, what: str, fix: str = "") -> NoReturn:
        raise _RejectedError(Diagnostic(self._where(event), what, fix))


def _size(value: Any) -> int:
    """The number of values in `value`; counting stops beyond `MAX_VALUES`."""
    count, stack = 0, [value]
    while stack and count <= MAX_VALUES:
        item = stack.pop()
        count += 1
        stack.extend(item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())
    return count
