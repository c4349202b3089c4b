"""Kahneman-Tversky optimisation of an adapter; the reference is the same model without it, or with its start.

    loss = 1 − σ(β (log π/π₀ − z))  of a good answer,   1 − σ(β (z − log π/π₀))  of a bad one

π is the adapted model, π₀ the base (or the model as training begins), and z the mean divergence of π from π₀ on
answers to other prompts of the batch, at least 0 (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7 and 8).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import trl

from lorary.train.trainer.mixin import AdapterTraining
from lorary.train.trainer.reference import Reference, Start, reference_state


class KTOTrainer(AdapterTraining, trl.KTOTrainer):  # type: ignore[misc]  # TRL has no types
    """TRL's `KTOTrainer` for a model with a method attached.

    TRL pairs each prompt with another answer once, in the order of the rows, which it can therefore not shuffle. Here
    they are paired in the batch, as TRL pairs them where the order is the same.

    Args:
        model: a causal language model, after `lorary.attach`.
        args: a `trl.KTOConfig`; its `train_sampling_strategy` is followed.
        reference: `base`, the disabled adapter, or `start`, a frozen copy of the adapter as it is now.
        rest: further arguments of TRL's trainer. Rows are tokens: `prompt_ids`, `completion_ids`, `label`.
    """

    statistics = ("entropy", "mean_logits")

    def __init__(self, *, model: Any, args: Any, reference: Start = "base", **rest: Any) -> None:
        strategy, args.train_sampling_strategy = args.train_sampling_strategy, "sequential"
        self.reference_state = reference_state(model, reference)
        placeholder = Reference(lambda: model, model.config, self.reference_state)
        super().__init__(model=model, args=args, ref_model=placeholder, **rest)
        args.train_sampling_strategy = strategy
        self.ref_model = Reference(lambda: self.model, model.config, self.reference_state)
        collate: Any = self.data_collator
        self.data_collator: Any = _Paired(collate)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """Nothing: the rows are tokens."""
        return dataset


class _Paired:
    """A collator that gives each prompt the answer of the row before it, for z.

    Args:
        collate: TRL's.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], Any]) -> None:
        self.collate = collate

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Any:
        answers = [row["completion_ids"] for row in rows]
        shifted = [answers[-1], *answers[:-1]]
        return self.collate([row | {"KL_completion_ids": answer} for row, answer in zip(rows, shifted, strict=True)])
