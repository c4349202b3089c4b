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
from torch import Tensor

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
    _check(model, rows)
    head = LabelledHead(model, statistics=("is_top1",)).install()
    total = torch.zeros(3, dtype=torch.float64)  # nats, right, tokens
    try:
        with torch.no_grad(), eval_mode(model):
            for batch in _batches(rows, batch_size, pad):
                placed = {name: tensor.to(model.device) for name, tensor in batch.items()}
                found = model(**placed, fused_lm_head=True)
                sums = [-found.log_probs.double().sum(), found.is_top1.double().sum(), found.label_mask.sum()]
                total += torch.stack([value.double().cpu() for value in sums])
                if progress is not None:
                    progress(len(batch["input_ids"]))
    finally:
        head.remove()
    nats, right, tokens = total.tolist()
    return Evaluation(len(rows), int(tokens), nats / tokens, right / tokens)


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
        width = max(len(row["input_ids"]) for row in part)
        gaps = [width - len(row["input_ids"]) for row in part]
        yield {
            "input_ids": torch.tensor([[*row["input_ids"], *[pad] * gap] for row, gap in zip(part, gaps, strict=True)]),
            "attention_mask": torch.tensor([[1] * (width - gap) + [0] * gap for gap in gaps]),
            "labels": torch.tensor([[*row["labels"], *[_IGNORED] * gap] for row, gap in zip(part, gaps, strict=True)]),
        }
