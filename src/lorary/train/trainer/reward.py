"""A reward model from preference pairs: the adapted model with one output.

    loss = −log σ(r(chosen) − r(rejected))

r is the output at the last token of prompt and answer (Ouyang et al. 2022, arXiv:2203.02155, eq. 1).
"""

from __future__ import annotations

from typing import Any

import trl

from lorary.train.trainer.mixin import AdapterTraining


class RewardTrainer(AdapterTraining, trl.RewardTrainer):  # type: ignore[misc]  # TRL has no types
    """TRL's `RewardTrainer` for a model with a method attached.

    Args:
        model: a sequence classifier with one output, after `lorary.attach`.
        args: a `trl.RewardConfig`.
        rest: further arguments of TRL's trainer. Rows are tokens: `chosen_ids` and `rejected_ids`, with their prompt.
    """

    scores_tokens = False

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluation over a loader; the loss of each batch of pairs, and no outputs, which TRL would pair wrongly."""
        kwargs["prediction_loss_only"] = True
        return super().evaluation_loop(*args, **kwargs)


def with_prompts(row: dict[str, Any]) -> dict[str, list[int]]:
    """A preference pair as two whole texts."""
    return {key: row["prompt_ids"] + row[key] for key in ("chosen_ids", "rejected_ids")}
