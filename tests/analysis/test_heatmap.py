"""The heat maps: every number in its place, marks that need no colour, and pages that long models fit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from xml.etree import ElementTree

import pytest

import lorary
from lorary.analysis.heatmap import MOST_COLUMNS, importance_svg, percent, ranks_svg, values_svg
from lorary.analysis.importance import drop_layers
from lorary.methods.lora_drop import Importance, Measured
from tests import tiny

SVG = "{http://www.w3.org/2000/svg}"
MODULES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


def texts(svg: str) -> list[tuple[float, float, str]]:
    """(y, x, text), line by line."""
    found = []
    for text in ElementTree.fromstring(svg).iter(f"{SVG}text"):
        x, y = text.get("x"), text.get("y")
        if x is None or y is None:  # a line of several
            x, y = re.findall(r"translate\(([\d.]+) ([\d.]+)\)", text.get("transform") or "")[0]
        found.append((float(y), float(x), text.text or ""))
    return sorted(found)


def lines(svg: str) -> list[list[str]]:
    """The words of every line of the picture, from left to right."""
    rows: list[list[tuple[float, str]]] = []
    before = -100.0
    for y, x, text in texts(svg):
        if y - before > 4:
            rows.append([])
        rows[-1].append((x, text))
        before = y
    return [[text for _, text in sorted(row)] for row in rows]


def ranks(layers: int) -> dict[str, int]:
    names = [f"model.layers.{i}.{module}" for i in range(layers) for module in MODULES]
    return {name: i % 9 for i, name in enumerate(names)} | {"lm_head": 8}


def shades(svg: str) -> list[float]:
    """The shade of every cell; 0 is drawn without one."""
    styles = [path.get("style") or "" for path in ElementTree.fromstring(svg).iter(f"{SVG}path")]
    fills = [re.search(r"fill-opacity: ([\d.]+)", style) for style in styles if "stroke-opacity: 0.3" in style]
    return [float(found[1]) if found else 0.0 for found in fills]


def test_every_rank_stands_in_its_layer_and_row() -> None:
    svg = ranks_svg(ranks(4), r=8)
    assert lines(svg) == [
        ["Rank of every layer"],
        ["0", "1", "2", "3", "–"],
        ["q_proj", "0", "3", "6", "0"],
        ["v_proj", "1", "4", "7", "1"],
        ["down_proj", "2", "5", "8", "2"],
        ["lm_head", "8"],
        ["47 of 104 directions remain in 13 sites; none in 2 of them."],
        ["Darker: nearer to 8."],
    ]
    assert {x for _, x, text in texts(svg) if text == "–"} == {[x for _, x, text in texts(svg) if text == "8"][-1]}


def test_the_shade_repeats_the_number() -> None:
    found = shades(ranks_svg({"a.0.q": 0, "a.1.q": 2, "a.2.q": 8, "a.3.q": 99}, r=8))
    assert found[0] == 0
    assert found[1] == pytest.approx(found[2] / 4, rel=0.01)
    assert found[2] == found[3], "no darker than dark"


def test_a_long_model_goes_on_below() -> None:
    layers = 80
    svg = ranks_svg(ranks(layers), r=8)
    rows = lines(svg)
    heads = [row for row, below in pairwise(rows) if below[0] == "q_proj"]
    assert [layer for head in heads for layer in head] == [*map(str, range(layers)), "–"]
    assert len(heads) == 3
    assert max(map(len, heads)) <= MOST_COLUMNS + 1
    numbers = [row for row in lines(svg) if row[0] == "v_proj"]
    assert [int(n) for row in numbers for n in row[1:]] == [
        ranks(layers)[f"model.layers.{i}.{MODULES[1]}"] for i in range(80)
    ]
    width = float(ElementTree.fromstring(svg).get("width", "0").removesuffix("pt"))
    assert width < 760, "as wide as a page"
    assert all(x < width for _, x, _ in texts(svg))


def _probed(g: Sequence[float]) -> tuple[Importance, lorary.Plan]:
    model = tiny.model("LlamaForCausalLM", num_hidden_layers=4)
    plan = lorary.plan(model, lorary.method("lora", r=2), ["q_proj", "lm_head"])
    found = Importance(tuple(Measured(p.site.name, x, 1.0) for p, x in zip(plan.sites, g, strict=True)))
    return found, drop_layers(plan, found, 0.9)


def test_importance_is_a_share_of_its_kind_and_kept_layers_are_marked() -> None:
    svg = importance_svg(*_probed([60, 5, 34.8, 0.2, 7]))
    assert lines(svg)[1:4] == [
        ["0", "1", "2", "3", "–"],
        ["q_proj", "60", "5.0", "35", "0.2"],
        ["lm_head", "100"],
    ]
    assert len(re.findall(r"stroke-width: 1.8", svg)) == 3, "layers 0 and 2, and the head"
    assert "Framed: its own LoRA" in " ".join(text for _, _, text in texts(svg))
    label = ElementTree.fromstring(svg).get("aria-label")
    assert label == "Importance of every layer: 3 of 5 layers have tensors of their own"


def test_the_same_numbers_are_the_same_bytes_and_words_are_only_words() -> None:
    assert ranks_svg(ranks(5), 8) == ranks_svg(ranks(5), 8)
    title = '<script>alert("x")</script> & more'
    root = ElementTree.fromstring(ranks_svg({"<b>.0.q": 1, "x.1.&": 2}, 4, title))
    assert root.findtext(f"{SVG}title") == title
    assert not list(root.iter(f"{SVG}script"))


def test_no_site_and_one_site_are_pictures_too() -> None:
    assert "0 of 0 directions remain in 0 sites." in " ".join(text for _, _, text in texts(ranks_svg({}, 4)))
    assert ["head", "2"] in lines(ranks_svg({"head": 2}, 4))


def test_any_figure_has_its_place_and_its_shade() -> None:
    values = {"a.0.q": 0.5, "a.1.q": 0.25, "a.2.q": 0.0, "a.3.q": float("nan"), "a.4.q": float("inf")}
    svg = values_svg(values, "Sizes", "in percent", text=percent)
    assert lines(svg) == [
        ["Sizes"],
        ["0", "1", "2", "3", "4"],
        ["q", "50", "25", "0.0", "nan", "inf"],
        ["in percent"],
    ]
    found = shades(svg)
    assert found[1] == pytest.approx(found[0] / 2, rel=0.01)
    assert found[2:] == [0, 0, 0], "what is not finite has no shade"
    halved = shades(values_svg(values, "Sizes", "", full_shade=1.0))
    assert halved[0] == pytest.approx(found[0] / 2, rel=0.01)
    assert "5 sites; the largest is 50 at a.0.q" in svg
    assert values_svg({}, "Sizes", "none").startswith("<svg")


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0.0"), (0.000123, "0.012"), (0.0098, "0.98"), (0.01, "1.0"), (0.099, "9.9"), (1, "100")]
)
def test_percents_are_short(share: float, text: str) -> None:
    assert percent(share) == text
