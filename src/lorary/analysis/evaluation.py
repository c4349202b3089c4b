"""Loss, perplexity and token accuracy of a causal language model on tokenized rows.

Both are means over all labelled tokens, not over batches, so they do not depend on the batch size; the loss is the one
that training evaluates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorary.analysis.comparison.record import Scores
from lorary.errors import DataError, Diagnostic
from lorary.files.strict_json import finite
from lorary.layers.rope import max_context, rope_parameters, text_config
from lorary.model.labelled_head import LabelledHead
from lorary.model.state import eval_mode

_IGNORED = -100
Row = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Evaluation:
    """The result on one data set.

    Args:
        rows: number of rows.
        tokens: labelled tokens that were predicted; the first token of a row is not.
        loss: mean cross entropy per token, in nats.
        accuracy: share of the tokens that were the most likely one.
    """

    rows: int
    tokens: int
    loss: float
    accuracy: float

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite beyond the range of a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def to_dict(self) -> dict[str, Any]:
        """For JSON, where a number that is not finite is null."""
        values = {"loss": self.loss, "perplexity": self.perplexity, "token_accuracy": self.accuracy}
        found: dict[str, Any] = finite({**values, "tokens": self.tokens, "rows": self.rows})
        return found


def evaluate(
    model: Any, rows: Sequence[Row], *, batch_size: int = 8, pad: int = 0, progress: Callable[[int], Any] | None = None
) -> Evaluation:
    """Evaluate a causal language model, adapted or not, on its device.

    Args:
        model: of Transformers.
        rows: `input_ids`, and `labels` of the same length, in which -100 is not in the loss.
        batch_size: rows per forward pass, padded to the longest.
        pad: token id of the padding.
        progress: called with the number of rows done after every batch.

    Raises:
        DataError: no token has a label; or rows are longer than the positions that the model has learned.

    Example:
        >>> evaluate(model, [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]).perplexity
    """
    found = score_rows(model, rows, batch_size=batch_size, pad=pad, progress=progress)
    return Evaluation(len(rows), sum(found.tokens), found.loss, found.accuracy)


def score_rows(
    model: Any, rows: Sequence[Row], *, batch_size: int = 8, pad: int = 0, progress: Callable[[int], Any] | None = None
) -> Scores:
    """The same, row by row.

    The arguments and errors are those of `evaluate`.
    """
    _check(model, rows)
    head = LabelledHead(model, statistics=("is_top1",)).install()
    sums: list[Tensor] = []  # [rows of the batch, (nats, tokens, right)] each
    try:
        with torch.no_grad(), eval_mode(model):
            for batch in _batches(rows, batch_size, pad):
                placed = {name: tensor.to(model.device) for name, tensor in batch.items()}
                found = model(**placed, fused_lm_head=True)
                columns = (-found.log_probs.double(), found.label_mask.double(), found.is_top1.double())
                sums.append(torch.stack([column.sum(1) for column in columns], 1).cpu())
                if progress is not None:
                    progress(len(batch["input_ids"]))
    finally:
        head.remove()
    return _scores(torch.cat(sums))


def score_labels(model: Any, rows: Sequence[Row], *, batch_size: int = 8, pad: int = 0) -> Scores:
    """The scores of a sequence classifier, row by row: the loss of the label, and whether it is the right one.

    Args:
        model: of Transformers, whose configuration says whether a row has one label or several.
        rows: `input_ids` and `label`.
        batch_size: rows per forward pass, padded to the longest.
        pad: token id of the padding.
    """
    several = model.config.problem_type == "multi_label_classification"
    sums: list[Tensor] = []
    with torch.no_grad(), eval_mode(model):
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            ids, mask = _padded([row["input_ids"] for row in part], pad)
            logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits.double().cpu()
            labels = torch.tensor([row["label"] for row in part])
            if several:
                nats = F.binary_cross_entropy_with_logits(logits, labels.double(), reduction="none").mean(1)
                right = ((logits > 0) == (labels > 0.5)).all(1)
            else:
                nats, right = F.cross_entropy(logits, labels, reduction="none"), logits.argmax(1) == labels
            sums.append(torch.stack([nats, torch.ones(len(part)).double(), right.double()], 1))
    return _scores(torch.cat(sums))


def _scores(sums: Tensor) -> Scores:
    """The scores in a tensor [rows, (nats, tokens, right)]."""
    nats, tokens, right = sums.T.tolist()
    return Scores(tuple(nats), tuple(map(int, tokens)), tuple(map(int, right)))


def _check(model: Any, rows: Sequence[Row]) -> None:
    config = text_config(model)
    limit = max_context(config) if rope_parameters(config) is None else None
    longest = max((len(row["input_ids"]) for row in rows), default=0)
    problems = []
    if not any(label != _IGNORED for row in rows for label in row["labels"][1:]):
        problems.append(Diagnostic("", "no token of the rows has a label", "give rows with answers, or plain text"))
    if limit is not None and longest > limit:
        what = f"the longest row has {longest:,} tokens, and the model has learned {limit:,} positions"
        problems.append(Diagnostic("", what, f"set --max-length to {limit} or less"))
    if problems:
        raise DataError("cannot evaluate on these rows:", problems)


def _batches(rows: Sequence[Row], size: int, pad: int) -> Iterator[dict[str, Tensor]]:
    """Rows padded on the right: `input_ids`, `attention_mask` and `labels`, [rows, longest] each."""
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        ids, mask = _padded([row["input_ids"] for row in part], pad)
        labels, _ = _padded([row["labels"] for row in part], _IGNORED)
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _padded(rows: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    """Rows of numbers padded on the right with a value, and the mask of what is not padding: [rows, longest] each."""
    width = max(map(len, rows))
    numbers = torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])
    return numbers, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
