"""The report of a run or of a measurement: a single HTML file without a script or anything to fetch.

A report is a title, a few key figures and sections of blocks; `report.html.j2` is its look. All text is escaped. It
reads on light and dark screens, on paper, and with pictures switched off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


@dataclass(frozen=True)
class KeyFigure:
    """A number at the top of the page: its name, its value and, smaller, what it was measured on."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of text."""

    text: str


@dataclass(frozen=True)
class Code:
    """Lines to read or to type, as they are."""

    text: str


@dataclass(frozen=True)
class Picture:
    """An SVG element of `lorary.analysis.svg`. It is put in as it is: never text from elsewhere."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Table:
    """Rows under a head."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class SideBySide:
    """Continuations of one prompt in columns, which stand below each other on a narrow screen.

    Args:
        prompt: the beginning that they share.
        columns: (name, continuation) of each model.
    """

    prompt: str
    columns: Sequence[tuple[str, str]]


Block = Paragraph | Code | Picture | Table | SideBySide


@dataclass(frozen=True)
class Section:
    """A heading and its blocks."""

    title: str
    blocks: Sequence[Block]


def html_report(title: str, lead: str, figures: Sequence[KeyFigure], sections: Sequence[Section]) -> str:
    """The whole page.

    Args:
        title: the page's title.
        lead: one sentence or two under the title.
        figures: the numbers to see first.
        sections: the rest, in order.

    Returns:
        A complete HTML document. Its content policy forbids scripts and every request: it shows the same
        offline.

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
    environment.filters["kind"] = lambda block: type(block).__name__
    template = environment.get_template("report.html.j2")
    return template.render(title=title, lead=lead, figures=figures, sections=sections)
