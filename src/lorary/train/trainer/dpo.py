"""Direct preference optimisation of an adapter; the reference is the same model without it, or with its start.

    loss = −log σ(β · ((log π(chosen) − log π₀(chosen)) − (log π(rejected) − log π₀(rejected))))

π is the adapted model, π₀ the base (Rafailov et al. 2023, arXiv:2305.18290, eq. 7). When an adapter goes on from SFT to
DPO, the paper's π₀ is the model after SFT: the base with the adapter as it is now. So does TRL with a PEFT model.
"""

from __future__ import annotations

from typing import Any

import trl

from lorary.train.trainer.mixin import AdapterTraining
from lorary.train.trainer.reference import Reference, Start, reference_state


class DPOTrainer(AdapterTraining, trl.DPOTrainer):  # type: ignore[misc]  # TRL has no types
    """TRL's `DPOTrainer` for a model with a method attached, with all of TRL's losses and divergences.

    Args:
        model: a causal language model, after `lorary.attach`.
        args: a `trl.DPOConfig`.
        reference: `base`, the disabled adapter, or `start`, a frozen copy of the adapter as it is now.
        rest: further arguments of TRL's trainer. Rows may be text, or tokens (`prompt_ids`, `chosen_ids`,
            `rejected_ids`).
    """

    statistics = ("entropy", "is_top1", "mean_logits")

    def __init__(self, *, model: Any, args: Any, reference: Start = "base", **rest: Any) -> None:
        if args.use_weighting:
            self.statistics = (*self.statistics, "log_sum_sq_probs")  # type: ignore[assignment]
        self.reference_state = reference_state(model, reference)
        # Without a reference TRL would load the base a second time, unless it precomputes the reference's values, which
        # it does by `compute_ref_log_probs`.
        made = Reference(lambda: model, model.config, self.reference_state)
        placeholder = None if args.precompute_ref_log_probs else made
        super().__init__(model=model, args=args, ref_model=placeholder, **rest)
        self.ref_model = Reference(lambda: self.model, model.config, self.reference_state)

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        """(chosen, rejected) log-probabilities of the reference, `[pairs]` each."""
        with self.reference_state(self.unwrapped_model()):
            return super().compute_ref_log_probs(model, inputs)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """TRL's preparation; rows of tokens need none."""
        if "prompt_ids" in (dataset.column_names or ()):
            return dataset
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
