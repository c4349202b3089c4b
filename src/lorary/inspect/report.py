"""One page that says what a run did: a single HTML file without a script or anything to fetch.

A page is a title, a few headline figures and sections; a section holds blocks, and every block turns itself
into HTML. All text is escaped. It reads on light and dark screens, on paper, and with pictures switched off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import Protocol


class Block(Protocol):
    """A part of a section."""

    def html(self) -> str:
        """The block as HTML, with all text in it escaped."""
        ...


@dataclass(frozen=True)
class Figure:
    """A number that the page opens with: its name, its value and, smaller, what it was measured on."""

    label: str
    value: str
    note: str = ""

    def html(self) -> str:
        note = f"<small>{escape(self.note)}</small>" if self.note else ""
        return f"<div class='figure'><dt>{escape(self.label)}</dt><dd>{escape(self.value)}{note}</dd></div>"


@dataclass(frozen=True)
class Words:
    """A paragraph."""

    text: str

    def html(self) -> str:
        return f"<p>{escape(self.text)}</p>"


@dataclass(frozen=True)
class Code:
    """Lines to read or to type, as they are."""

    text: str

    def html(self) -> str:
        return f"<pre>{escape(self.text)}</pre>"


@dataclass(frozen=True)
class Picture:
    """An SVG element that `lorary.inspect.plots` drew. It is put in as it is: never text from elsewhere."""

    svg: str
    caption: str

    def html(self) -> str:
        return f"<figure>{self.svg}<figcaption>{escape(self.caption)}</figcaption></figure>"


@dataclass(frozen=True)
class Table:
    """Rows under a head."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def html(self) -> str:
        head = "".join(f"<th scope='col'>{escape(word)}</th>" for word in self.head)
        rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows)
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        return f"<div class='wide' tabindex='0'>{table}</div>"


@dataclass(frozen=True)
class Beside:
    """What two models made of the same beginning, side by side (below each other on a narrow screen)."""

    prompt: str
    names: tuple[str, str]
    continuations: tuple[str, str]

    def html(self) -> str:
        columns = "".join(
            f"<div><h3>{escape(name)}</h3><pre><b>{escape(self.prompt)}</b>{escape(text)}</pre></div>"
            for name, text in zip(self.names, self.continuations, strict=True)
        )
        return f"<div class='beside'>{columns}</div>"


@dataclass(frozen=True)
class Section:
    """A heading and its blocks."""

    title: str
    blocks: Sequence[Block]

    def html(self) -> str:
        blocks = "".join(block.html() for block in self.blocks)
        return f"<section><h2>{escape(self.title)}</h2>{blocks}</section>"


def page(title: str, lead: str, figures: Sequence[Figure], sections: Sequence[Section]) -> str:
    """The whole page.

    Args:
        title: what the page is about.
        lead: one sentence or two under the title.
        figures: the numbers to see first.
        sections: the rest, in order.

    Returns:
        A complete HTML document. Its content policy forbids scripts and every request: it shows the same
        offline.

    >>> html = page("A run", "LoRA on <base>.", [Figure("Loss", "3.2")], [Section("Next", [Code("ls")])])
    >>> "LoRA on &lt;base&gt;." in html
    True
    """
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    style = resources.files("lorary.inspect").joinpath("report.css").read_text(encoding="utf-8")
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        f"<title>{escape(title)}</title><style>{style}</style></head><body><main>",
        f"<header><h1>{escape(title)}</h1><p>{escape(lead)}</p></header>",
        f"<dl class='figures'>{''.join(figure.html() for figure in figures)}</dl>",
        *(section.html() for section in sections),
        "</main></body></html>",
    ]
    return "\n".join(parts) + "\n"
