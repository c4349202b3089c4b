"""Layer ranges: `layers="0-15"` adapts these layers of a stack of blocks only.

The index of a layer is the first number of its path that counts the entries of an `nn.ModuleList`, and the path before
it names the stack: `model.layers.7.mlp.experts.3.w1` is in layer 7 of `model.layers`. (PEFT's `layers_to_transform`
takes the first number too.) A model without module lists counts by the first number there is. Where targets are in
several stacks, as in an encoder-decoder or a vision-language model, the range must name one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lorary.errors import Diagnostic, suggestion
from lorary.model._presets import PRESETS
from lorary.model.patterns import is_expression, matches
from lorary.model.scan import Scan
from lorary.model.targets import abbreviated

Ranges = int | str | Sequence[int | str]
Layers = Ranges | Mapping[str, Ranges]  # ranges of the only stack, or stack -> ranges

_RANGE = re.compile(r"(-?\d{1,9})(?:\s*-\s*(-?\d{1,9}))?")
_FORM = "write numbers and ranges, such as 0-15 or 0-3,8,-1"


def normalised_layers(value: Any) -> str | dict[str, str]:
    """Layer ranges as text, or stack -> text.

    >>> normalised_layers([0, 1, "4-7"]), normalised_layers({"decoder.block": -1})
    ('0,1,4-7', {'decoder.block': '-1'})

    Raises:
        ValueError: what is wrong.
    """
    if isinstance(value, Mapping):
        if not value or not all(isinstance(stack, str) and stack for stack in value):
            raise ValueError("names no stack of layers")
        return {stack: _text(ranges) for stack, ranges in value.items()}
    return _text(value)


def _text(value: Any) -> str:
    items = [value] if isinstance(value, int | str) else value
    if not isinstance(items, Sequence) or not items:
        raise ValueError(f"is {value!r}: {_FORM}")
    if wrong := [item for item in items if isinstance(item, bool) or not isinstance(item, int | str)]:
        raise ValueError(f"holds {wrong[0]!r}: {_FORM}")
    text = ",".join(part.strip() for item in items for part in str(item).split(","))
    for first, last, part in _parsed(text):
        if (first < 0) == (last < 0) and first > last:
            raise ValueError(f"holds `{part}`, which ends before it begins")
    return text


def _parsed(ranges: str) -> Iterator[tuple[int, int, str]]:
    """(first, last, text) of each range.

    Raises:
        ValueError: one is malformed.
    """
    for part in ranges.split(","):
        found = _RANGE.fullmatch(part)
        if found is None:
            raise ValueError(f"holds `{part}`: {_FORM}")
        yield int(found[1]), int(found[2] or found[1]), part


@dataclass
class LayerChoice:
    """The sites that `layers` leaves.

    Args:
        kept: their paths.
        problems: every problem.
        notes: the layers that are in no chosen stack.
    """

    kept: set[str]
    problems: list[Diagnostic] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def choose_layers(scan: Scan, names: Sequence[str], layers: Layers, targets: Iterable[str]) -> LayerChoice:
    """The paths among `names`, the layers that `targets` match, that lie in the ranges `layers`."""
    try:
        ranges = normalised_layers(layers)
    except ValueError as error:
        return LayerChoice(set(names), [Diagnostic("layers", str(error))])
    choice = LayerChoice(set())
    places = _places(scan, names, None if isinstance(ranges, str) else ranges)
    stacks = list(dict.fromkeys(prefix for _, prefix, _ in places.values()))
    if isinstance(ranges, str) and len(stacks) > 1:
        listed = ", ".join(f"`{stack}` (0 to {_size(scan, stack) - 1})" for stack in stacks)
        what = f"`{ranges}` could count in any of {len(stacks)} stacks: {listed}"
        return LayerChoice(set(), [Diagnostic("layers", what, f"name the stack, as in {{{stacks[0]}: {ranges}}}")])
    found = {key for key, _, _ in places.values()}
    choice.problems += [_unknown(stack, names) for stack in ranges if isinstance(ranges, dict) and stack not in found]
    indices = {
        (key, prefix): _indices(prefix, _size(scan, prefix), ranges if isinstance(ranges, str) else ranges[key], choice)
        for key, prefix in dict.fromkeys((key, prefix) for key, prefix, _ in places.values())
    }
    choice.kept = {name for name, (key, prefix, number) in places.items() if number in indices[key, prefix]}
    if not choice.problems:
        choice.problems += _emptied(choice.kept, names, targets)
        outside = abbreviated(name for name in names if name not in places)
        choice.notes += [f"`layers` leaves out {outside}: not in the stack that it counts in"] if outside else []
    return choice


def _places(scan: Scan, names: Sequence[str], stacks: Iterable[str] | None) -> dict[str, tuple[str, str, int]]:
    """Path -> (the key of `layers` that names its stack, the stack's path, its index there), if it is in one."""
    numbered = {name: list(_numbers(name)) for name in names}
    places = {}
    if stacks is None:
        lists = {
            name: [place for place in found if isinstance(scan.module(place[0]), nn.ModuleList)]
            for name, found in numbered.items()
        }
        counted = lists if any(lists.values()) else numbered
        return {name: ("", *found[0]) for name, found in counted.items() if found}
    for name, found in numbered.items():
        hits = ((stack, *place) for stack in stacks for place in found if matches(stack, place[0]))
        if hit := next(hits, None):
            places[name] = hit
    return places


def _numbers(path: str) -> Iterator[tuple[str, int]]:
    """(the path before a number, the number) for each component that is one."""
    components = path.split(".")
    return ((".".join(components[:i]), int(part)) for i, part in enumerate(components) if part.isdecimal())


def _size(scan: Scan, stack: str) -> int:
    """The number of layers in a stack, adapted or not."""
    return 1 + max(number for path in scan.modules for prefix, number in _numbers(path) if prefix == stack)


def _indices(stack: str, size: int, ranges: str, choice: LayerChoice) -> set[int]:
    """The layers of these ranges; negative ones count from the end."""
    chosen: set[int] = set()
    for first, last, text in _parsed(ranges):
        first, last = (end + size if end < 0 else end for end in (first, last))
        if 0 <= first <= last < size:
            chosen |= set(range(first, last + 1))
        else:
            what = f"`{text}` is not in `{stack}`, which has the layers 0 to {size - 1}"
            choice.problems.append(Diagnostic("layers", what))
    return chosen


def _emptied(kept: set[str], names: Sequence[str], targets: Iterable[str]) -> Iterator[Diagnostic]:
    """The named targets that `layers` leaves without a layer."""
    for entry in targets:
        if entry in PRESETS:
            continue
        pattern = entry if is_expression(entry) else entry.partition("[")[0]
        hit = [name for name in names if matches(pattern, name)]
        if hit and not kept.intersection(hit):
            yield Diagnostic("layers", f"leaves nothing of `{entry}`: {abbreviated(hit)}", "leave one of the two out")
    if not kept:
        yield Diagnostic("layers", "leaves no target: none is in a stack of layers")


def _unknown(stack: str, names: Sequence[str]) -> Diagnostic:
    known = list(dict.fromkeys(prefix for name in names for prefix, _ in _numbers(name)))
    fix = suggestion(stack, known) or f"the targets are in {', '.join(known) or 'none'}"
    return Diagnostic("layers", f"`{stack}` is not a stack of layers with a target in it", fix)
