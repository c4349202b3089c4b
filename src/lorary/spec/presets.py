"""Presets: a paper's name for some words, and `method`, which unites them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lorary.errors import Diagnostic, MethodError, did_you_mean
from lorary.spec.interfaces import COMPONENTS
from lorary.spec.method import AXES, Method, braces


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
    """A paper's name for some words.

    Args:
        name: the name in configurations and on the command line, such as `lora+`.
        words: the function that gives the words, axis -> word; its parameters are the preset's options.
        citation: the paper.
        adapts: whether it learns a delta beside the frozen weight; False if only base weights train.
        lr: the peak learning rate to start from when fine-tuning a language model with AdamW.
        when: one sentence that says when to use it.
        restrictions: earlier preset -> the reservation about combining with it. Presets that cannot combine are not
            listed: `method` refuses them.
        answers: answer to `lorary methods --choose`, such as `memory=tight` -> the options to propose.
    """

    name: str
    components: Callable[..., dict[str, Any]]
    citation: str
    adapts: bool = True
    lr: float = 2e-4
    when: str = ""
    restrictions: Mapping[str, Restriction] = field(default_factory=dict, hash=False)
    answers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)

    @property
    def summary(self) -> str:
        """The first line of its docstring: the equation."""
        return (inspect.getdoc(self.components) or "").partition("\n")[0]

    @property
    def parameters(self) -> dict[str, Any]:
        """Its options and their defaults."""
        return {name: p.default for name, p in inspect.signature(self.components).parameters.items()}

    @property
    def meanings(self) -> dict[str, str]:
        """Its options and their meanings, from its docstring."""
        _, _, text = (inspect.getdoc(self.components) or "").partition("Args:")
        found = re.findall(r"^    (\w+): (.+(?:\n      .+)*)", text, re.MULTILINE)
        return {name: " ".join(words.split()) for name, words in found}

    @property
    def about(self) -> str:
        """The docstring of its file, which begins with `Title: equation`."""
        return inspect.getdoc(inspect.getmodule(self.components)) or ""

    @property
    def title(self) -> str:
        """The method's name as its paper writes it: the beginning of its file's docstring."""
        title, colon, _ = self.about.partition(":")
        return title if colon and "\n" not in title else self.name

    @property
    def year(self) -> int | None:
        """The year of the paper; None if no paper is cited."""
        return _year(self.citation)

    @property
    def changes(self) -> tuple[str, ...]:
        """The axes on which it speaks, in plain English."""
        return tuple(_IN_PLAIN_WORDS[axis] for axis in self.components())


@dataclass(frozen=True)
class PlanFunction:
    """A paper's method that is no preset but a function of a plan: it chooses layers for another method.

    Args:
        name: its name, such as `lora-drop`.
        about: its file's docstring, whose first line is `Title: equation.`
        citation: the paper.
        when: one sentence that says when to use it.
        changes: what it decides, in plain English.
        what: why `lorary.method` refuses its name.
        say: how to ask for it.
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
    section: Mapping[str, Any]
    answers: frozenset[str]
    why_not: Callable[[Method], list[Diagnostic]]

    @property
    def title(self) -> str:
        """The method's name as its paper writes it."""
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


# What a word of each axis decides.
_IN_PLAIN_WORDS = {
    "delta": "what is learnt",
    "init": "where it starts",
    "scale": "its size",
    "join": "how it joins the weight",
    "frozen": "what stays frozen",
    "lr": "how fast each part learns",
    "rules": "what happens while training",
    "storage": "how the weight is kept",
    "full": "which base parameters train",
    "dropout": "dropout",
    "context": "how far it reads",
}

PRESETS: dict[str, Preset] = {}
FUNCTIONS: dict[str, PlanFunction] = {}
_ALIASES: dict[str, str] = {}
F_ = TypeVar("F_", bound=Callable[..., dict[str, Any]])


def preset(
    name: str,
    *,
    citation: str,
    aliases: Sequence[str] = (),
    adapts: bool = True,
    lr: float = 2e-4,
    when: str = "",
    restrictions: Mapping[str, Restriction | str] | None = None,
    answers: Mapping[str, Mapping[str, Any]] | None = None,
) -> Callable[[F_], F_]:
    """Register words under a paper's name, for `lorary.method`, the command line, files, docs and the laws.

    The arguments are those of `Preset`; a restriction without options may be its sentence alone.
    """
    restricted = {k: Restriction(v) if isinstance(v, str) else v for k, v in (restrictions or {}).items()}

    def register(words: F_) -> F_:
        if name in PRESETS:
            raise TypeError(f"there is a preset {name} already")
        PRESETS[name] = Preset(name, words, citation, adapts, lr, when, restricted, answers or {})
        for alias in (name, *aliases):
            _ALIASES.setdefault(_plain(alias), name)
        return words

    return register


def register_non_preset(function: PlanFunction) -> None:
    """Register a paper's method that is a function of a plan; `lorary.method` then says so."""
    FUNCTIONS[function.name] = function


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name.lower())


def _known(name: str) -> str | None:
    """The preset of that name; hyphens count if they distinguish two: O-LoRA is not OLoRA."""
    exact = re.sub(r"[\s_]", "-", name.strip().lower())
    return exact if exact in PRESETS else _ALIASES.get(_plain(name))


