"""The report page: complete, escaped, and without anything to fetch."""

import re
from html.parser import HTMLParser

from lorary.analysis.html_report import (
    Code,
    KeyFigure,
    Paragraph,
    Picture,
    Pictures,
    Section,
    SideBySide,
    Table,
    html_report,
)
from lorary.analysis.loss_plot import loss_svg

HOSTILE = "<script>alert('x')</script><img src=http://example.com/x onerror=go()> & \"q\""
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Reader(HTMLParser):
    """Reads a page and keeps what a browser would act on."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def everything_hostile() -> str:
    blocks = [
        Paragraph(HOSTILE),
        Code(HOSTILE),
        Table([HOSTILE, "n"], [[HOSTILE, "1"], ["a", HOSTILE]]),
        SideBySide(HOSTILE, [(HOSTILE, HOSTILE), ("b", "")]),
        Picture(loss_svg([{"step": 1, "loss": 2.0}], HOSTILE), HOSTILE),
        Pictures([Picture(loss_svg([{"step": 1, "loss": 2.0}], HOSTILE), HOSTILE)] * 2),
    ]
    return html_report(HOSTILE, HOSTILE, [KeyFigure(HOSTILE, HOSTILE, HOSTILE)], [Section(HOSTILE, blocks)])


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == [], "every element is closed"
    return reader


def test_all_text_is_escaped() -> None:
    reader = read(everything_hostile())
    assert reader.tags.isdisjoint({"script", "img", "iframe", "link", "object", "embed", "form", "base"})
    assert not [name for name, _ in reader.attributes if name.startswith("on")]
    # title, h1, lead, the figure's three, h2, words, code, 3 cells, 2 × prompt, a name, a continuation,
    # the caption and the picture's own title, twice.
    assert "".join(reader.words).count(HOSTILE) == 25


def test_nothing_is_fetched() -> None:
    html = everything_hostile()
    reader = read(html)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in reader.attributes
    targets = [value for name, value in reader.attributes if name in {"src", "href", "xlink:href", "action"}]
    assert all(value and value.startswith("#") for value in targets)
    assert not re.search(r"@import|url\((?!#)", html)


def test_pictures_keep_working_beside_each_other() -> None:
    one, two = (loss_svg([{"step": s, "loss": k / s} for s in range(1, 9)]) for k in (1, 2))
    html = html_report("t", "l", [], [Section("s", [Picture(one, "one"), Picture(two, "two")])])
    assert html.count("<svg") == 2
    read(html)


def test_the_page_is_for_light_dark_and_paper() -> None:
    html = html_report("t", "l", [], [])
    assert "color-scheme: light dark" in html
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    assert '<html lang="en">' in html


def test_small_pictures_stand_in_one_block() -> None:
    pictures = [Picture(loss_svg([{"step": 1, "loss": 2.0}]), f"the {name}") for name in ("first", "second")]
    page = html_report("Maps", "", [], [Section("Maps", [Pictures(pictures)])])
    (block,) = re.findall(r'<div class="pictures">(.*?)</div>', page, re.DOTALL)
    assert block.count("<figure>") == block.count("<svg") == 2
    assert re.findall(r"<figcaption>(.*?)</figcaption>", block) == ["the first", "the second"]
