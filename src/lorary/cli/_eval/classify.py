"""The measurements of `lorary eval` on sequence classifiers: the loss and the figures that their training logs."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from datasets import Dataset
from rich.console import Console
from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainingArguments

from lorary.adapters.resolve import base_class, read_adapter
from lorary.adapters.switch import load
from lorary.cli import printable
from lorary.cli._eval.data import EvalData
from lorary.cli._eval.models import EvalModel
from lorary.cli._table import rich_table
from lorary.errors import ConfigError, DataError, Diagnostic
from lorary.model.loading.from_pretrained import load_config, load_model, load_storage
from lorary.model.loading.model_kind import classes, kind_of_model, own_class, set_padding
from lorary.model.loading.quiet import quiet_progress_bars
from lorary.model.loading.source import ModelClass
from lorary.train.data.labels import own_labels
from lorary.train.data.task_rows import Labelled, Labels
from lorary.train.runner.memory_forecast import learned_positions
from lorary.train.trainer.classification import Scores

_PROBLEMS = {str: "single_label_classification", tuple: "multi_label_classification", float: "regression"}


@dataclass(frozen=True)
class Classified:
    """The figures of a classifier: `loss`, and by the kind of its labels `accuracy`, `macro_f1` and others."""

    model: str
    rows: int
    figures: dict[str, float]


def classifiers(models: Sequence[EvalModel]) -> list[ModelClass] | None:
    """The classes of the models if they are sequence classifiers; None if they are language models.

    Raises:
        ConfigError: they are of both kinds, which have no figure in common.
    """
    found = [_class_of(model) for model in models]
    if None not in found:
        return cast("list[ModelClass]", found)
    if any(found):
        problems = [Diagnostic(m.name, "is a classifier" if c else "is no classifier") for m, c in zip(models, found)]  # noqa: B905
        raise ConfigError("these models cannot be compared:", problems)
    return None


def _class_of(model: EvalModel) -> ModelClass | None:
    if model.folder is None:
        config = load_config(model.section)
        return own_class(config) if kind_of_model(config) == "classifier" else None
    adapter = read_adapter(model.folder, model.section.id)
    found = base_class(model.section, model.folder, adapter)
    return found if adapter.base.architecture in classes("SEQUENCE_CLASSIFICATION") else None


def run_classifiers(
    models: Sequence[EvalModel], kinds: Sequence[ModelClass], data: EvalData, batch_size: int
) -> list[Classified]:
    """The figures of the models, in order."""
    results = []
    for model, kind in zip(models, kinds, strict=True):
        labels, examples = _with_labels(model.name, kind.config, cast("Sequence[Labelled]", data.examples))
        kind.config.problem_type = labels.problem
        adapter = read_adapter(model.folder, model.section.id) if model.folder else None
        storage = load_storage(adapter.method, adapter.full, adapter.sites) if adapter else None
        with quiet_progress_bars():
            loaded = load_model(model.section, storage, model_class=kind)
            if model.folder:
                load(loaded, model.folder)
            set_padding(loaded, model.tokenizer.pad_token_id)
            room, section = learned_positions(loaded), data.config.data
            section = section.model_copy(update={"max_length": min(section.max_length, room or section.max_length)})
            rows = replace(data, examples=examples, config=data.config.model_copy(update={"data": section})).rows(
                model.tokenizer, labels
            )
            results.append(Classified(model.name, len(rows), _measured(loaded, rows, model, labels, batch_size)))
        del loaded
        gc.collect()  # models contain reference cycles, and the next one needs the memory
    return results


def _with_labels(name: str, config: Any, examples: Sequence[Labelled]) -> tuple[Labels, Sequence[Labelled]]:
    """The labels of a model's head, and the examples with theirs as it takes them.

    Raises:
        DataError: the label of a row is of another kind than the head's, or unknown to it.
    """
    own = own_labels(config)
    if all(label == f"LABEL_{i}" for i, label in enumerate(own)):  # what Transformers calls labels without a name
        own = tuple(map(str, range(len(own))))
    problem = config.problem_type or ("regression" if len(own) == 1 else _PROBLEMS[type(examples[0].label)])
    headline = f"cannot evaluate {name} on these rows:"
    if problem == "regression":
        numbers = [replace(e, label=_number(e.label)) for e in examples]
        if odd := next((e for e, n in zip(examples, numbers, strict=True) if n.label is None), None):
            raise DataError(
                headline, [Diagnostic(odd.where, f"`label` is {odd.label!r}, and the model predicts a number")]
            )
        return Labels(), numbers
    if odd := next((e for e in examples if _PROBLEMS[type(e.label)] != problem), None):
        what = f"`label` is {odd.label!r}, and the model was trained for {problem.replace('_', ' ')}"
        raise DataError(headline, [Diagnostic(odd.where, what)])
    unknown = {n: e.where for e in reversed(examples) for n in ([e.label] if isinstance(e.label, str) else e.label)}  # type: ignore[union-attr]
    problems = [
        Diagnostic(where, f"the label `{label}` is not one of the model's: {', '.join(own)}")
        for label, where in sorted(unknown.items(), key=lambda item: str(item[0]))
        if label not in own
    ]
    if problems:
        raise DataError(headline, problems)
    return Labels(own, problem), examples


def _number(label: Any) -> Any:
    try:
        return float(label)
    except (TypeError, ValueError):
        return None


def _measured(model: Any, rows: Sequence[Any], named: EvalModel, labels: Labels, batch_size: int) -> dict[str, float]:
    """The figures of Transformers' own evaluation, by the names under which training logs them, without `eval_`."""
    with TemporaryDirectory() as folder:
        options: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "per_device_eval_batch_size": batch_size}
        options["dataloader_pin_memory"] = torch.cuda.is_available()
        trainer = Trainer(
            model=model,
            args=TrainingArguments(folder, **options),
            eval_dataset=Dataset.from_list(list(rows)),
            data_collator=DataCollatorWithPadding(named.tokenizer),
            compute_metrics=Scores(labels.problem),
        )
        trainer.remove_callback(PrinterCallback)
        found = {key.removeprefix("eval_"): float(value) for key, value in trainer.evaluate().items()}
    wanted = ("loss", "accuracy", "macro_f1", "label_accuracy", "mean_absolute_error")
    return {key: found[key] for key in wanted if key in found}


def print_classified(data: EvalData, results: Sequence[Classified], as_json: bool) -> None:
    """The table, or JSON."""
    if as_json:
        found = [{"model": r.model} | r.figures | {"rows": r.rows} for r in results]
        print(json.dumps({"data": data.source, "results": found}, indent=2))
        return
    keys = list(results[0].figures)
    rows = [(printable(r.model), *(_shown(key, r.figures.get(key)) for key in keys), f"{r.rows:,}") for r in results]
    head = ("model", *(key.replace("_", " ") for key in keys), "rows")
    console = Console(highlight=False)
    console.print(rich_table(printable(data.source), rows, head))
    console.print("the loss of the labels per row; accuracy: the share of rows with the right label", soft_wrap=True)


def _shown(key: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2%}" if key.endswith("accuracy") else f"{value:,.4f}"
