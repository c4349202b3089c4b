"""YAML that remembers where it came from, and refuses what YAML allows but a configuration should not hold.

The reading is YAML 1.2's core schema, so that `no` is a word and `2e-4` is a number. Duplicate keys, tags,
merge keys, several documents, tabs, deep nesting, files over a megabyte and aliases that multiply are refused;
every mistake that can be told apart is reported at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lorary.errors import ConfigError, Diagnostic

MAX_BYTES = 1_000_000
MAX_DEPTH = 20
MAX_VALUES = 20_000  # after aliases are followed

Place = tuple[str | int, ...]

_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")  # 010 is eight in YAML 1.1 and ten in 1.2: it stays a text
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass(frozen=True)
class ParsedYaml:
    """A parsed document.

    Args:
        tree: plain dicts, lists and scalars.
        marks: path of a key or item -> where it stands, such as `train.yaml:14:3`.
    """

    tree: Any
    marks: dict[Place, str] = field(default_factory=dict)

    def where(self, path: Place) -> str:
        """Where `path` stands, or the nearest of its parents that stands anywhere."""
        while path and path not in self.marks:
            path = path[:-1]
        return self.marks.get(path, "")


def read(path: str | Path) -> ParsedYaml:
    """The document in the file `path`.

    Raises:
        ConfigError: the file cannot be read, is no UTF-8 text or no YAML that is accepted here.
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
    """The document in `text`; `name` is what messages call it.

    Raises:
        ConfigError: every reason why the text is not accepted.
    """
    builder = _Builder(name)
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            builder.take(event)
            if builder.hopeless:
                break
    except yaml.MarkedYAMLError as error:
        builder.problems.append(_syntax(error, name, text))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        builder.problems.append(Diagnostic(f"{name}:{line}", f"the character U+{error.character:04X} is not allowed"))
    if builder.problems:
        raise ConfigError(f"cannot read {name}:", builder.problems)
    return ParsedYaml(builder.root, builder.marks)


def scalar(text: str) -> Any:
    """What an unquoted YAML 1.2 scalar means."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text) and len(text) < 400:
        return int(text)
    if _FLOAT.fullmatch(text) and not re.fullmatch(r"[-+]?0[0-9]+", text):
        return float(text)
    special = _SPECIAL.fullmatch(text)
    if special:
        return float("nan") if special[3] else float(f"{special[1]}inf")
    return text


def dump(tree: Any) -> str:
    """YAML that `parse`, and any YAML 1.1 or 1.2 reader, reads back as `tree`."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _Dumper(yaml.SafeDumper):
    """Quotes a text that either version of YAML would read as something else."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = None if isinstance(scalar(value), str) else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


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
    return Diagnostic(
        where,
        f"this is not YAML: {what}",
        "close every bracket, and quote a text that holds `: `, `#`, `*`, `%` or `@`",
    )


class _Builder:
    """Builds the tree from parser events, without recursion, so that no document can exhaust the stack."""

    def __init__(self, name: str) -> None:
        self.name, self.root = name, None
        self.marks: dict[Place, str] = {}
        self.problems: list[Diagnostic] = []
        self.hopeless = False
        self._open: list[tuple[Any, Place]] = []  # containers being filled, and their paths
        self._keys: list[Any] = []  # of the open mappings: the key that waits for its value
        self._anchors: dict[str, Any] = {}
        self._values = self._documents = 0

    def take(self, event: yaml.Event) -> None:
        """Take one event of the parser."""
        if isinstance(event, yaml.DocumentStartEvent):
            self._documents += 1
            if self._documents > 1:
                self._refuse(event, "a second document", "keep one configuration per file", hopeless=True)
        elif isinstance(event, yaml.AliasEvent):
            self._alias(event)
        elif isinstance(event, yaml.ScalarEvent):
            self._check(event)
            plain = event.implicit[0] and event.style is None
            self._put(event, scalar(event.value) if plain else event.value)
        elif isinstance(event, yaml.CollectionStartEvent):
            self._check(event)
            self._put(event, {} if isinstance(event, yaml.MappingStartEvent) else [], opens=True)
        elif isinstance(event, yaml.CollectionEndEvent):
            self._open.pop()
            self._keys.pop()

    def _check(self, event: yaml.ScalarEvent | yaml.CollectionStartEvent) -> None:
        if event.tag not in (None, "!"):
            self._refuse(event, f"the tag `{event.tag}`", "a configuration holds plain values only")

    def _alias(self, event: yaml.AliasEvent) -> None:
        if event.anchor not in self._anchors:
            return self._refuse(event, f"`*{event.anchor}` refers to nothing before it")
        value = self._anchors[event.anchor]
        if any(value is container for container, _ in self._open):
            return self._refuse(event, f"`*{event.anchor}` holds itself", hopeless=True)
        self._values += _size(value, MAX_VALUES)
        self._put(event, value)

    def _put(self, event: Any, value: Any, opens: bool = False) -> None:
        self._values += 1
        if self._values > MAX_VALUES:
            return self._refuse(event, f"more than {MAX_VALUES:,} values", hopeless=True)
        if len(self._open) >= MAX_DEPTH:
            return self._refuse(event, f"nested deeper than {MAX_DEPTH} levels", hopeless=True)
        path = self._place(event, value)
        if getattr(event, "anchor", None) is not None and not isinstance(event, yaml.AliasEvent):
            self._anchors[event.anchor] = value
        if opens:
            self._open.append((value, path))
            self._keys.append(_NONE)

    def _place(self, event: Any, value: Any) -> Place:
        """Put a value where the parser stands; gives its path."""
        where = f"{self.name}:{event.start_mark.line + 1}:{event.start_mark.column + 1}"
        if not self._open:
            self.root = value
            self.marks[()] = where
            return ()
        container, parent = self._open[-1]
        if isinstance(container, list):
            container.append(value)
            path = (*parent, len(container) - 1)
        elif self._keys[-1] is _NONE:
            self._keys[-1] = self._key(event, value, container, parent, where)
            return parent
        else:
            key, self._keys[-1] = self._keys[-1], _NONE
            container[key] = value
            return (*parent, key)
        self.marks.setdefault(path, where)
        return path

    def _key(self, event: Any, value: Any, container: dict[Any, Any], parent: Place, where: str) -> str:
        if isinstance(value, dict | list):
            self._refuse(event, "a key that is a list or a mapping", hopeless=True)
            return ""
        key = str(getattr(event, "value", value))
        if key == "<<":
            self._refuse(event, "a merge key `<<`", "write the keys out")
        if key in container:
            first = self.marks[(*parent, key)].removeprefix(f"{self.name}:")
            self._refuse(event, f"`{key}` is given twice; the first stands at {first}", "keep one of them")
        self.marks.setdefault((*parent, key), where)
        return key

    def _refuse(self, event: Any, what: str, fix: str = "", hopeless: bool = False) -> None:
        mark = event.start_mark
        self.problems.append(Diagnostic(f"{self.name}:{mark.line + 1}:{mark.column + 1}", what, fix))
        self.hopeless |= hopeless


_NONE = object()


def _size(value: Any, most: int) -> int:
    """How many values `value` holds, counted up to `most`."""
    count, stack = 0, [value]
    while stack and count <= most:
        item = stack.pop()
        count += 1
        stack.extend(item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())
    return count
