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
    builder = _Builder(name)
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            builder.take(event)
    except _RejectedError as error:
        builder.problems.append(error.args[0])
    except yaml.MarkedYAMLError as error:
        builder.problems.append(_syntax(error, name, text))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        builder.problems.append(Diagnostic(f"{name}:{line}", f"the character U+{error.character:04X} is not allowed"))
    if builder.problems:
        raise ConfigError(f"cannot read {name}:", builder.problems)
    return ParsedYaml(builder.root, builder.marks)


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


@dataclass
class _Container:
    """A dict or list that is being filled, and the key that waits for its value."""

    value: Any
    place: Place
    key: str | None = None


class _Builder:
    """Builds the tree from parser events, without recursion, so that no document can exhaust the stack."""

    def __init__(self, name: str) -> None:
        self.name, self.root = name, None
        self.marks: dict[Place, str] = {}
        self.problems: list[Diagnostic] = []
        self._open: list[_Container] = []
        self._anchors: dict[str, Any] = {}
        self._values = self._documents = 0

    def take(self, event: yaml.Event) -> None:
        """Process one event of the parser."""
        if isinstance(event, yaml.DocumentStartEvent):
            self._documents += 1
            if self._documents > 1:
                self._reject(event, "a second document", "keep one configuration per file")
        elif isinstance(event, yaml.AliasEvent):
            self._alias(event)
        elif isinstance(event, yaml.ScalarEvent):
            plain = event.implicit[0] and event.style is None
            self._put(event, scalar(event.value) if plain else event.value)
        elif isinstance(event, yaml.CollectionStartEvent):
            self._put(event, {} if isinstance(event, yaml.MappingStartEvent) else [])
        elif isinstance(event, yaml.CollectionEndEvent):
            self._open.pop()

    def _alias(self, event: yaml.AliasEvent) -> None:
        if event.anchor not in self._anchors:
            return self._report(event, f"`*{event.anchor}` refers to nothing before it")
        value = self._anchors[event.anchor]
        if any(value is container.value for container in self._open):
            self._reject(event, f"`*{event.anchor}` contains itself")
        self._values += _size(value)
        self._put(event, value)

    def _put(self, event: Any, value: Any) -> None:
        """Put the value of a node where the parser stands."""
        if getattr(event, "tag", None) not in (None, "!"):
            self._report(event, f"the tag `{event.tag}`", "a configuration holds plain values only")
        self._values += 1
        if self._values > MAX_VALUES:
            self._reject(event, f"more than {MAX_VALUES:,} values")
        if len(self._open) >= MAX_DEPTH:
            self._reject(event, f"nested deeper than {MAX_DEPTH} levels")
        place = self._place(event, value)
        if event.anchor is not None:
            self._anchors[event.anchor] = value
        if isinstance(event, yaml.CollectionStartEvent):
            self._open.append(_Container(value, place))

    def _place(self, event: Any, value: Any) -> Place:
        """Add a value to the innermost container; returns its place."""
        place: Place = ()
        if not self._open:
            self.root = value
        else:
            parent = self._open[-1]
            if isinstance(parent.value, list):
                place = (*parent.place, len(parent.value))
                parent.value.append(value)
            elif parent.key is None:
                parent.key = self._key(event, value, parent)
                place = (*parent.place, parent.key)
            else:
                place = (*parent.place, parent.key)
                parent.value[parent.key] = value
                parent.key = None
        self.marks.setdefault(place, self._where(event))
        return place

    def _key(self, event: Any, value: Any, parent: _Container) -> str:
        if isinstance(value, dict | list):
            self._reject(event, "a key that is a list or a mapping")
        key = str(getattr(event, "value", value))
        if key == "<<":
            self._report(event, "a merge key `<<`", "write the keys out")
        if key in parent.value:
            first = self.marks[(*parent.place, key)].removeprefix(f"{self.name}:")
            self._report(event, f"`{key}` is given twice; the first is at {first}", "keep one of them")
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
