"""The union of presets: which of several components of an axis counts, and when two contradict each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lorary.errors import Diagnostic
from lorary.spec._checks import braces
from lorary.spec.interfaces import COMPONENTS

# axis -> how two presets that both set it unite; on every other axis only one may
_UNITES: dict[str, Callable[[Any, Any], Any]] = {
    "frozen": lambda a, b: frozenset(a) | frozenset(b),
    "rules": lambda a, b: (*a, *b),
    "full": lambda a, b: tuple(sorted({*a, *b})),
}


class PresetUnion:
    """Components by axis, from several sources: presets by their names, and "you" for explicit arguments."""

    def __init__(self) -> None:
        self.components: dict[str, Any] = {}
        self.sources: dict[str, str] = {}
        self.problems: list[Diagnostic] = []

    def add(self, source: str, components: Mapping[str, Any]) -> None:
        """Add a source's components. They replace LoRA's, which are the defaults."""
        for axis, value in components.items():
            old, before = self.components.get(axis), self.sources.get(axis, "lora")
            if axis == "lr" and old is not None:
                twice = sorted(set(dict(old)) & set(dict(value)))
                self.problems += [Diagnostic("lr", f"{before} and {source} both set the rate of {r}") for r in twice]
                value = dict(old) | dict(value)
            elif axis in ("frozen", "full") and old and (redundant := _redundant(axis, before, old, source, value)):
                self.problems.append(redundant)
            elif old is not None and axis in _UNITES:
                value = _UNITES[axis](old, value)
            elif before != "lora":
                what = f"{sets(before, _brief(old, value))}; {sets(source, _brief(value, old))}"
                self.problems.append(Diagnostic(axis, what, "a method has one component on this axis"))
                continue
            self.components[axis] = value
            self.sources[axis] = source if before == "lora" else f"{before} + {source}"


def sets(source: str, component: Any) -> str:
    """`lora sets Kaiming`, `you set Kaiming`."""
    return f"{source} {'set' if source == 'you' else 'sets'} {component}"


def _brief(component: Any, other: Any) -> Any:
    """A component's name, if that distinguishes it from the other one."""
    distinct = type(component) is not type(other) and COMPONENTS.get(type(component).__name__) is type(component)
    return type(component).__name__ if distinct else component


def _redundant(axis: str, before: str, old: Any, source: str, value: Any) -> Diagnostic | None:
    """The error of a source that adds nothing to the other one, in either order."""
    for less, some, more, everything in ((source, value, before, old), (before, old, source, value)):
        if axis == "frozen" and frozenset(some) <= frozenset(everything):
            what = f"{braces(some)}, which {less} would freeze, is frozen by {more} already"
        elif axis == "full" and "*" in everything:
            what = f"{', '.join(some)}, which {less} would train, trains with everything of {more} already"
        else:
            continue
        return Diagnostic(axis, what, "leave it out: it would change nothing")
    return None
