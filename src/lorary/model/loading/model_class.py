"""The Transformers class that loads a model: for a task, or the one that the model's own configuration names.

A task never loads a head that the model was not made for: Transformers would build BERT with a causal head, of random
weights, without a word.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lorary.errors import Diagnostic, FileError
from lorary.model.loading.from_pretrained import empty_model
from lorary.model.loading.source import ModelClass, ModelSection

if TYPE_CHECKING:
    from torch import nn

CLASSIFIERS = ("classification", "reward")  # the tasks that train a sequence classifier; the others a causal LM
PAGE = "docs/how-to/in-your-own-trainer.md"
_ELSEWHERE = f"train it in your own trainer: {PAGE}"


def kind_of_model(config: Any) -> str:
    """decoder, encoder, classifier, seq2seq, or other, by a model's own configuration."""
    name, own = architecture(config), str(config.model_type)
    if name in _classes("SEQUENCE_CLASSIFICATION"):
        return "classifier"
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    if name in _classes("CAUSAL_LM") or "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return "decoder"
    if own in _table("MASKED_LM") and not getattr(config, "is_decoder", False):
        return "encoder"
    return "decoder" if own in _table("CAUSAL_LM") and not name.rpartition("For")[1] else "other"


def architecture(config: Any) -> str:
    """The class that a model was saved with; empty if its configuration does not say."""
    return str((getattr(config, "architectures", None) or [""])[0])


def check_task(section: ModelSection, config: Any, task: str) -> None:
    """Refuse a model that a task cannot train.

    Raises:
        FileError: the reason, and the way to train it.
    """
    kind, own = kind_of_model(config), str(config.model_type)
    name = architecture(config) or f"a model of type `{own}`"
    if task in CLASSIFIERS:
        fits = kind != "seq2seq" and (kind == "classifier" or own in _table("SEQUENCE_CLASSIFICATION"))
        labels = int(getattr(config, "num_labels", 1))
        if task == "reward" and kind == "classifier" and labels != 1:
            what = f"{name} is a classifier of {labels} labels; a reward model has one output"
            raise _wrong(section, task, what, "set task: classification, or start from a model without a head")
        if not fits:
            raise _wrong(section, task, _why_no_classifier(kind, name), _ELSEWHERE)
    elif kind != "decoder":
        raise _wrong(section, task, *_why_no_decoder(kind, name, config))


def _why_no_classifier(kind: str, name: str) -> str:
    if kind == "seq2seq":
        return f"{name} is an encoder-decoder, which no task of `lorary train` trains"
    return f"{name} is not a text model that Transformers can make a sequence classifier of"


def _why_no_decoder(kind: str, name: str, config: Any) -> tuple[str, str]:
    if kind == "classifier":
        task = "reward" if getattr(config, "num_labels", 2) == 1 else "classification"
        return f"{name} is a sequence classifier: it has no next-token head", f"task: {task} trains it"
    if kind == "encoder":
        what = f"{name} is an encoder: it has no next-token head"
        return what, f"task: classification trains it; for anything else see {PAGE}"
    if kind == "seq2seq":
        return f"{name} is an encoder-decoder, which no task of `lorary train` trains", _ELSEWHERE
    return f"{name} is not a causal language model", _ELSEWHERE


def _wrong(section: ModelSection, task: str, what: str, fix: str) -> FileError:
    return FileError(f"task `{task}` cannot train {section.id}:", [Diagnostic("task", what, fix)])


def own_class(config: Any) -> ModelClass:
    """The class that a model was saved with, with its own head."""
    import transformers

    name = architecture(config)
    found = getattr(transformers, name, None) if name else None
    if not isinstance(found, type):
        found = transformers.AutoModelForCausalLM if kind_of_model(config) == "decoder" else transformers.AutoModel
    return ModelClass(found, config)


def causal(config: Any) -> ModelClass:
    """A causal language model."""
    from transformers import AutoModelForCausalLM

    return ModelClass(AutoModelForCausalLM, config)


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

    changed = copy.deepcopy(config)
    changed.id2label = dict(enumerate(labels))
    changed.label2id = {name: i for i, name in enumerate(labels)}
    changed.problem_type = problem
    for part in {id(c): c for c in (changed, changed.get_text_config())}.values():
        if getattr(part, "pad_token_id", None) is None:
            part.pad_token_id = padding
    wanted = ModelClass(AutoModelForSequenceClassification, changed)
    model = empty_model(section, wanted)
    return ModelClass(wanted.cls, changed, _fresh(empty_model(section, own_class(config)), model))


def _fresh(own: nn.Module, model: nn.Module) -> tuple[str, ...]:
    """The parameters of a model that one of its own class does not have, or has in another shape."""
    here, there = (
        {name: name.removeprefix(f"{getattr(m, 'base_model_prefix', '')}.") for name, _ in m.named_parameters()}
        for m in (model, own)
    )
    shapes = {there[name]: parameter.shape for name, parameter in own.named_parameters()}
    return tuple(name for name, parameter in model.named_parameters() if shapes.get(here[name]) != parameter.shape)


def _table(task: str) -> dict[str, Any]:
    """model_type -> class of Transformers' table for a task."""
    from transformers.models.auto import modeling_auto

    return dict(getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES"))


def _classes(task: str) -> set[str]:
    found = _table(task).values()
    return {name for entry in found for name in ((entry,) if isinstance(entry, str) else entry)}
