"""The loss of every adapter on its own rows of one forward pass: the mean over its own labels.

causal language models    -log softmax(head(h))[label], of labelled tokens only (`lorary.model.labelled_head`)
sequence classifiers      Transformers' loss for the configuration's `problem_type`
other models              a function of the caller: (output of these rows, batch) -> loss
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorary.errors import DataError, Diagnostic, TrainingError
from lorary.model.labelled_head import LabelledHead
from lorary.train.shared_base.batches import Batch
from lorary.train.shared_base.rows import HEADLINE, RowsForward

Loss = Callable[[Any, Batch], Tensor]  # (the model's output for the rows of one adapter, its batch)


class Losses:
    """The losses of a model's forward pass, for the rows of one adapter or of several.

    Args:
        model: the model.
        loss: of the caller; None for the model's own.

    Raises:
        TrainingError: the model has no loss that can be divided among rows.
    """

    def __init__(self, model: Any, loss: Loss | None = None) -> None:
        if loss is not None and not callable(loss):
            what = f"is a {type(loss).__name__}, not a function of (output, batch)"
            raise TrainingError(HEADLINE, [Diagnostic("loss", what)])
        self.model, self.loss, self.head = model, loss, None
        kind = getattr(model, "loss_type", "")
        output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if loss is None and kind in ("ForCausalLM", None) and output is not None:
            self.head = LabelledHead(model, ())
            if isinstance(vars(output).get("forward"), RowsForward):
                self.head.plain = False  # labelled tokens alone are not rows of a batch
            self.head.install()
        elif loss is None and kind == "ForSequenceClassification":
            self.loss = self.classified
        elif loss is None:
            what = f"a {type(model).__name__} has no loss that is known to be a mean over rows"
            raise TrainingError(HEADLINE, [Diagnostic("loss", what, "pass loss=, a function of (output, batch)")])

    def judge(self, batch: Batch) -> None:
        """Find out, once and on the base alone, how the head's output becomes logits.

        Raises:
            DataError: there are no labels.
        """
        if "labels" not in batch and (self.head is not None or self.loss == self.classified):
            raise DataError("invalid batches:", [Diagnostic("labels", "are missing, and the loss is that of labels")])
        if self.head is not None and self.head.plain is None:
            with torch.no_grad():
                row = {key: t[:1, :16] for key, t in batch.items() if key in ("input_ids", "labels")}
                self.model(**row, fused_lm_head=True)

    def __call__(self, batch: Batch, counts: Mapping[str, int]) -> dict[str, Tensor]:
        """The loss of every adapter.

        Args:
            batch: the rows of all.
            counts: adapter -> its rows, in order.
        """
        if self.loss is None:
            return self._of_tokens(batch, counts)
        output = self.model(**{key: t for key, t in batch.items() if key != "labels"})
        parts = zip(counts, _split(output, counts), _rows(batch, counts), strict=True)
        return {name: self.loss(found, own) for name, found, own in parts}

    def weights(self, micro_batches: Sequence[Batch]) -> list[float]:
        """The share of each micro-batch in a step's loss, which is a mean over all labels of the step."""
        if self.head is None:
            return [1 / len(micro_batches)] * len(micro_batches)
        labels = [int((batch["labels"][:, 1:] != -100).sum()) if "labels" in batch else 0 for batch in micro_batches]
        return [count / max(sum(labels), 1) for count in labels]

    def _of_tokens(self, batch: Batch, counts: Mapping[str, int]) -> dict[str, Tensor]:
        found = self.model(**batch, fused_lm_head=True)
        rows = list(counts.values())
        parts = zip(counts, found.log_probs.split(rows), found.label_mask.split(rows), strict=True)
        return {name: -log_probs.sum() / mask.sum().clamp(min=1) for name, log_probs, mask in parts}

    def classified(self, output: Any, batch: Batch) -> Tensor:
        """The loss of a sequence classifier."""
        model = self.model
        loss: Tensor = model.loss_function(labels=batch["labels"], pooled_logits=output.logits, config=model.config)
        return loss


def alone(model: nn.Module, batch: Batch, like: Losses) -> Tensor:
    """The loss of a model with one adapter, by the same definition."""
    losses = Losses(model, None if like.loss == like.classified else like.loss)
    try:
        if losses.head is not None and like.head is not None:
            losses.head.plain = like.head.plain
        return losses(batch, {"": len(next(iter(batch.values())))})[""]
    finally:
        if losses.head is not None:
            losses.head.remove()


def _rows(batch: Batch, counts: Mapping[str, int]) -> Iterator[dict[str, Tensor]]:
    """The batch of every adapter."""
    split = {key: t.split(list(counts.values())) for key, t in batch.items()}
    return ({key: parts[i] for key, parts in split.items()} for i in range(len(counts)))


def _split(output: Any, counts: Mapping[str, int]) -> list[Any]:
    """The output of every adapter's rows: of a tensor its rows, of a model's output its logits."""
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    parts = logits.split(list(counts.values()))
    return list(parts) if isinstance(output, Tensor) else [type(output)(logits=part) for part in parts]
