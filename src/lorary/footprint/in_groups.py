"""What attention in groups (S²) keeps, in the names of `block`: the groups of each half of the heads are products of
their own, whose outputs are put together to what the next layer reads."""

from __future__ import annotations

from lorary.attention import ends, group_size
from lorary.footprint.architecture import Architecture
from lorary.footprint.workload import Workload


def repeats(a: Architecture) -> bool:
    """Whether keys and values are repeated for their heads, because one of them serves heads of both halves."""
    return a.K < a.Q and a.K // a.head_width % 2 == 1


def kept(a: Architecture, work: Workload) -> dict[str, int]:
    """Bytes that a block keeps for the product of the scores, beside queries, keys and values themselves."""
    width = a.Q + 2 * (a.Q if repeats(a) else a.K)
    if work.padding:  # every group is gathered, and has the room of the longest
        tokens = sum(_rooms(a, work))
        copies = tokens * width * work.e // 2
    else:  # a view, but for groups of several rows that do not fill them
        tokens = 2 * work.tokens
        copies = work.batch * sum(_copied(a, work)) * width * work.e // 2 if work.batch > 1 else 0
    return {
        "groups": copies,
        "attended in groups": tokens * a.Q * work.e // 2,
        "sums of exponentials": 4 * tokens * a.n // 2,
    }


def places(a: Architecture, work: Workload) -> int:
    """Bytes that say where the groups of a padded batch are, once for all blocks."""
    return 8 * (5 * work.tokens + sum(_rooms(a, work))) + work.tokens if work.padding else 0


def _firsts(a: Architecture, work: Workload) -> tuple[int, tuple[int, int]]:
    """(G, the tokens before the second group of each half)."""
    size = group_size(work.length, a.groups)
    return size, (size, size // 2 or size)


def _rooms(a: Architecture, work: Workload) -> list[int]:
    """For each half, the tokens for which there is room in its groups."""
    size, firsts = _firsts(a, work)
    return [work.batch * len(ends(work.length, size, first)) * size for first in firsts]


def _copied(a: Architecture, work: Workload) -> list[int]:
    """For each half, the tokens of a row that are in groups of full size which do not fill it."""
    size, firsts = _firsts(a, work)
    found = []
    for first in firsts:
        full = (work.length - first % size) // size
        found.append(full * size if full > 1 and full * size != work.length else 0)
    return found
