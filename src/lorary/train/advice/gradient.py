"""Ranks from one batch's gradients, for an advised configuration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorary.analysis.gradient_ranks import ranks_from_gradients
from lorary.errors import ConfigError, Diagnostic
from lorary.model.loading.from_pretrained import load_model
from lorary.model.loading.quiet import quiet_progress_bars
from lorary.train.advice.draft import Draft
from lorary.train.advice.facts import Subject
from lorary.train.data.spread import spread
from lorary.train.data.tokenize import IGNORED, Row

ROWS = 16  # of the batch, evenly spread over the data
SOURCE = "lorary.ranks_from_gradients; no difference from uniform ranks is shown, benchmarks/gradient_ranks.py"


def gradient_ranks(draft: Draft, subject: Subject) -> None:
    """Recommend a rank for each layer. Reads the model's weights.

    Raises:
        ConfigError: the task is not `sft`.
        LoraryError: the method has no ranks of its own, or the gradients are not finite.
    """
    if subject.facts.task != "sft":
        what = f"the gradients of task `{subject.facts.task}` depend on a head or a reference that does not exist yet"
        raise ConfigError("cannot advise:", [Diagnostic("--ranks", what, "use uniform")])
    plan = subject.plan(draft.config)
    with quiet_progress_bars():
        model = load_model(draft.config.model)
    batch = padded(spread(subject.rows, ROWS), subject.padding, draft.value("data.max_length"))
    found = ranks_from_gradients(model, batch, plan)
    reason = f"the share of its gradient that a layer's rank covers, on {len(batch['input_ids'])} rows; as many numbers"
    draft.recommend("method.ranks", found, reason, SOURCE)


def padded(rows: Sequence[Row], padding: int, most: int) -> dict[str, Tensor]:
    """A batch of rows with labels, padded on the right. [rows, tokens] each"""
    length = min(max(len(row["input_ids"]) for row in rows), most)

    def matrix(key: str, fill: int) -> Tensor:
        return torch.tensor([(row[key] + [fill] * length)[:length] for row in rows])

    mask = [[int(i < len(row["input_ids"])) for i in range(length)] for row in rows]
    return {
        "input_ids": matrix("input_ids", padding),
        "labels": matrix("labels", IGNORED),
        "attention_mask": torch.tensor(mask),
    }
