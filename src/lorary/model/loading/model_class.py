"""The Transformers class that loads a model for a task, and which of its parameters are new.

A task never loads a head that the model was not made for: Transformers would build BERT with a causal head, of random
weights, without a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lorary.errors import ConfigError, Diagnostic
from lorary.model.loading.from_pretrained import empty_model
from lorary.model.loading.model_kind import (
    ELSEWHERE,
    described,
    kind_of_model,
    own_class,
    table,
    why_not_causal,
    with_padding,
)
from lorary.model.loading.source import ModelClass, ModelSection

if TYPE_CHECKING:
    from torch import nn

CLASSIFIERS = ("classification", "reward")  # the tasks that train a sequence classifier; the others a causal LM


def check_task(section: ModelSection, config: Any, task: str) -> None:
    """Refuse a model that a task cannot train.

    Raises:
        ConfigError: the reason, and the way to train it.
    """
    kind, own = kind_of_model(config), str(config.model_type)
    name = described(config)
    if task in CLASSIFIERS:
        fits = kind != "seq2seq" and (kind == "classifier" or own in table("SEQUENCE_CLASSIFICATION"))
        labels = int(getattr(config, "num_labels", 1))
        if task == "reward" and kind == "classifier" and labels != 1:
            what = f"{name} is a classifier of {labels} labels; a reward model has one output"
            raise _wrong(section, task, what, "set task: classification, or start from a model without a head")
        if not fits:
            raise _wrong(section, task, _why_no_classifier(kind, name), ELSEWHERE)
    elif why := why_not_causal(config):
        raise _wrong(section, task, *why)


def _why_no_classifier(kind: str, name: str) -> str:
    if kind == "seq2seq":
        return f"{name} is an encoder-decoder, which no task of `lorary train` trains"
    return f"{name} is not a text model that Transformers can make a sequence classifier of"


def _wrong(section: ModelSection, task: str, what: str, fix: str) -> ConfigError:
    return ConfigError(f"task `{task}` cannot train {section.id}:", [Diagnostic("task", what, fix)])


def classifier(
    config: Any, labels: Sequence[str], problem: str | None, padding: int | None, section: ModelSection
) -> ModelClass:
    """A sequence classifier, and which of its parameters are new.

    Args:
        config: the model's own.
        labels: their names, in the order of the outputs; one without a meaning for a single score.
        problem: Transformers' `problem_type`.
        padding: the token that pads; decoders find the last token of a row by it.
        section: which model, for errors.
    """
    from transformers import AutoModelForSequenceClassification

    changed = with_padding(config, padding)
    _set_labels(changed, labels, problem)
    wanted = ModelClass(AutoModelForSequenceClassification, changed)
    model = empty_model(section, wanted)
    return ModelClass(wanted.cls, changed, _fresh(empty_model(section, own_class(config)), model))


def with_labels_of_head(
    cls: Any, config: Any, shapes: Mapping[str, tuple[int, ...]], names: Any, section: ModelSection
) -> ModelClass:
    """The class of an adapter's base, with as many labels as the head that the adapter holds.

    Args:
        cls: of Transformers.
        config: the base's own.
        shapes: the parameters and buffers that the adapter holds -> their shapes.
        names: the labels, with `names` and `problem`; None if unknown.
        section: the base, for errors.
    """
    changed = with_padding(config)
    if names is not None:
        _set_labels(changed, names.names, names.problem)
        return ModelClass(cls, changed, tuple(shapes))
    for count in dict.fromkeys((int(config.num_labels), *(shape[0] for shape in shapes.values() if shape))):
        changed.num_labels = count
        # buffers too: the running statistics of norms that train
        skeleton = empty_model(section, ModelClass(cls, changed))
        there = {name: tuple(t.shape) for name, t in skeleton.state_dict().items()}
        if all(there.get(name) == shape for name, shape in shapes.items()):
            break
    return ModelClass(cls, changed, tuple(shapes))


def _set_labels(config: Any, labels: Sequence[str], problem: str | None) -> None:
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: i for i, name in enumerate(labels)}
    config.problem_type = problem


def _fresh(own: nn.Module, model: nn.Module) -> tuple[str, ...]:
    """The parameters of a model that one of its own class does not have, or has in another shape."""
    here, there = (
        {name: name.removeprefix(f"{getattr(m, 'base_model_prefix', '')}.") for name, _ in m.named_parameters()}
        for m in (model, own)
    )
    shapes = {there[name]: parameter.shape for name, parameter in own.named_parameters()}
    return tuple(name for name, parameter in model.named_parameters() if shapes.get(here[name]) != parameter.shape)
