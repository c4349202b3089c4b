"""The common style of the pictures: nothing fetched, nothing interpreted, colours for every page and every eye."""

import re
import xml.etree.ElementTree as ET

import matplotlib
import pytest
from matplotlib.figure import Figure

from lorary.analysis.svg import PALETTE, cell, cell_axes, line, style, to_svg

SVG = "{http://www.w3.org/2000/svg}"
LIGHT, DARK = "#ffffff", "#15181c"  # pages


def picture(title: str = "Lines", name: str = "one") -> str:
    with style():
        figure = Figure(figsize=(4, 3))
        axes, cells = figure.subplots(1, 2)
        for i in range(7):
            axes.plot([0, 1], [i, i + 1], label=name, **line(i))
        axes.set_title(title)
        axes.legend()
        cell_axes(cells, 2, 1)
        cell(cells, 0, 0, "7", 1.0)
        cell(cells, 1, 0, "8", 0.5, framed=True)
        return to_svg(figure, title, "seven lines & two cells")


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def test_the_same_figure_is_the_same_bytes() -> None:
    assert picture() == picture() != picture(name="two")


def test_nothing_is_fetched_and_nothing_is_dated() -> None:
    svg = picture()
    namespaces = {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}
    assert set(re.findall(r"""https?://[^"'\s<]+""", svg)) <= namespaces
    assert all(target.startswith("#") for target in re.findall(r"""(?:href|src)="([^"]*)""", svg))
    assert "<metadata" not in svg
    assert "<!DOCTYPE" not in svg
    assert "<?xml" not in svg, "it can stand inside a page"


def test_colours_follow_the_page() -> None:
    svg = picture()
    assert "currentColor" in svg
    assert "#123456" not in svg
    assert "prefers-color-scheme:dark" in svg
    colours, _, drawn = svg.partition("</style>")
    assert "#fff" in colours
    assert "#fff" not in drawn, "a white box would stand out on a dark page"
    assert not re.search(r"[>}]\s*\*\s*\{", svg), "a style for every element would reach the page around the picture"


@pytest.mark.parametrize("colour", PALETTE)
def test_every_colour_can_be_seen_on_light_and_dark_pages(colour: str) -> None:
    assert contrast(colour, LIGHT) >= 3
    assert contrast(colour, DARK) >= 3


def test_lines_differ_in_more_than_colour() -> None:
    looks = [(line(i)["linestyle"], line(i)["marker"]) for i in range(12)]
    assert len(set(looks)) == 12
    assert "marker" not in line(0, marker=False)


def test_the_number_on_the_darkest_cell_can_be_read() -> None:
    def over(page: str, opacity: float) -> str:
        pairs = [(int(PALETTE[0][i : i + 2], 16), int(page[i : i + 2], 16)) for i in (1, 3, 5)]
        return "#" + "".join(f"{round(opacity * shade + (1 - opacity) * under):02x}" for shade, under in pairs)

    opacity = max(float(o) for o in re.findall(r"fill-opacity: ([\d.]+)", picture()))
    for ink, page in (("#1f2328", LIGHT), ("#e6e6e6", DARK)):
        assert contrast(ink, over(page, opacity)) >= 4.5


@pytest.mark.parametrize("text", ["cost: $5 or $x^2$", '<script>alert("x")</script>', "a & b", "Verlust: ½ → ¼"])
def test_words_are_only_words(text: str) -> None:
    root = ET.fromstring(picture(title=text, name=text))
    assert root.findtext(f"{SVG}title") == text
    assert [t.text for t in root.iter(f"{SVG}text")].count(text) == 8, "the heading and the legend"
    assert root.get("aria-label") == f"{text}: seven lines & two cells"
    assert not list(root.iter(f"{SVG}script"))


def test_settings_of_matplotlib_come_back() -> None:
    before = dict(matplotlib.rcParams)
    picture()
    assert dict(matplotlib.rcParams) == before


def test_no_two_of_many_lines_look_alike_without_their_dashes() -> None:
    looks = [(line(i)["color"], line(i)["marker"]) for i in range(36)]
    assert len(set(looks)) == 36
