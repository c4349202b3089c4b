"""Which method to take: a few questions, and the configuration that the answers lead to.

Every answer but the first of a question asks for something. What it takes is a word on some axis where that method is
here, and the nearest that is where it is planned; the configuration's first lines say which and why.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorary.errors import ConfigError, Problem, did_you_mean


@dataclass(frozen=True)
class Question:
    """One question.

    Args:
        key: its name on the command line.
        text: the question.
        answers: answer -> what it means; the first one asks for nothing.
    """

    key: str
    text: str
    answers: Mapping[str, str]

    @property
    def default(self) -> str:
        return next(iter(self.answers))


QUESTIONS = (
    Question(
        "memory",
        "Does the model fit, with a batch in training?",
        {
            "enough": "yes",
            "tight": "the weights do, the activations hardly",
            "short": "not even its weights in 16 bits",
        },
    ),
    Question(
        "quality",
        "Is the best result worth longer steps?",
        {"good": "LoRA's is good enough", "best": "yes"},
    ),
    Question(
        "layers",
        "Do some layers matter more than others?",
        {
            "alike": "no, or nobody knows",
            "differ": "yes; let the training find out",
            "search": "yes, and there is time to search for what each of them needs",
        },
    ),
    Question(
        "context",
        "Is the text longer than what the model was trained on?",
        {"usual": "no", "long": "yes"},
    ),
    Question(
        "adapters",
        "How many adapters are there to be on one base?",
        {"few": "one, or a few", "many": "very many, so that each must be tiny"},
    ),
    Question(
        "tasks",
        "How many tasks does one adapter learn?",
        {"one": "one", "mixed": "several at once", "sequence": "one after another"},
    ),
    Question(
        "convergence",
        "Must it converge in few steps?",
        {"usual": "no", "fast": "yes"},
    ),
)


_LONG = 8192  # tokens


@dataclass
class Choice:
    """What the answers lead to.

    Attributes:
        names: presets.
        method, training, data, model: keys of these sections of the configuration.
        why: what each word is for.
        planned: what would fit better, and is not here yet.
    """

    names: list[str] = field(default_factory=list)
    method: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    why: list[str] = field(default_factory=list)
    planned: list[str] = field(default_factory=list)

    def yaml(self) -> str:
        """A configuration that `lorary train` takes, with the reasons above it."""
        from lorary.train.yaml_source import dump

        names = self.names or ["lora"]
        tree = {
            "model": {"id": "builtin:base"} | self.model,
            "method": {"name": names if len(names) > 1 else names[0]} | self.method,
            "data": {"train": "builtin:docstrings"} | self.data,
            "training": self.training,
        }
        why = "; ".join(self.why) or "LoRA, since nothing that you say asks for more"
        said = [f"Why: {why}.", *(f"Planned: {text}." for text in self.planned), "Put your own model and data here."]
        head = [textwrap.fill(text, 100, initial_indent="# ", subsequent_indent="#   ") for text in said]
        return "\n".join(head) + "\n" + dump({key: value for key, value in tree.items() if value})


def choose(answers: Mapping[str, str]) -> Choice:
    """The method for these answers; a question without one takes its first.

    Raises:
        ConfigError: a question or an answer that is not known, every one of them.
    """
    said = {question.key: question.default for question in QUESTIONS} | _known(answers)
    choice = Choice()
    _what_is_learnt(choice, said)
    _memory(choice, said)
    _quality(choice, said)
    _convergence(choice, said)
    _layers(choice, said)
    _context(choice, said)
    return choice


def _known(answers: Mapping[str, str]) -> dict[str, str]:
    questions = {question.key: question for question in QUESTIONS}
    problems = []
    for key, answer in answers.items():
        if key not in questions:
            problems.append(Problem(key, "is no question", did_you_mean(key, list(questions))))
        elif answer not in questions[key].answers:
            fix = "known: " + ", ".join(questions[key].answers)
            problems.append(Problem(key, f"{answer!r} is no answer to: {questions[key].text}", fix))
    if problems:
        raise ConfigError("invalid answers:", problems)
    return dict(answers)


def _what_is_learnt(choice: Choice, said: Mapping[str, str]) -> None:
    if said["adapters"] == "many":
        choice.names.append("vera")
        choice.method["options"] = {"save_projections": False}
        choice.why.append("VeRA, since an adapter is two vectors a layer")
        choice.planned.append("serving thousands of adapters in one batch (S-LoRA)")
    elif said["tasks"] == "mixed":
        choice.names.append("multilora")
        choice.why.append("MultiLoRA, since its parallel parts weigh equally in a mixture of tasks")
    elif said["tasks"] == "sequence":
        choice.names.append("o-lora")
        choice.why.append(
            "O-LoRA, since each task stays away from those before it: `lorary train --after` names their adapters"
        )
    if said["tasks"] == "sequence" and "vera" in choice.names:
        choice.why.append("one adapter for each task, changed with lorary.switch, so that no task is forgotten")


def _memory(choice: Choice, said: Mapping[str, str]) -> None:
    if said["memory"] == "enough":
        return
    choice.training |= {"batch_size": 1, "gradient_accumulation_steps": 16, "gradient_checkpointing": True}
    if "vera" in choice.names:
        choice.why.append("activations are recomputed, to save memory")
    else:
        choice.names.append("lora-fa")
        choice.why.append("LoRA-FA, since without a gradient for A the layers' inputs need not be kept")
    if {"o-lora", "lora-fa"} <= set(choice.names):
        choice.method["options"] = {"hard": True}
        choice.why.append("hard, since a frozen A has to start away from the earlier tasks")
    if said["memory"] == "short":
        choice.model["dtype"] = "bfloat16"
        choice.names.append("qlora")
        choice.why.append("QLoRA, since weights in 4 bits take a quarter of the memory of 16")


def _quality(choice: Choice, said: Mapping[str, str]) -> None:
    if said["quality"] != "best":
        return
    if "lora-fa" in choice.names:
        choice.why.append("no DoRA, with which most of the memory saved would be lost")
    elif "o-lora" in choice.names:
        choice.why.append("no DoRA, since tasks have to add up")
    else:
        choice.names.append("dora")
        choice.why.append("DoRA, since magnitude and direction learn apart, as in full fine-tuning")


def _convergence(choice: Choice, said: Mapping[str, str]) -> None:
    if said["convergence"] != "fast":
        return
    if "vera" in choice.names:
        choice.why.append("no faster start, since VeRA has one of its own")
    elif not {"multilora", "o-lora"} & set(choice.names):
        choice.names.append("pissa")
        choice.why.append("PiSSA, since it starts at the directions that matter most")
    elif "lora-fa" not in choice.names:
        choice.names.append("lora+")
        choice.why.append("LoRA+, since B then learns faster than A; tune the ratio")
    else:
        choice.why.append("no LoRA+, since A does not learn")


def _layers(choice: Choice, said: Mapping[str, str]) -> None:
    if said["layers"] == "alike":
        return
    if not choice.names and said["layers"] == "search":
        choice.names.append("glora")
        choice.method["options"] = {"supernet": True}
        choice.data["validation"] = "builtin:docstrings"
        choice.why.append("GLoRA, since `lorary search` then finds the terms that each layer is worth on held-out rows")
    elif not choice.names:
        choice.names.append("adalora")
        choice.why.append("AdaLoRA, since the directions of all layers then compete for one budget while it trains")
    elif _can_share(choice.names):
        choice.method["drop"] = {"threshold": 0.9}
        choice.why.append("LoRA-drop, since a probe then finds the layers that are worth tensors of their own")
    else:
        r = 256 if "vera" in choice.names else 16
        choice.method |= {"r": r, "ranks": {"*.mlp.*": 2 * r}}
        choice.why.append("ranks by hand: put your own globs in place of the MLP's")


def _can_share(names: Sequence[str]) -> bool:
    """Whether LoRA-drop can be told what each layer of this method is worth, and let some of them share."""
    import lorary
    from lorary.methods.lora_drop import shareable

    options = {"hard": True} if {"o-lora", "lora-fa"} <= set(names) else {}
    return not shareable(lorary.method(*names, **options))


def _context(choice: Choice, said: Mapping[str, str]) -> None:
    if said["context"] != "long":
        return
    choice.training["gradient_checkpointing"] = True
    choice.data["max_length"] = _LONG
    if "o-lora" in choice.names:
        choice.why.append("full attention over long rows, since trained embeddings cannot stay beneath a task")
        return
    choice.names.append("longlora")
    choice.method["options"] = {**choice.method.get("options", {}), "length": _LONG}
    if "ranks" in choice.method:  # which are the MLP's
        choice.method["targets"] = "all-linear"
    choice.why.append("LongLoRA, since attention in groups makes long rows affordable; say your own length")
