"""The registry of methods: presets, functions of a plan, and their names."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorary.errors import Diagnostic, did_you_mean
from lorary.spec.method import AXES, Method
from lorary.spec.no_update import NoUpdate


@dataclass(frozen=True)
class Restriction:
    """A reservation about two presets that do combine.

    Args:
        why: the reservation, as the documentation shows it.
        options: options without which the two are refused.
        advised: whether `lorary methods --choose` may propose the two together.
    """

    why: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    advised: bool = True


@dataclass(frozen=True)
class Preset:
    """A paper's name for some components.

    Args:
        name: the name in configurations and on the command line, such as `lora+`.
        components: the function that returns the components, by axis; its parameters are the preset's options.
        citation: the paper.
        adapts: whether it trains a delta beside the frozen weight; False if only base weights train.
        lr: the peak learning rate to start from when fine-tuning a language model with AdamW.
        when: one sentence that says when to use it.
        restrictions: earlier preset -> the reservation about combining with it. Presets that cannot combine are not
            listed: `method` refuses them.
        answers: answer to `lorary methods --choose`, such as `memory=tight` -> the options to propose.
        example: options for the example of its page, if its defaults train nothing.
    """

    name: str
    components: Callable[..., dict[str, Any]]
    citation: str
    adapts: bool = True
    lr: float = 2e-4
    when: str = ""
    restrictions: Mapping[str, Restriction] = field(default_factory=dict, hash=False)
    answers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)
    example: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def summary(self) -> str:
        """The equation: the first line of the function's docstring."""
        return (inspect.getdoc(self.components) or "").partition("\n")[0]

    @property
    def parameters(self) -> dict[str, Any]:
        """Its options and their defaults."""
        return {name: p.default for name, p in inspect.signature(self.components).parameters.items()}

    @property
    def meanings(self) -> dict[str, str]:
        """Its options and their meanings, from the function's docstring."""
        _, _, text = (inspect.getdoc(self.components) or "").partition("Args:")
        found = re.findall(r"^    (\w+): (.+(?:\n      .+)*)", text, re.MULTILINE)
        return {name: " ".join(meaning.split()) for name, meaning in found}

    @property
    def about(self) -> str:
        """The docstring of its file, whose first line is `Title: equation.`"""
        return inspect.getdoc(inspect.getmodule(self.components)) or ""

    @property
    def title(self) -> str:
        """The method's name in its paper, from the docstring of its file."""
        title, colon, _ = self.about.partition(":")
        return title if colon and "\n" not in title else self.name

    @property
    def year(self) -> int | None:
        """The year of the paper; None if no paper is cited."""
        return _year(self.citation)

    @property
    def changes(self) -> tuple[str, ...]:
        """Descriptions of the axes that it sets, without those of an update that it does not have."""
        components = self.components()
        empty = {"delta", "init", "scale"} if components.get("delta") == NoUpdate() else set()
        return tuple(AXES[axis] for axis in components if axis not in empty)


@dataclass(frozen=True)
class PlanFunction:
    """A paper's method that is a function, not a preset: of a plan, or of trained adapters.

    Args:
        name: its name, such as `lora-drop`.
        about: the docstring of its file, whose first line is `Title: equation.`
        citation: the paper.
        when: one sentence that says when to use it.
        changes: what it decides.
        what: why `lorary.method` refuses its name.
        say: how to use it.
        section: the keys of a configuration's `method` section that ask for it.
        answers: answers to `lorary methods --choose` for which it is proposed.
        why_not: the reasons why a method cannot be combined with it.
    """

    name: str
    about: str
    citation: str
    when: str
    changes: str
    what: str
    say: str
    section: Mapping[str, Any] = field(default_factory=dict)
    answers: frozenset[str] = frozenset()
    why_not: Callable[[Method], list[Diagnostic]] = lambda _: []

    @property
    def title(self) -> str:
        """The method's name in its paper."""
        return self.about.partition(":")[0]

    @property
    def summary(self) -> str:
        """The equation."""
        return self.about.partition("\n")[0].partition(": ")[2].rstrip(".")

    @property
    def year(self) -> int | None:
        """The year of the paper."""
        return _year(self.citation)


def _year(citation: str) -> int | None:
    found = re.search(r"\b(?:19|20)\d\d\b(?!\.)", citation)
    return int(found[0]) if found else None


PRESETS: dict[str, Preset] = {}
FUNCTIONS: dict[str, PlanFunction] = {}
_ALIASES: dict[str, str] = {}


def add_preset(preset: Preset, aliases: Sequence[str]) -> None:
    """Register a preset under its name and aliases.

    Raises:
        TypeError: the name is already registered.
    """
    functions = map(_normalised, FUNCTIONS)
    if preset.name in PRESETS or _exact(preset.name) in PRESETS or _normalised(preset.name) in functions:
        raise TypeError(f"the preset {preset.name} is already registered")
    PRESETS[preset.name] = preset
    for alias in (preset.name, *aliases):
        _ALIASES.setdefault(_normalised(alias), preset.name)


def resolve(names: Sequence[str], problems: list[Diagnostic]) -> list[Preset]:
    """The presets of these names, LoRA first unless none of them adapts; errors are added to `problems`."""
    chosen: list[Preset] = []
    functions = {_normalised(name): function for name, function in FUNCTIONS.items()}
    for name in names:
        if function := functions.get(_normalised(str(name))):
            problems.append(Diagnostic(repr(name), function.what, f"write {function.say}"))
        elif found := _find(name) if isinstance(name, str) else None:
            chosen.append(found)
        else:
            hint = did_you_mean(str(name), list(PRESETS))
            problems.append(Diagnostic(repr(name), "is not a method that lorary knows", hint))
    default = [PRESETS["lora"]] if any(p.adapts for p in chosen) or not chosen else []
    return list({p.name: p for p in default + chosen}.values())


def _find(name: str) -> Preset | None:
    """The preset of that name; hyphens count if they distinguish two: O-LoRA is not OLoRA."""
    return PRESETS.get(_exact(name)) or PRESETS.get(_ALIASES.get(_normalised(name), ""))


def _exact(name: str) -> str:
    return re.sub(r"[\s_]", "-", name.strip().lower())


def _normalised(name: str) -> str:
    return re.sub(r"[\s_-]", "", name.lower())
