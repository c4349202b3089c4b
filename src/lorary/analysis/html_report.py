"""Reports of a run or a measurement as a single HTML file, without scripts or external resources.

A report is a title, a few key figures and sections of blocks, rendered by `report.html.j2`. All text is escaped. It
works on light and dark screens, on paper, and without pictures.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup


@dataclass(frozen=True)
class KeyFigure:
    """A number at the top of the page, with its name and a note in small print."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of text."""

    text: str


@dataclass(frozen=True)
class Code:
    """Preformatted lines: code or commands."""

    text: str


@dataclass(frozen=True)
class Picture:
    """An SVG element from `lorary.analysis.svg`. It is inserted unescaped: never pass untrusted text."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Pictures:
    """Small pictures in two columns; in one on a narrow screen."""

    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Table:
    """A table with a header row."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class SideBySide:
    """Continuations of one prompt in columns; stacked on a narrow screen.

    Args:
        prompt: the prompt.
        columns: (name, continuation) of each model.
    """

    prompt: str
    columns: Sequence[tuple[str, str]]


def versions(*packages: str) -> dict[str, str]:
    """The versions of Python and of these packages."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in packages}


Block = Paragraph | Code | Picture | Pictures | Table | SideBySide


@dataclass(frozen=True)
class Section:
    """A heading and its blocks."""

    title: str
    blocks: Sequence[Block]


def versions_section() -> Section:
    """The versions of Python and of the packages that matter to a measurement."""
    rows = versions("lorary", "torch", "transformers", "trl", "safetensors").items()
    return Section("Versions", [Table(("package", "version"), [*rows])])


def html_report(title: str, lead: str, figures: Sequence[KeyFigure], sections: Sequence[Section]) -> str:
    """A report as a complete HTML document.

    Args:
        title: the page's title.
        lead: one or two sentences below the title.
        figures: the key figures.
        sections: the rest, in order.

    Returns:
        An HTML document. Its content security policy forbids scripts and requests, so it looks the same offline.

    >>> html = html_report("A run", "LoRA on <base>.", [KeyFigure("Loss", "3.2")], [Section("Next", [Code("ls")])])
    >>> "LoRA on &lt;base&gt;." in html
    True
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.finalize = _without_control_characters
    environment.filters["kind"] = lambda block: type(block).__name__
    template = environment.get_template("report.html.j2")
    return template.render(title=title, lead=lead, figures=figures, sections=sections)


def _without_control_characters(value: object) -> object:
    """Text without the characters that HTML cannot hold: models write them too."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "".join(c if c in "\n\t" or c.isprintable() or c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in value)
