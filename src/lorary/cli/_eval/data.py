"""The rows of `lorary eval`: from options, from a configuration, or those that a run held out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorary.cli._comparison_rows import run_config
from lorary.errors import ConfigError, DataError, Diagnostic
from lorary.train.config.config import Config
from lorary.train.config.load import from_dict
from lorary.train.config.load import load as load_config
from lorary.train.data.load import load, load_validation
from lorary.train.data.row_formats import Example, Preference
from lorary.train.data.task_rows import Judged, Labelled, Labels, Prompt
from lorary.train.data.tokenize import Row, tokenize

DEFAULT_LENGTH = 1024
_OTHER_ROWS: dict[type, str] = {  # those of other tasks than sft
    Preference: "preference pairs",
    Judged: "answers with a label",
    Prompt: "prompts without answers",
    Labelled: "labelled texts",
}


@dataclass(frozen=True)
class DataOptions:
    """The options that choose the rows.

    Args:
        data: sources, as `data` in a configuration; their validation part.
        config: configuration file whose held-out data is used.
        sets: `key=value` over the configuration.
        row_format: of the rows.
        max_length: tokens per row.
        limit: the most examples, evenly spread.
    """

    data: tuple[str, ...] = ()
    config: Path | None = None
    sets: tuple[str, ...] = ()
    row_format: str | None = None
    max_length: int | None = None
    limit: int | None = None


@dataclass(frozen=True)
class EvalData:
    """The examples, not yet in a model's tokens.

    Args:
        examples: in order.
        config: the configuration that describes them.
        source: in words.
    """

    examples: Sequence[Example]
    config: Config
    source: str

    def rows(self, tokenizer: Any, labels: Labels | None = None) -> tuple[Row, ...]:
        """The examples in a tokenizer's tokens, with the labels of a classification."""
        return tokenize(self.examples, tokenizer, self.config.data, labels=labels).rows


def eval_data(options: DataOptions, models: Sequence[str], context: int | None, task: str = "sft") -> EvalData:
    """The examples to evaluate on.

    Args:
        options: of the command line.
        models: their names; without other data the first run among them gives its held-out rows.
        context: the shortest context of the models, if known: the default of the maximum length.
        task: whose rows are evaluated, sft or classification.

    Raises:
        ConfigError: nothing names held-out data, or an option is invalid.
        DataError: the data cannot be read, or is that of another task.
    """
    config, source = _config(options, models, context, task)
    if config.data.validation is not None:
        examples: Sequence[Example] = load_validation(config.data)
    elif config.data.validation_split:
        examples = load(config.data, config.task, config.training.seed).validation
    else:
        what = f"{source} holds no rows out"
        raise ConfigError("no data to evaluate on:", [Diagnostic("", what, "name some with --data")])
    own = _OTHER_ROWS.get(type(examples[0]), "texts")
    if own != _OTHER_ROWS[Labelled] if task == "classification" else own != "texts":
        takes = "the loss per token of texts, prompts and answers"
        if task == "classification":
            takes = "classifiers on labelled texts"
        fix = "the report of a run shows the figures of its own task" if own != "texts" else "name others with --data"
        raise DataError(
            "cannot evaluate on these rows:", [Diagnostic(source, f"are {own}, and eval measures {takes}", fix)]
        )
    if options.limit is not None and options.limit < len(examples):
        examples = [examples[i] for i in torch.linspace(0, len(examples) - 1, options.limit).long().tolist()]
    return EvalData(examples, config, source)


def _config(options: DataOptions, models: Sequence[str], context: int | None, task: str) -> tuple[Config, str]:
    """The configuration with the options over it, and its name."""
    sets = [*options.sets, *_sets(options)]
    if options.config is not None:
        return load_config(options.config, sets), str(options.config)
    if options.data:
        length = options.max_length or min(DEFAULT_LENGTH, context or DEFAULT_LENGTH)
        data = {"train": list(options.data), "max_length": length}
        return from_dict({"model": "builtin:base", "task": task, "data": data}, sets), ", ".join(options.data)
    for name in models:
        found = run_config(Path(name))
        if found is not None:
            tree = found.model_dump(mode="json")
            return (from_dict(tree, sets) if sets else found), f"the run {name}"
    what = "none of the models is a run, whose held-out rows would be taken"
    raise ConfigError("no data to evaluate on:", [Diagnostic("", what, "name some with --data or --config")])


def _sets(options: DataOptions) -> list[str]:
    sets = []
    if options.data:
        sets = [f"data.validation={json.dumps(list(options.data))}", "data.validation_split=0"]
    if options.row_format is not None:
        sets.append(f"data.format={options.row_format}")
    if options.max_length is not None:
        sets.append(f"data.max_length={options.max_length}")
    return sets


def precision_of_first_run(models: Sequence[str]) -> dict[str, Any]:
    """The precision and attention of the first run among the models, for all of them; empty if there is none."""
    for name in models:
        config = run_config(Path(name))
        if config is not None:
            return {"dtype": config.model.dtype, "attn_implementation": config.model.attn_implementation}
    return {}
