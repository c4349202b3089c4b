"""A pairwise covering selection: faults that only some combinations show are mostly those of two values together."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

Case = TypeVar("Case")
Value = tuple[str, str]  # an axis and a value on it, such as ("dtype", "float32")


def pairs(values: Iterable[Value]) -> set[tuple[Value, ...]]:
    """Every two of a case's values. A case may have several values on one axis: the presets of a method."""
    return set(itertools.combinations(sorted(values), 2))


def cover(cases: Mapping[Case, Collection[Value]]) -> list[Case]:
    """A small selection of `cases` in which every pair of values occurs that occurs in any of them.

    The greedy choice: first the cases with many pairs that no chosen case has, then those with fewer.
    """
    open_pairs = {case: pairs(values) for case, values in cases.items()}
    chosen: list[Case] = []
    covered: set[tuple[Value, ...]] = set()
    for gain in range(max(map(len, open_pairs.values()), default=0), 0, -1):
        for case in list(open_pairs):
            open_pairs[case] -= covered
            if len(open_pairs[case]) >= gain:
                chosen.append(case)
                covered |= open_pairs.pop(case)
    return chosen
