"""The pictures of the methods show every tensor, its shape and whether it trains, and where they meet."""

from __future__ import annotations

import importlib.util
import re
import sys
from types import ModuleType
from xml.etree import ElementTree

import pytest

import lorary
from lorary.methods.o_lora import SequentialLoRA
from lorary.spec.placement import AdaptedSite
from tests import pages


def _module() -> ModuleType:
    """docs/method_picture.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("method_picture", pages.ROOT / "docs" / "method_picture.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


_pictures = _module()
EXAMPLE, lanes, method_svg = _pictures.EXAMPLE, _pictures.lanes, _pictures.method_svg

SVG = "{http://www.w3.org/2000/svg}"
PRESETS = lorary.presets()


def words(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def fills(svg: str) -> list[str]:
    """The kind of every tensor and swatch, in the order in which they are drawn."""
    known = {"trains", "frozen", "shared", "base", "moved"}
    kinds = [(e.get("id") or "").partition("-")[0] for e in ElementTree.fromstring(svg).iter(f"{SVG}g")]
    return [kind for kind in kinds if kind in known]


@pytest.mark.parametrize("name", PRESETS)
def test_every_tensor_is_there(name: str) -> None:
    method = lorary.method(name)
    svg = method_svg(method, PRESETS[name].title)
    assert svg == method_svg(method, PRESETS[name].title)
    said = words(svg)
    shapes = AdaptedSite(_pictures.example_site(method), method).shapes if method.delta else {}
    for role, shape in shapes.items():
        assert (role in said and str(list(shape)) in said) or f"{role} {list(shape)}" in said, role
    assert ("trains" in said) == bool(method.trained or method.full)
    assert ElementTree.fromstring(svg).find(f"{SVG}title").text == PRESETS[name].title  # type: ignore[union-attr]


@pytest.mark.parametrize("name", PRESETS)
def test_a_picture_needs_nothing_else(name: str) -> None:
    svg = method_svg(lorary.method(name), "A < B & C")
    assert not re.findall(r"(?:href|src|@import|url\((?!#))", svg)
    assert "nan" not in svg
    root = ElementTree.fromstring(svg)
    width, height = (float(root.get(side, "0").removesuffix("pt")) for side in ("width", "height"))
    for element in root.iter(f"{SVG}text"):
        assert 0 < float(element.get("x", "-1")) < width
        assert 0 < float(element.get("y", "-1")) < height


def test_colours_tell_what_trains() -> None:
    assert fills(method_svg(lorary.method("lora-fa"), ""))[:4] == ["frozen", "trains", "base", "base"]
    assert fills(method_svg(lorary.method("vera"), ""))[:4] == ["shared", "trains", "shared", "trains"]
    assert fills(method_svg(lorary.method("bitfit"), ""))[:2] == ["base", "trains"]
    assert fills(method_svg(lorary.method("full"), ""))[:2] == ["trains", "trains"]
    assert fills(method_svg(lorary.method("pissa"), ""))[2] == "moved"


def test_the_way_from_x_to_y() -> None:
    def way(*names: str, **options: int) -> list[tuple[str, int, int, int, int]]:
        (found,) = lanes(AdaptedSite(EXAMPLE, lorary.method(*names, **options)))
        return [(p.role, p.left, p.right, p.blocks, p.copies) for p in found]

    assert way("lora", r=4) == [("A", 1024, 4, 1, 1), ("B", 4, 2048, 1, 1)]
    assert way("vera", r=8) == [("A", 1024, 8, 1, 1), ("d", 8, 8, 1, 1), ("B", 8, 2048, 1, 1), ("b", 2048, 2048, 1, 1)]
    assert way("melora", r=4, n=2) == [("A", 1024, 8, 2, 1), ("B", 8, 2048, 2, 1)]
    assert way("multilora", r=4, n=3) == [("A", 1024, 4, 1, 3), ("B", 4, 2048, 1, 3), ("gamma", 2048, 2048, 1, 3)]
    assert way("adalora", r=4, target=2) == [("Q", 1024, 4, 1, 1), ("E", 4, 4, 1, 1), ("P", 4, 2048, 1, 1)]


def test_what_is_given_has_a_lane_of_its_own() -> None:
    def way(method: lorary.Method) -> list[list[tuple[str, int, int, int, str]]]:
        found = lanes(AdaptedSite(EXAMPLE, method))
        return [[(p.role, p.left, p.right, p.copies, p.state) for p in lane] for lane in found]

    assert way(lorary.method("delta-lora", r=4)) == [
        [("A", 1024, 4, 1, "trains"), ("B", 4, 2048, 1, "trains")],
        [("A_K", 1024, 4, 1, "frozen"), ("lam", 4, 4, 1, "frozen"), ("B_K", 4, 2048, 1, "frozen")],
    ]
    assert way(lorary.method("o-lora").replace(delta=SequentialLoRA(4, past=(4, 4)))) == [
        [("A", 1024, 4, 1, "trains"), ("B", 4, 2048, 1, "trains")],
        [("A_past", 1024, 4, 2, "frozen"), ("B_past", 4, 2048, 2, "frozen")],
    ]
    assert "The weight follows the product B A after every optimizer step" in " ".join(
        words(method_svg(lorary.method("delta-lora"), ""))
    )


def test_several_products_have_a_lane_each() -> None:
    def way(*names: str, **options: int) -> list[list[tuple[str, int, int]]]:
        return [
            [(p.role, p.left, p.right) for p in lane]
            for lane in lanes(AdaptedSite(EXAMPLE, lorary.method(*names, **options)))
        ]

    assert way("loha", r=4) == [[("A1", 1024, 4), ("B1", 4, 2048)], [("A2", 1024, 4), ("B2", 4, 2048)]]
    assert way("lokr", r=4) == [[("C", 32, 32)], [("Da", 32, 4), ("Db", 4, 64)]]
    assert way("lokr", r=4, factor=4, decompose_both=True)[0] == [("C", 4, 4)]
    assert "\N{CIRCLED TIMES}" in words(method_svg(lorary.method("lokr"), ""))


def test_the_join_the_scale_and_the_rates_are_said() -> None:
    said = words(method_svg(lorary.method("dora", "pissa", "rslora", "lora+", r=16, alpha=32, ratio=4), ""))
    for expected in ("MagnitudeDirection", "m [2048]", "s = 8", "learns 4 times faster", "W \N{MINUS SIGN} s B0 A0"):
        assert expected in said
    assert "dropout 0.1" in words(method_svg(lorary.method("lora", dropout=0.1), ""))


def test_longlora_shows_its_attention_in_groups() -> None:
    said = words(method_svg(lorary.method("longlora", groups=8), ""))
    assert {"attention while training, 8 groups", "half of the heads", "the other half, shifted"} <= set(said)
    assert "embeddings and norms train too" in said
    for other in (lorary.method("longlora", shifted=False), lorary.method("lora")):
        assert not any("attention while training" in text for text in words(method_svg(other, "")))
