"""The pictures of a search for weights: every number is there, and odd ones do no harm."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import lorary
from lorary.adapters.compose.lorahub import Candidate, WeightSearch
from lorary.analysis.weight_search_plot import search_svg, weights_svg


def search(*objectives: float) -> WeightSearch:
    candidates = tuple(Candidate((0.1 * i,), value, value) for i, value in enumerate(objectives))
    return WeightSearch(lorary.Adapter(lorary.method("bitfit"), (), {}), ("a",), (0.1,), 1.0, candidates, (1.0,))


def test_bars_have_their_names_and_numbers() -> None:
    names = ["code", "a/very/long/path/to/the/folder/of/an/adapter", "$x$ <b>"]
    svg = weights_svg(names, [1.5, -0.25, 0.0])
    text = " ".join(ElementTree.fromstring(svg).itertext())
    for part in ("code", "+1.500", "-0.250", "+0.000", "...the/folder/of/an/adapter"[-20:], "$x$ <b>"):
        assert part in text, part
    assert svg == weights_svg(names, [1.5, -0.25, 0.0]), "the same bytes"
    assert "a/very/long" in svg, "the whole name is in the description"


def test_no_weight_at_all_is_drawn_too() -> None:
    assert weights_svg(["a"], [0.0]).startswith("<svg")


def test_the_curve_tells_where_it_began_and_ended() -> None:
    assert "3 candidates: 3.000 with all weights zero, 2.000 at the end" in search_svg(search(3.0, 2.0, 2.5))
    assert "1 candidates" in search_svg(search(3.0))
    assert ">2.5<" not in search_svg(search(*(3.0 - 0.01 * i for i in range(20)))), "there is no half candidate"
    odd = search_svg(search(3.0, math.nan, 2.9, 1e9, 2.8, 2.7))
    assert "2.700 at the end" in odd
    ticks = [e.text for e in ElementTree.fromstring(odd).iter() if e.tag.endswith("text")]
    assert not any("1e" in (text or "") for text in ticks), "one candidate far away does not flatten the rest"
