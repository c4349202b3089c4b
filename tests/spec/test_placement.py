"""One site and the method there: its tensors, its scale, and what it costs."""

from __future__ import annotations

import pytest

import lorary
from lorary.errors import MethodError
from lorary.methods.lora import AlphaOverRank, ConstantScale, Gaussian, LowRank
from lorary.spec.placement import AdaptedSite, adaptation, shared_shapes, start_name, with_rank
from lorary.spec.site import Part, Site

LINEAR = Site("x", "linear", 5, 3, True)
FUSED = Site("x", "linear", 12, 3, True, (Part("q", 0, 2, 6, 2), Part("v", 4, 2, 6, 2)))
TABLE = Site("x", "embedding", 4, 9, False)


@pytest.mark.parametrize(
    ("site", "A", "B"),
    [(LINEAR, (2, 3), (5, 2)), (FUSED, (4, 3), (8, 2)), (TABLE, (2, 9), (4, 2))],
    ids=["linear", "fused", "embedding"],
)
def test_the_tensors_of_a_site(site: Site, A: tuple[int, int], B: tuple[int, int]) -> None:
    placed = AdaptedSite(site, lorary.method(r=2))
    assert placed.shapes == {"A": A, "B": B}
    assert placed.trainable == A[0] * A[1] + B[0] * B[1]
    assert AdaptedSite(site, lorary.method("lora-fa", r=2)).trainable == B[0] * B[1]


def test_what_it_says_of_its_method() -> None:
    placed = AdaptedSite(LINEAR, lorary.method("rslora", r=4, alpha=6))
    assert (placed.r, placed.alpha, placed.scale) == (4, 6, 3.0)
    fixed = AdaptedSite(LINEAR, lorary.method("lora", r=4, scale=ConstantScale(0.25)))
    assert (fixed.alpha, fixed.scale) == (None, 0.25)


def test_another_rank_or_alpha_and_every_other_word_as_it_is() -> None:
    method = lorary.method("lora+", "lora", r=4, alpha=6, init=Gaussian(), dropout=0.5, full="norm")
    assert with_rank(method) is method
    assert with_rank(method, r=2) == method.replace(delta=LowRank(2))
    assert with_rank(method, r=2, alpha=1.5) == method.replace(delta=LowRank(2), scale=AlphaOverRank(1.5))
    with pytest.raises(MethodError, match="LowRank has r = 0; it takes a whole number of at least 1"):
        with_rank(method, r=0)
    with pytest.raises(TypeError):
        with_rank(lorary.method(scale=ConstantScale(1.0)), alpha=3)


@pytest.mark.parametrize(
    ("site", "frozen", "problem"),
    [
        (LINEAR, "A", None),
        (TABLE, "B", None),
        (LINEAR, "B", "x: {B} starts at zero in a layer of kind linear and is frozen: nothing could train"),
        (TABLE, "A", "x: {A} starts at zero in a layer of kind embedding and is frozen: nothing could train"),
    ],
)
def test_a_factor_that_starts_at_zero_must_train(site: Site, frozen: str, problem: str | None) -> None:
    problems = AdaptedSite(site, lorary.method(frozen=frozen)).problems()
    assert [str(p).partition("\n")[0] for p in problems] == ([problem] if problem else [])


# --- methods that join, start or learn in another way -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "options", "shapes", "trainable"),
    [
        (("dora",), {"r": 2}, {"A": (2, 3), "B": (5, 2), "m": (5,)}, 21),
        (("pissa",), {"r": 2}, {"A": (2, 3), "B": (5, 2)}, 16),
        (("vera",), {"r": 4}, {"A": (4, 3), "B": (5, 4), "b": (5,), "d": (4,)}, 9),
        (("vera", "dora"), {"r": 4}, {"A": (4, 3), "B": (5, 4), "b": (5,), "d": (4,), "m": (5,)}, 14),
        (("multilora",), {"r": 2, "n": 3}, {"A": (6, 3), "B": (5, 6), "gamma": (15,)}, 63),
        (("dora", "lora-fa"), {"r": 2}, {"A": (2, 3), "B": (5, 2), "m": (5,)}, 15),
    ],
)
def test_the_tensors_of_other_methods(
    names: tuple[str, ...], options: dict[str, int], shapes: dict[str, tuple[int, ...]], trainable: int
) -> None:
    placed = AdaptedSite(LINEAR, lorary.method(*names, **options))
    assert placed.shapes == shapes
    assert placed.trainable == trainable
    assert placed.problems() == []


def test_the_tensors_of_slices() -> None:
    even = Site("x", "linear", 4, 6, False)
    assert AdaptedSite(even, lorary.method("melora", r=3, n=2)).shapes == {"A": (6, 3), "B": (4, 3)}
    assert AdaptedSite(FUSED, lorary.method("vera", r=3)).shapes == {"A": (3, 3), "B": (4, 3), "b": (8,), "d": (6,)}
    assert AdaptedSite(FUSED, lorary.method("dora", r=1)).shapes["m"] == (12,)  # of every output, adapted or not


def test_a_file_holds_the_start_of_a_moved_base_as_well() -> None:
    placed = AdaptedSite(LINEAR, lorary.method("pissa", "dora", r=2))
    assert placed.starts == {"A": (2, 3), "B": (5, 2)}
    assert placed.stored == {"A": (2, 3), "B": (5, 2), "m": (5,), "A0": (2, 3), "B0": (5, 2)}
    assert start_name("A") == "A0"
    plain = AdaptedSite(LINEAR, lorary.method("dora", r=2))
    assert plain.starts == {}
    assert plain.stored == plain.shapes


def test_what_all_share_is_as_large_as_the_largest_asks_for() -> None:
    vera = lorary.method("vera", r=4)
    placed = [
        AdaptedSite(LINEAR, vera),
        AdaptedSite(TABLE, with_rank(vera, r=2)),
        AdaptedSite(FUSED, with_rank(vera, r=6)),
    ]
    assert shared_shapes(placed) == {"A": (6, 9), "B": (5, 6)}
    assert shared_shapes([AdaptedSite(LINEAR, lorary.method())]) == {}
    assert shared_shapes([]) == {}


def test_an_alpha_for_what_has_none() -> None:
    assert AdaptedSite(LINEAR, lorary.method("vera", r=4)).alpha is None
    assert AdaptedSite(LINEAR, lorary.method("vera", r=4)).scale == 1.0
    with pytest.raises(TypeError):
        with_rank(lorary.method("vera"), alpha=3)
    assert with_rank(lorary.method("melora", r=3, n=2), r=5) == lorary.method("melora", r=5, n=2)


def test_the_components_of_a_site_are_never_missing() -> None:
    method = lorary.method("dora", r=2, alpha=6)
    placed = AdaptedSite(LINEAR, method)
    assert (placed.delta, placed.init, placed.join) == (method.delta, method.init, method.join)
    assert adaptation(method).scale == method.scale
    with pytest.raises(MethodError, match="only base parameters train"):
        _ = AdaptedSite(LINEAR, lorary.method("bitfit")).shapes
