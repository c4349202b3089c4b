"""The base of a run as its task loads it: its class, its labels, and the modules of a new head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from lorary.errors import ConfigError, DataError, Diagnostic
from lorary.model.loading.from_pretrained import load_config
from lorary.model.loading.model_class import CLASSIFIERS, classifier
from lorary.model.loading.model_kind import kind_of_model
from lorary.model.loading.source import ModelClass
from lorary.model.scan import scan
from lorary.train.config.config import Config
from lorary.train.data.labels import find_labels, own_labels
from lorary.train.data.load import Data
from lorary.train.data.task_rows import Labelled, Labels
from lorary.train.runner.memory_forecast import learned_positions


def with_labels(config: Config, data: Data) -> tuple[Config, Labels | None]:
    """The configuration with the labels of its data, and these; unchanged for other tasks than a classification.

    Raises:
        DataError: the labels cannot be used, or are not those of the base's own head.
    """
    if config.task != "classification":
        return config, None
    own = own_labels(base) if kind_of_model(base := load_config(config.model)) == "classifier" else None
    train, held_out = (cast("Sequence[Labelled]", rows) for rows in (data.train, data.validation))
    labels = find_labels(train, held_out, config.data.labels, own)
    if own is not None and len(own) == len(labels.outputs) and labels.names:
        _check_names(own, labels, config.model.id)
    section = config.data.model_copy(update={"labels": labels.names or None})
    return config.model_copy(update={"data": section}), labels


def fit_positions(config: Config, model: nn.Module) -> Config:
    """The configuration with rows no longer than a classifier's table of positions."""
    room = learned_positions(model)
    if config.task not in CLASSIFIERS or room is None or config.data.max_length <= room:
        return config
    note = f"data.max_length: {room:,}, the positions that {type(model).__name__} has"
    section = config.data.model_copy(update={"max_length": room})
    return config.model_copy(update={"data": section}).with_notes(note)


def expected_labels(config: Config) -> Labels | None:
    """The labels of a classification as far as they are known without its data: two if nothing says."""
    if config.task != "classification":
        return None
    base = load_config(config.model)
    own = own_labels(base) if kind_of_model(base) == "classifier" else ()
    return Labels(config.data.labels or own or ("0", "1"), "single_label_classification")


def _check_names(own: Sequence[str], labels: Labels, name: str) -> None:
    """Refuse other names for as many labels: the trained head would mean something else."""
    if tuple(own) == labels.names or all(label == f"LABEL_{i}" for i, label in enumerate(own)):
        return
    what = f"are {', '.join(labels.names)}, and the head of {name} has {', '.join(own)}"
    fix = "use its names in its order, or start from a model without a head"
    raise DataError("cannot classify:", [Diagnostic("data.labels", what, fix)])


def base_of_task(config: Config, labels: Labels | None, tokenizer: Any) -> ModelClass | None:
    """The class and configuration that the task loads the model with; None for a causal language model."""
    if config.task not in CLASSIFIERS:
        return None
    names, problem = (labels.outputs, labels.problem) if labels else (("reward",), None)
    padding = tokenizer.pad_token_id if tokenizer is not None else None
    return classifier(load_config(config.model), names, problem, padding, config.model)


def new_modules(config: Config, base: ModelClass | None, model: nn.Module) -> tuple[str, ...]:
    """The new parameters outside the head, such as BERT's pooler, which train in full with it.

    Raises:
        ConfigError: the head is new and stays as it was drawn.
    """
    if base is None or not base.fresh:
        return ()
    if config.method.head == "frozen":
        what = f"{config.model.id} has no head for this task: it is drawn at random, and would stay so"
        raise ConfigError("invalid configuration:", [Diagnostic("method.head", what, "use full or lora")])
    heads = tuple(f"{head}." for head in scan(model).heads)
    return tuple(name for name in base.fresh if not name.startswith(heads))
