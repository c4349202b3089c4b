"""ModulePosition: module kind and layer number of a site, from its name alone.

`model.layers.3.self_attn.q_proj` has the kind `q_proj` and is in layer 3.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Path = tuple[str, ...]
NUMBER = "#"  # placeholder in a kind for the layer numbers


@dataclass(frozen=True)
class ModulePosition:
    """The position of a site in its model.

    Args:
        kind: the shortest end of its path, without layer numbers, that identifies its module kind.
        layer: the layer numbers in its path: one in most models; two for stages of blocks or blocks of experts; none
            for a single layer such as the head.
    """

    kind: str
    layer: tuple[int, ...]


def module_positions(names: Iterable[str]) -> dict[str, ModulePosition]:
    """name -> position, for the names of all sites of a model.

    >>> names = ["layer.0.output.dense", "layer.0.inner.dense", "head"]
    >>> [position.kind for position in module_positions(names).values()]
    ['output.dense', 'inner.dense', 'head']
    """
    alike: dict[Path, list[Path]] = {}
    names = list(dict.fromkeys(names))
    for name in names:
        path = tuple(name.split("."))
        alike.setdefault(tuple(NUMBER if part.isdigit() else part for part in path), []).append(path)
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for shape, members in alike.items():
        kind, places = _kind_and_numbers(shape, members)
        found |= {".".join(path): (kind, tuple(int(path[i]) for i in places)) for path in members}
    short = _shortest_unique_ends({kind for kind, _ in found.values()})
    return {name: ModulePosition(short[found[name][0]], found[name][1]) for name in names}


def _kind_and_numbers(shape: Path, members: list[Path]) -> tuple[Path, list[int]]:
    """The kind of paths that differ in numbers only, and the indices of their layer numbers.

    The first number is the layer's. A later one counts only if it differs between the paths: T5's
    `layer.0.SelfAttention` has the same 0 in every block.
    """
    numbers = [i for i, part in enumerate(shape) if part == NUMBER]
    places = numbers[:1] + [i for i in numbers[1:] if len({path[i] for path in members}) > 1]
    return tuple(part if i in places else members[0][i] for i, part in enumerate(shape)), places


def _shortest_unique_ends(kinds: set[Path]) -> dict[Path, str]:
    """kind -> the shortest end of its path that is not the end of another kind."""
    ends: dict[Path, str] = {}
    for kind in kinds:
        candidates = (kind[-n:] for n in range(1, len(kind)))
        unique = (end for end in candidates if sum(other[-len(end) :] == end for other in kinds) == 1)
        ends[kind] = ".".join(next(unique, kind))
    return ends
