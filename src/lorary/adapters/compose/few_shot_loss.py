"""The loss of a model on a few examples: the mean over all of their labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lorary.errors import DataError, Diagnostic
from lorary.model.ambient import callers_device
from lorary.model.loading.model_kind import kind_of_model

_IGNORED = -100
_AT_ONCE = 16  # rows of one padded batch: a handful of examples takes one forward pass
_HEADLINE = "cannot search on these examples:"
_FIX = 'give rows such as {"input_ids": [...], "labels": [...]}, batches of tensors, or a function of the model'

Batch = dict[str, Tensor]
Examples = Mapping[str, Any] | Iterable[Mapping[str, Any]] | Callable[[nn.Module], float]


def loss_on(model: Any, examples: Examples) -> Callable[[], float]:
    """A function that measures the model's present loss.

    Args:
        model: of Transformers, whose output has a `loss`; any module if `examples` is a function.
        examples: rows of token ids, padded into batches; or batches of tensors with `labels`, as the
            model takes them; or a function from the model to its loss.

    Raises:
        DataError: the examples are none of these, or none of their tokens has a label; every problem.
    """
    if callable(examples):
        return lambda: _number(examples, model)
    batches = _batches(examples)
    counts = [_labels(model, batch) for batch in batches]
    empty = [Diagnostic(f"batch {i}", "no token has a label") for i, count in enumerate(counts) if not count]
    if empty:
        raise DataError(_HEADLINE, empty)
    device = next(model.parameters()).device
    placed = [{name: t.to(device) for name, t in batch.items()} for batch in batches]

    def measured() -> float:
        losses = [float(_loss(model, batch)) for batch in placed]
        return sum(loss * n for loss, n in zip(losses, counts, strict=True)) / sum(counts)

    return measured


def _loss(model: Any, batch: Batch) -> Tensor:
    loss = getattr(model(**batch), "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = "its output has no loss"
        raise DataError(_HEADLINE, [Diagnostic("model", what, "give a function from the model to its loss instead")])
    return loss


def _number(function: Callable[[nn.Module], float], model: nn.Module) -> float:
    with callers_device(model):
        value: object = function(model)
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        problem = Diagnostic("examples", f"the function returned a {type(value).__name__}, not a number")
        raise DataError(_HEADLINE, [problem]) from None


def _batches(examples: Any) -> list[Batch]:
    """The examples as batches of tensors; rows are padded, 16 in a batch.

    Raises:
        DataError: they are neither rows nor batches; every problem.
    """
    several = [examples] if isinstance(examples, Mapping) else examples
    if isinstance(several, str | Tensor) or not isinstance(several, Iterable):
        raise DataError(_HEADLINE, [Diagnostic("examples", f"is a {type(examples).__name__}", _FIX)])
    found: list[Batch] = []
    problems: list[Diagnostic] = []
    for i, example in enumerate(several):
        if not isinstance(example, Mapping):
            problems.append(Diagnostic(f"example {i}", f"is a {type(example).__name__}", _FIX))
            continue
        found.append({})
        for name, value in example.items():
            try:
                found[-1][str(name)] = torch.as_tensor(value)
            except (TypeError, ValueError, RuntimeError):
                problems.append(Diagnostic(f"example {i}", f"`{name}` is neither a tensor nor a list of numbers", _FIX))
        if "labels" not in example:
            problems.append(Diagnostic(f"example {i}", "has no labels", _FIX))
    if not found and not problems:
        problems.append(Diagnostic("examples", "is empty", _FIX))
    if problems:
        raise DataError(_HEADLINE, problems)
    if not all("input_ids" in one and one["input_ids"].ndim == 1 for one in found):
        return found
    return [_padded(found[i : i + _AT_ONCE]) for i in range(0, len(found), _AT_ONCE)]


def _padded(rows: Sequence[Batch]) -> Batch:
    """Rows of token ids as one batch, padded on the right: `input_ids`, `attention_mask`, `labels`, [rows, longest]."""
    ids, labels = ([row[key] for row in rows] for key in ("input_ids", "labels"))
    problems = [
        Diagnostic(f"example {i}", f"{name} are {tuple(t.shape)} of {t.dtype}, not a row of token ids", _FIX)
        for name, tensors in (("input_ids", ids), ("labels", labels))
        for i, t in enumerate(tensors)
        if t.ndim != 1 or t.is_floating_point()
    ]
    if problems:
        raise DataError(_HEADLINE, problems)
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=_IGNORED),
    }


def _labels(model: Any, batch: Batch) -> int:
    """The number of labels in the mean of a batch's loss; the first token of a row is not predicted from another."""
    labels, config = batch["labels"], getattr(model, "config", None)
    if labels.ndim < 2 or labels.is_floating_point():
        return labels.shape[0]
    predicts_next = config is not None and kind_of_model(config) == "decoder"
    ids = batch.get("input_ids", labels)
    if predicts_next and labels.shape != ids.shape:
        what = f"input_ids are {tuple(ids.shape)} and labels {tuple(labels.shape)}"
        raise DataError(_HEADLINE, [Diagnostic("examples", what, "give every token a label, -100 for none")])
    return int((labels[:, 1:] if predicts_next else labels).ne(_IGNORED).sum())
