"""Which presets go together: one verdict for every pair, which the tests hold to be true and the pages show.

What a pair makes is decided by the words alone. This table says what was meant: `tests/test_combinations.py` trains
every pair that it allows and sees the others refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorary import methods  # noqa: F401 (registers the presets)
from lorary.errors import MethodError
from lorary.preset import PRESETS, method

# Y: they go together. r: they do, with a restriction, below. N: refused, for the reason that the refusal gives.
# One letter for every preset further down the list, in its order.
_TABLE = {
    "lora": "Y Y Y Y Y Y Y Y Y Y Y Y Y Y Y Y N",
    "rslora": "Y Y Y Y N Y Y N r Y N Y Y Y Y N",
    "lora+": "N Y r N r r N Y r r Y Y Y Y N",
    "lora-fa": "Y r N Y Y N Y Y N Y r Y Y N",
    "qlora": "Y r r r Y Y Y Y Y Y Y r N",
    "dora": "N Y Y Y Y Y N N N Y Y N",
    "glora": "N N N N N N N N Y N N",
    "pissa": "N N N N N N N Y Y N",
    "olora": "N N N N N N Y Y N",
    "vera": "N N N N N Y Y N",
    "melora": "N N N N Y Y N",
    "multilora": "N N N Y Y N",
    "adalora": "N N Y Y N",
    "delta-lora": "N Y Y N",
    "o-lora": "r r N",
    "longlora": "Y N",
    "bitfit": "N",
    "full": "",
}

_RESTRICTIONS = {
    ("rslora", "melora"): "the rank in the root is that of one small LoRA",
    ("lora+", "dora"): "the ratio is between B and A; m learns at A's rate",
    ("lora+", "pissa"): "the ratio was derived for a B that starts at zero: tune it anew",
    ("lora+", "olora"): "the ratio was derived for a B that starts at zero: tune it anew",
    ("lora+", "multilora"): "the ratio was derived for a B that starts at zero: tune it anew; gamma learns at A's rate",
    ("lora+", "adalora"): "the ratio is between P and Q, and was derived for a B that starts at zero: tune it anew; "
    "E learns at Q's rate",
    ("lora-fa", "dora"): "most of the memory saved is lost: the magnitude's gradient needs the layer's output",
    ("lora-fa", "o-lora"): "with hard=True alone: A is frozen where it starts, in the complement of the earlier tasks",
    ("qlora", "glora"): "where A is a vector, a scalar or none, and acts on the output: there is no dense weight",
    ("qlora", "pissa"): "on a base in full precision alone: what is left of each weight is packed",
    ("qlora", "olora"): "on a base in full precision alone: what is left of each weight is packed; set divide=True, or "
    "with a large s there is more left than there was",
    ("qlora", "bitfit"): "the biases train, beside weights that are packed",
    ("o-lora", "longlora"): "for the last task alone: embeddings and norms that were trained cannot stay beneath a "
    "further one",
    ("o-lora", "bitfit"): "for the last task alone: biases that were trained cannot stay beneath a further one",
}

# What has to be said besides, where two presets go together with a restriction.
_WITH: dict[tuple[str, str], dict[str, Any]] = {
    ("lora-fa", "o-lora"): {"hard": True},
    ("qlora", "glora"): {"A": "vector"},
}


@dataclass(frozen=True)
class Verdict:
    """Whether two presets go together.

    Args:
        letter: `Y`, `r` (with a restriction) or `N`.
        why: the restriction, or the reasons of the refusal; empty for `Y`.
        options: what has to be said for them to go together.
    """

    letter: str
    why: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


def verdict(one: str, other: str) -> Verdict:
    """Whether two presets go together, in either order. A preset without a row is judged by its words alone."""
    if one not in _TABLE or other not in _TABLE:
        why = refusal(one, other)
        return Verdict("N", "; ".join(why)) if why else Verdict("Y")
    names = list(_TABLE)
    first, second = sorted((one, other), key=names.index)
    letter = dict(zip(names[names.index(first) + 1 :], _TABLE[first].split(), strict=True))[second]
    if letter == "N":
        return Verdict(letter, "; ".join(refusal(first, second)))
    if letter == "r":
        return Verdict(letter, _RESTRICTIONS[first, second], _WITH.get((first, second), {}))
    return Verdict(letter)


def refusal(*names: str, **options: Any) -> list[str]:
    """Why these presets make no method, in the words of the refusal; empty where they make one."""
    try:
        method(*names, **options)
    except MethodError as error:
        return [problem.what for problem in error.problems]
    return []


def partners(name: str) -> dict[str, Verdict]:
    """The verdict on a preset with every other one, in the order of the presets."""
    return {other: verdict(name, other) for other in PRESETS if other != name}
