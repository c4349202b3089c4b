"""Sequence classification with an adapter: labels of texts, several labels of a text, or a number.

    loss = −log softmax(f(x))[y],   Σ over labels of −log σ(±f(x)),   or (f(x) − y)²

f is the adapted model with its head; Transformers computes the loss from the configuration's `problem_type`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from transformers import DataCollatorWithPadding, Trainer

from lorary.adapters.label_names import write_label_names
from lorary.train.data.task_rows import Labels
from lorary.train.trainer.mixin import AdapterTraining
from lorary.train.trainer.trainer_internals import mean_metrics, set_tokens_seen, start_log, tokens_seen


class ClassificationTrainer(AdapterTraining, Trainer):  # type: ignore[misc]  # Transformers has no types
    """Transformers' `Trainer` for a sequence classifier with a method attached.

    Args:
        model: a sequence classifier, after `lorary.attach`.
        args: `transformers.TrainingArguments`.
        labels: of the outputs; they are saved with the adapter.
        processing_class: the tokenizer.
        rest: further arguments of the trainer. Rows are tokens with a label: `input_ids`, `label`.
    """

    scores_tokens = False
    loss_is_scaled_for_ga = False

    def __init__(self, *, model: Any, args: Any, labels: Labels, processing_class: Any, **rest: Any) -> None:
        self.labels = labels
        start_log(self)
        super().__init__(
            model=model,
            args=args,
            processing_class=processing_class,
            data_collator=DataCollatorWithPadding(processing_class),
            compute_metrics=Scores(labels.problem),
            **rest,
        )
        # The mean over a micro-batch: some models take `num_items_in_batch` and ignore it.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The model's own loss; counts the tokens."""
        if self.model.training:
            counted = self.accelerator.gather_for_metrics(inputs["attention_mask"].sum()).sum()
            set_tokens_seen(self, tokens_seen(self) + int(counted))
        return super().compute_loss(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log a line, with the mean of every figure since the last one."""
        if "loss" in logs:
            logs.update(mean_metrics(self) | {"num_tokens": tokens_seen(self)})
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter folder, with the tokenizer and the names of the labels."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            write_label_names(Path(output_dir or self.args.output_dir), self.labels.outputs, self.labels.problem)


class Scores:
    """The figures of an evaluation.

    Args:
        problem: Transformers' `problem_type`.
    """

    def __init__(self, problem: str) -> None:
        self.problem = problem

    def __call__(self, found: Any) -> dict[str, float]:
        outputs = found.predictions[0] if isinstance(found.predictions, tuple) else found.predictions
        outputs, labels = np.asarray(outputs, np.float64), np.asarray(found.label_ids)
        if self.problem == "regression":
            return {"mean_absolute_error": float(np.abs(outputs.reshape(-1) - labels.reshape(-1)).mean())}
        if self.problem == "multi_label_classification":
            right = (outputs > 0) == (labels > 0.5)
            return {"accuracy": float(right.all(-1).mean()), "label_accuracy": float(right.mean())}
        guesses = outputs.argmax(-1)
        f1 = [_f1(guesses == label, labels == label) for label in np.unique(labels)]
        return {"accuracy": float((guesses == labels).mean()), "macro_f1": float(np.mean(f1))}


def _f1(guessed: Any, true: Any) -> float:
    """The harmonic mean of precision and recall of one label."""
    hits = float((guessed & true).sum())
    return 2 * hits / max(float(guessed.sum() + true.sum()), 1.0)