# What two presets may both say, because the union is meant; on any other axis one must be silent.
_UNITES: dict[str, Callable[[Any, Any], Any]] = {
    "frozen": lambda a, b: frozenset(a) | frozenset(b),
    "rules": lambda a, b: (*a, *b),
    "full": lambda a, b: tuple(sorted({*a, *b})),
}


def method(*names: str, **options: Any) -> Method:
    """The method that some presets and words make together.

    >>> print(method("lora", "rslora", r=16, alpha=32).scale)
    BySqrtRank(alpha=32)

    Args:
        names: presets, such as "lora", "rslora", "lora+"; what they are silent about is LoRA's.
        options: the presets' parameters (`r`, `alpha`, `dropout`, `ratio`, ...) and words by axis (`init=Gaussian()`).

    Raises:
        MethodError: unknown names or options (with the nearest known one), two that speak on the same axis, and
            every contradiction between the words.
    """
    problems: list[Diagnostic] = []
    speaking = _speaking(_chosen(names, problems))
    known = {option for p in speaking for option in p.parameters}
    for option in sorted(set(options) - known - set(AXES)):
        hint = did_you_mean(option, sorted(known | set(AXES)))
        problems.append(Diagnostic(option, f"is no option of {' + '.join(p.name for p in speaking)}", hint))
    if problems:
        raise MethodError("invalid method:", problems)
    said: dict[str, tuple[str, Any]] = {}
    for p in speaking:
        words = p.components(**{k: v for k, v in options.items() if k in p.parameters})
        _unite(said, p.name, words, problems)
    _unite(said, "you", {k: v for k, v in options.items() if k in AXES and k not in known}, problems)
    speaker, scale = said.get("scale", ("", None))
    if "alpha" in options and not hasattr(scale, "alpha"):
        problems.append(Diagnostic("alpha", f"{_says(speaker, scale)}, which has no alpha", "leave it out"))
    if problems:
        raise MethodError("invalid method:", problems)
    return Method(**{axis: value for axis, (_, value) in said.items()})


def resolve_presets(names: Sequence[str]) -> tuple[Preset, ...]:
    """The presets that `method(*names)` unites, in the order in which they speak: LoRA first where any adapts.

    Raises:
        MethodError: a name that lorary does not know.
    """
    problems: list[Diagnostic] = []
    chosen = _chosen(names, problems)
    if problems:
        raise MethodError("invalid method:", problems)
    return tuple(_speaking(chosen))


def _speaking(chosen: Sequence[Preset]) -> list[Preset]:
    adapts = any(p.adapts for p in chosen) or not chosen
    return ([PRESETS["lora"]] if adapts else []) + [p for p in chosen if p.name != "lora"]


def _chosen(names: Sequence[str], problems: list[Diagnostic]) -> list[Preset]:
    chosen: list[Preset] = []
    for name in names:
        known = _known(name) if isinstance(name, str) else None
        function = next((f for f in FUNCTIONS.values() if _plain(f.name) == _plain(str(name))), None)
        if function:
            problems.append(Diagnostic(repr(name), function.what, f"write {function.say}"))
        elif known is None:
            problems.append(
                Diagnostic(repr(name), "is no method that lorary knows", did_you_mean(str(name), list(PRESETS)))
            )
        elif PRESETS[known] not in chosen:
            chosen.append(PRESETS[known])
    return chosen


def _unite(said: dict[str, tuple[str, Any]], speaker: str, words: dict[str, Any], problems: list[Diagnostic]) -> None:
    for axis, value in words.items():
        before, old = said.get(axis, ("lora", None))
        if axis == "lr" and old is not None:
            twice = sorted(set(dict(old)) & set(dict(value)))
            problems += [Diagnostic("lr", f"{before} and {speaker} both set the rate of {role}") for role in twice]
            value = dict(old) | dict(value)
        elif axis in ("frozen", "full") and old and (idle := _idle(axis, before, old, speaker, value)):
            problems.append(idle)
        elif old is not None and axis in _UNITES:
            value = _UNITES[axis](old, value)
        elif before != "lora":  # LoRA's own words are the defaults: whoever speaks replaces them
            what = f"{_says(before, _brief(old, value))}; {_says(speaker, _brief(value, old))}"
            problems.append(Diagnostic(axis, what, "a method has one word on this axis"))
            continue
        said[axis] = (speaker if before == "lora" else f"{before} + {speaker}", value)


def _says(speaker: str, word: Any) -> str:
    return f"{speaker} {'said' if speaker == 'you' else 'says'} {word}"


def _brief(word: Any, other: Any) -> Any:
    """A word by its name, where that tells it from the other one."""
    known = type(word) is not type(other) and COMPONENTS.get(type(word).__name__) is type(word)
    return type(word).__name__ if known else word


def _idle(axis: str, before: str, old: Any, speaker: str, value: Any) -> Diagnostic | None:
    """Where one of two speakers says nothing that the other one has not said, whichever came first."""
    for less, some, more, everything in ((speaker, value, before, old), (before, old, speaker, value)):
        if axis == "frozen" and frozenset(some) <= frozenset(everything):
            what = f"{braces(some)}, which {less} would freeze, is frozen by {more} already"
        elif axis == "full" and "*" in everything:
            what = f"{', '.join(some)}, which {less} would train, trains with everything of {more} already"
        else:
            continue
        return Diagnostic(axis, what, "leave it out: it would change nothing")
    return None


def presets() -> dict[str, Preset]:
    """All presets by name, in the order of the methods' files."""
    return dict(PRESETS)
