"""Where the sites of a model stand: each is of a module kind, in a layer that has a number.

`model.layers.3.self_attn.q_proj` is of the kind `q_proj` and in layer 3. Nothing but names is looked at.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Path = tuple[str, ...]
NUMBER = "#"  # what stands in a kind for the numbers in which its members differ


@dataclass(frozen=True)
class ModulePosition:
    """Where a site stands.

    Args:
        kind: its module kind: as much of the path's end, numbers left out, as tells it from all other kinds.
        layer: the numbers in its path: one for most models; two where stages hold blocks, or blocks experts; none for
            a layer that there is once, such as the head.
    """

    kind: str
    layer: tuple[int, ...]


def module_positions(names: Iterable[str]) -> dict[str, ModulePosition]:
    """Where sites stand, by their names.

    >>> [cell.kind for cell in cells(["layer.0.output.dense", "layer.0.inner.dense", "head"]).values()]
    ['output.dense', 'inner.dense', 'head']
    """
    alike: dict[Path, list[Path]] = {}
    names = list(dict.fromkeys(names))
    for name in names:
        path = tuple(name.split("."))
        alike.setdefault(tuple(NUMBER if part.isdigit() else part for part in path), []).append(path)
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for shape, members in alike.items():
        kind, places = _told_apart(shape, members)
        found |= {".".join(path): (kind, tuple(int(path[i]) for i in places)) for path in members}
    short = _shortest({kind for kind, _ in found.values()})
    return {name: ModulePosition(short[found[name][0]], found[name][1]) for name in names}


def _told_apart(shape: Path, members: list[Path]) -> tuple[Path, list[int]]:
    """The kind of paths that differ in numbers only, and where the numbers that count are.

    The first one is the layer's. A later one counts where the paths differ in it: T5's `layer.0.SelfAttention` is the
    same place in every block.
    """
    numbers = [i for i, part in enumerate(shape) if part == NUMBER]
    places = numbers[:1] + [i for i in numbers[1:] if len({path[i] for path in members}) > 1]
    return tuple(part if i in places else members[0][i] for i, part in enumerate(shape)), places


def _shortest(kinds: set[Path]) -> dict[Path, str]:
    """For each kind the shortest end of its path that no other kind ends in."""
    found = {}
    for kind in kinds:
        ends = (kind[-n:] for n in range(1, len(kind)))
        alone = (end for end in ends if sum(other[-len(end) :] == end for other in kinds) == 1)
        found[kind] = ".".join(next(alone, kind))
    return found
