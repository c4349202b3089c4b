"""Supervised fine-tuning of an adapter: next-token prediction on the labelled tokens.

    loss = −Σ log π(label | the tokens before it) / number of labels

Both are summed over the micro-batches of a step and over all ranks before the division, so that neither changes it.
"""

from __future__ import annotations

from typing import Any

import torch
import trl
from torch import Tensor

from lorary.train.trainer.mixin import AdapterTraining
from lorary.train.trainer.trainer_internals import leave_labels_unshifted


class SFTTrainer(AdapterTraining, trl.SFTTrainer):  # type: ignore[misc]  # TRL has no types
    """TRL's `SFTTrainer` for a model with a method attached.

    The evaluation loss is the mean over all labelled tokens; TRL's is a mean over batches and depends on their size.
    """

    loss_is_scaled_for_ga = True  # divided by the labels of the whole step, over accumulation and ranks

    def __init__(self, *, args: Any, **arguments: Any) -> None:
        # TRL would smooth by a second forward pass over all logits; the labelled head does it with its own
        smoothing, args.label_smoothing_factor = args.label_smoothing_factor, 0.0
        super().__init__(args=args, **arguments)
        args.label_smoothing_factor = self.head.smoothing = smoothing
        # The labelled head shifts and counts the labels, not the model's `forward`.
        self.model_accepts_loss_kwargs = True
        leave_labels_unshifted(self)
        self._held_out: list[Tensor] = []

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """One batch of evaluation; records the sum of its losses and the number of its labels."""
        result = super().prediction_step(*args, **kwargs)
        self._held_out.append(self.accelerator.gather_for_metrics(self.head.rows).double().sum(0))
        return result

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluation over a loader."""
        self._held_out = []
        output = super().evaluation_loop(*args, **kwargs)
        total, labels = torch.stack(self._held_out).sum(0).tolist()
        output.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_loss"] = total / max(labels, 1)
        return output
