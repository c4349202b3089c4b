"""Which method to take: a few questions, and the configuration that the answers lead to.

Every preset lists the answers for which it is proposed (`lorary.spec.presets.Preset.answers`), so that a method of another
package takes part. Here are only the questions, and the settings that an answer needs whatever the method is.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from lorary.errors import ConfigError, Diagnostic, MethodError, did_you_mean
from lorary.methods.compatibility import restriction_of, verdict
from lorary.spec.presets import FUNCTIONS, PRESETS, PlanFunction, Preset, method


@dataclass(frozen=True)
class Question:
    """One question: its text, and answer -> meaning; the first answer is the default and proposes nothing."""

    text: str
    answers: Mapping[str, str]

    @property
    def default(self) -> str:
        return next(iter(self.answers))


# The methods are proposed in this order, and an earlier one excludes those that do not combine with it.
QUESTIONS = {
    "adapters": Question(
        "How many adapters will there be on one base?",
        {"few": "one, or a few", "many": "very many, so that each must be tiny"},
    ),
    "tasks": Question(
        "How many tasks does one adapter learn?",
        {"one": "one", "mixed": "several at once", "sequence": "one after another"},
    ),
    "memory": Question(
        "Does the model fit into memory, with a batch in training?",
        {
            "enough": "yes",
            "tight": "the weights do, the activations hardly",
            "short": "not even its weights in 16 bits",
        },
    ),
    "quality": Question("Is the best result worth longer steps?", {"good": "LoRA's is good enough", "best": "yes"}),
    "convergence": Question("Must it converge in few steps?", {"usual": "no", "fast": "yes"}),
    "layers": Question(
        "Do some layers matter more than others?",
        {
            "alike": "no, or nobody knows",
            "differ": "yes; training is to find out",
            "search": "yes, and there is time to search for the needs of each",
        },
    ),
    "context": Question("Are the texts longer than the model's context?", {"usual": "no", "long": "yes"}),
}

_LEAN = {"batch_size": 1, "gradient_accumulation_steps": 16, "gradient_checkpointing": True}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "memory=tight": {"training": _LEAN},
    "memory=short": {"training": _LEAN, "model": {"dtype": "bfloat16"}},
    "layers=search": {"data": {"validation": "builtin:docstrings"}},
    "context=long": {"training": {"gradient_checkpointing": True}, "data": {"max_length": 8192}},
}


@dataclass
class Choice:
    """The result: presets, the sections of the configuration, and the remarks above it."""

    presets: list[Preset] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    functions: list[PlanFunction] = field(default_factory=list)
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return [preset.name for preset in self.presets]

    @property
    def method(self) -> dict[str, Any]:
        """The `method` section of the configuration."""
        names = self.names or ["lora"]
        section: dict[str, Any] = {"name": names if len(names) > 1 else names[0]}
        section |= {"options": self.options} if self.options else {}
        return section | {key: value for function in self.functions for key, value in function.section.items()}

    def yaml(self) -> str:
        """A configuration for `lorary train`, with the reasons above it."""
        from lorary.train.config.yaml_source import dump

        chosen: list[Preset | PlanFunction] = [*self.presets, *self.functions]
        why = [f"{found.title}: {found.when}" for found in chosen]
        said = (why or [f"LoRA: {PRESETS['lora'].when}"]) + self.remarks + ["Put your own model and data here."]
        head = [textwrap.fill(text, 100, initial_indent="# ", subsequent_indent="#   ") for text in said]
        tree = {"model": {"id": "builtin:base"}, "method": self.method, "data": {"train": "builtin:docstrings"}}
        for name, section in self.sections.items():
            tree[name] = tree.get(name, {}) | section
        return "\n".join(head) + "\n" + dump(tree)


def choose(answers: Mapping[str, str]) -> Choice:
    """The method for these answers; a question without one takes its default.

    Raises:
        ConfigError: unknown questions or answers, all of them.
    """
    said = {key: question.default for key, question in QUESTIONS.items()} | _known(answers)
    choice = Choice()
    for key, answer in said.items():
        given = f"{key}={answer}"
        for name, section in SETTINGS.get(given, {}).items():
            choice.sections.setdefault(name, {}).update(section)
        _propose(choice, given)
    return choice


def _propose(choice: Choice, given: str) -> None:
    """Add the first method for this answer that combines with those chosen before; remark on the others.

    The latest registered comes first: an installed method is one that the user wants to see.
    """
    presets = [preset for preset in reversed(PRESETS.values()) if given in preset.answers]
    functions = [function for function in FUNCTIONS.values() if given in function.answers]
    candidates: list[Preset | PlanFunction] = [*presets, *functions]
    judged = [(found, next(_against(choice, found), "")) for found in candidates]
    refused = takewhile(lambda pair: pair[1], judged)
    choice.remarks += [f"Not {found.title}: {against}." for found, against in refused]
    fitting = [found for found, against in judged if not against]
    choice.remarks += [f"Or {found.title}: {found.when}" for found in fitting[1:]]
    for found in fitting[:1]:
        if isinstance(found, Preset):
            choice.options |= _options(choice, found) | dict(found.answers[given])
            choice.presets.append(found)
        else:
            choice.functions.append(found)


def _against(choice: Choice, found: Preset | PlanFunction) -> Iterator[str]:
    """The reasons against adding a method to those chosen."""
    if isinstance(found, PlanFunction):
        yield from (problem.what for problem in found.why_not(method(*choice.names, **choice.options)))
        return
    for name in choice.names:
        restriction = restriction_of(name, found.name)
        if restriction and not restriction.advised:
            yield restriction.why
    try:
        method(*choice.names, found.name, **(choice.options | _options(choice, found)))
    except MethodError as error:
        yield from (problem.what for problem in error.problems)


def _options(choice: Choice, found: Preset) -> dict[str, Any]:
    """The options that a preset needs beside those chosen."""
    return {key: value for name in choice.names for key, value in verdict(name, found.name).options.items()}


def _known(answers: Mapping[str, str]) -> dict[str, str]:
    problems = []
    for key, answer in answers.items():
        if key not in QUESTIONS:
            problems.append(Diagnostic(key, "is not a question", did_you_mean(key, list(QUESTIONS))))
        elif answer not in QUESTIONS[key].answers:
            fix = "known: " + ", ".join(QUESTIONS[key].answers)
            problems.append(Diagnostic(key, f"{answer!r} does not answer: {QUESTIONS[key].text}", fix))
    if problems:
        raise ConfigError("invalid answers:", problems)
    return dict(answers)
