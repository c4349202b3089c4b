"""The heat maps: every number in its place, marks that need no colour, and pages that long models fit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree

import pytest
from tests import tiny

import lorary
from lorary.inspect.heatmap import MOST_COLUMNS, importance_svg, ranks_svg
from lorary.methods.lora_drop import Importance, Measured
from lorary.probing import drop_layers

SVG = "{http://www.w3.org/2000/svg}"
MODULES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


def texts(svg: str) -> list[tuple[float, float, str]]:
    """(y, x, text), line by line."""
    found = ElementTree.fromstring(svg).iter(f"{SVG}text")
    return sorted((float(t.get("y", 0)), float(t.get("x", 0)), t.text or "") for t in found)


def lines(svg: str) -> list[list[str]]:
    """The words of every line of the picture, from left to right."""
    rows: dict[float, list[str]] = {}
    for y, _, text in texts(svg):
        rows.setdefault(y, []).append(text)
    return list(rows.values())


def ranks(layers: int) -> dict[str, int]:
    names = [f"model.layers.{i}.{module}" for i in range(layers) for module in MODULES]
    return {name: i % 9 for i, name in enumerate(names)} | {"lm_head": 8}


def shades(svg: str, frames: str = "fill-opacity") -> list[float]:
    return [float(n) for n in re.findall(rf"{frames}:([\d.]+)", svg.partition("</style>")[2])]


def test_every_rank_stands_in_its_layer_and_row() -> None:
    svg = ranks_svg(ranks(4), r=8)
    assert lines(svg) == [
        ["Rank of every layer"],
        ["layer", "0", "1", "2", "3", "–"],
        ["q_proj", "0", "3", "6", "0"],
        ["v_proj", "1", "4", "7", "1"],
        ["down_proj", "2", "5", "8", "2"],
        ["lm_head", "8"],
        ["47 of 104 directions are left in 13 sites; none in 2 of them. The darker, the nearer to 8."],
    ]
    columns = {text: x for _, x, text in texts(svg) if text in ("0", "1", "2", "3", "–")}
    assert next(x for y, x, text in texts(svg) if text == "8" and y == texts(svg)[-2][0]) == columns["–"]


def test_the_shade_repeats_the_number() -> None:
    found = shades(ranks_svg({"a.0.q": 0, "a.1.q": 2, "a.2.q": 8, "a.3.q": 99}, r=8))
    assert found[0] == 0
    assert found[1] == pytest.approx(found[2] / 4, rel=0.01)
    assert found[2] == found[3], "no darker than dark"


def test_a_long_model_goes_on_below() -> None:
    layers = 80
    svg = ranks_svg(ranks(layers), r=8)
    heads = [row[1:] for row in lines(svg) if row[0] == "layer"]
    assert [layer for head in heads for layer in head] == [*map(str, range(layers)), "–"]
    assert len(heads) == 3
    assert max(map(len, heads)) <= MOST_COLUMNS + 1
    numbers = [row for row in lines(svg) if row[0] == "v_proj"]
    assert [int(n) for row in numbers for n in row[1:]] == [
        ranks(layers)[f"model.layers.{i}.{MODULES[1]}"] for i in range(80)
    ]
    width = float(ElementTree.fromstring(svg).get("width", 0))
    assert width < 1050, "as wide as a page"
    assert all(x < width for _, x, _ in texts(svg))


def _probed(g: Sequence[float]) -> tuple[Importance, lorary.Plan]:
    model = tiny.model("LlamaForCausalLM", num_hidden_layers=4)
    plan = lorary.plan(model, lorary.method("lora", r=2), ["q_proj", "lm_head"])
    found = Importance(tuple(Measured(p.site.name, x, 1.0) for p, x in zip(plan.placed, g, strict=True)))
    return found, drop_layers(plan, found, 0.9)


def test_importance_is_a_share_of_its_kind_and_kept_layers_are_marked() -> None:
    svg = importance_svg(*_probed([60, 5, 34.8, 0.2, 7]))
    assert lines(svg)[1:4] == [
        ["layer", "0", "1", "2", "3", "–"],
        ["q_proj", "60", "5.0", "35", "0.2"],
        ["lm_head", "100"],
    ]
    drawn = [e for e in ElementTree.fromstring(svg).iter() if e.get("style")]
    thick = [e for e in drawn if "stroke-width:2" in e.get("style", "")]
    corners = [e for e in drawn if e.tag == f"{SVG}polygon"]
    assert len(thick) == len(corners) == 3 + 1, "layers 0 and 2, the head, and the one that explains"
    assert [row for row in lines(svg) if "a LoRA of its own" in row] == [
        ["a LoRA of its own", "shares one with others of its kind"]
    ]
    label = ElementTree.fromstring(svg).get("aria-label")
    assert label == "Importance of every layer: 3 of 5 layers have tensors of their own"


def test_the_same_numbers_are_the_same_bytes_and_words_are_only_words() -> None:
    assert ranks_svg(ranks(5), 8) == ranks_svg(ranks(5), 8)
    title = '<script>alert("x")</script> & more'
    root = ElementTree.fromstring(ranks_svg({"<b>.0.q": 1, "x.1.&": 2}, 4, title))
    assert root.findtext(f"{SVG}title") == title
    assert not list(root.iter(f"{SVG}script"))
    assert "http" not in ranks_svg(ranks(2), 8).replace("http://www.w3.org/2000/svg", "")


def test_no_site_and_one_site_are_pictures_too() -> None:
    assert lines(ranks_svg({}, 4))[-1] == ["0 of 0 directions are left in 0 sites. The darker, the nearer to 4."]
    assert ["head", "2"] in lines(ranks_svg({"head": 2}, 4))
