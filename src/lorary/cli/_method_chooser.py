"""The questions of `lorary methods --choose`, and the configuration that the answers lead to.

Presets list the answers for which they are proposed (`lorary.spec.presets.Preset.answers`), so that installed methods
take part. This module holds the questions, and the settings that an answer needs with any method.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lorary.errors import ConfigError, Diagnostic, did_you_mean
from lorary.methods.compatibility import refusal, restriction_of, verdict
from lorary.spec.presets import FUNCTIONS, PRESETS, PlanFunction, Preset, method


class Question(NamedTuple):
    """A question and its answers (answer -> meaning); the first answer is the default and proposes nothing."""

    text: str
    answers: Mapping[str, str]

    @property
    def default(self) -> str:
        return next(iter(self.answers))


# In this order: a method proposed by an earlier answer excludes those that do not combine with it.
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
        {"enough": "yes", "tight": "the weights do, the activations hardly", "short": "not even its 16-bit weights"},
    ),
    "quality": Question("Is the best result worth longer steps?", {"good": "LoRA's is good enough", "best": "yes"}),
    "convergence": Question("Must it converge in few steps?", {"usual": "no", "fast": "yes"}),
    "layers": Question(
        "Do some layers matter more than others?",
        {
            "alike": "no, or not known",
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
    """Presets with their options, other keys of the method section, other sections, and the reasons."""

    names: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)

    @property
    def method(self) -> dict[str, Any]:
        """The `method` section of the configuration."""
        name = self.names if len(self.names) > 1 else (self.names or ["lora"])[0]
        return {"name": name} | ({"options": self.options} if self.options else {}) | self.extra

    def yaml(self) -> str:
        """A configuration for `lorary train`, with the reasons above it."""
        from lorary.train.config.yaml_source import dump

        default = [] if self.names or self.extra else [f"LoRA: {PRESETS['lora'].when}"]
        lines = [*default, *self.reasons, "Put your own model and data here."]
        head = [textwrap.fill(line, 100, initial_indent="# ", subsequent_indent="#   ") for line in lines]
        tree = {"model": {"id": "builtin:base"}, "method": self.method, "data": {"train": "builtin:docstrings"}}
        for name, section in self.sections.items():
            tree[name] = tree.get(name, {}) | section
        return "\n".join(head) + "\n" + dump(tree)


def choose(answers: Mapping[str, str]) -> Choice:
    """The method for these answers; unanswered questions take their default.

    Each answer adds the first method proposed for it that combines with those chosen before. The latest registered
    comes first: users want the methods that they installed.

    Raises:
        ConfigError: unknown questions or answers, all of them.
    """
    _check(answers)
    choice = Choice()
    for key, question in QUESTIONS.items():
        given = f"{key}={answers.get(key, question.default)}"
        for name, section in SETTINGS.get(given, {}).items():
            choice.sections.setdefault(name, {}).update(section)
        candidates: list[Preset | PlanFunction] = [*reversed(PRESETS.values()), *FUNCTIONS.values()]
        for candidate in candidates:
            if given in candidate.answers and _add(choice, candidate, given):
                break
    return choice


def _add(choice: Choice, found: Preset | PlanFunction, given: str) -> bool:
    """Whether a method combines with those chosen: adds it, or the reason against it."""
    if isinstance(found, PlanFunction):
        against = [problem.what for problem in found.why_not(method(*choice.names, **choice.options))]
    else:
        options = dict(choice.options)
        for name in choice.names:
            options |= verdict(name, found.name).options
        restrictions = [restriction_of(name, found.name) for name in choice.names]
        against = [restriction.why for restriction in restrictions if restriction and not restriction.advised]
        against = against or refusal(*choice.names, found.name, **options)
    if against:
        choice.reasons.append(f"Not {found.title}: {against[0]}.")
        return False
    choice.reasons.append(f"{found.title}: {found.when}")
    if isinstance(found, PlanFunction):
        choice.extra |= found.section
    else:
        choice.names.append(found.name)
        choice.options = options | dict(found.answers[given])
    return True


def _check(answers: Mapping[str, str]) -> None:
    problems = []
    for key, answer in answers.items():
        if key not in QUESTIONS:
            problems.append(Diagnostic(key, "is not a question", did_you_mean(key, QUESTIONS)))
        elif answer not in QUESTIONS[key].answers:
            fix = "known: " + ", ".join(QUESTIONS[key].answers)
            problems.append(Diagnostic(key, f"{answer!r} does not answer: {QUESTIONS[key].text}", fix))
    if problems:
        raise ConfigError("invalid answers:", problems)
