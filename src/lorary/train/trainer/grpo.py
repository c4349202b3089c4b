"""Group-relative policy optimisation of an adapter with a reward function.

    Aᵢ = (rᵢ − mean r) / std r  over the G answers to a prompt
    loss = −(1/N) Σ over tokens of min(ρ A, clip(ρ, 1 ± ε) A) + β KL(π, π₀)

ρ is the ratio of the token's probability to that when it was sampled, N the number of sampled tokens, π₀ the base,
or the model as training begins
(Shao et al. 2024, arXiv:2402.03300, eq. 3; the normalisation by N is DAPO's, arXiv:2503.14476, TRL's default).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import trl

from lorary.train.data.sampler import SeededSampler
from lorary.train.trainer.mixin import AdapterTraining
from lorary.train.trainer.reference import Reference, Start, reference_state
from lorary.train.trainer.reward_function import Reward
from lorary.train.trainer.trainer_internals import drop_metric, set_tokens_seen


class GRPOTrainer(AdapterTraining, trl.GRPOTrainer):  # type: ignore[misc]  # TRL has no types
    """TRL's `GRPOTrainer` for a model with a method attached; the reference is the disabled adapter, or its start.

    Args:
        model: a causal language model, after `lorary.attach`.
        args: a `trl.GRPOConfig`. Answers are sampled at temperature 1, at the beginning of every step.
        reward: the reward of answers.
        reference: `base`, the disabled adapter, or `start`, a frozen copy of the adapter as it is now.
        rest: further arguments of TRL's trainer. Rows have a `prompt` and what the reward function takes.
    """

    statistics = ("entropy",)

    def __init__(self, *, model: Any, args: Any, reward: Reward, reference: Start = "base", **rest: Any) -> None:
        self.compared_at_resume = {"reward function": reward.digest}
        beta, args.beta = args.beta, 0.0  # with a beta TRL would load the base a second time
        super().__init__(model=model, args=args, reward_funcs=reward, **rest)
        self.beta = args.beta = beta
        self.reference_state = reference_state(model, reference)
        self.ref_model = Reference(lambda: self.model, model.config, self.reference_state) if beta else None

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        """The prompts of each step, every one `num_generations` times, for every micro-batch of the step.

        The trainer samples the answers with the first of them, and ignores the others.
        """
        rows = dataset if dataset is not None else self.train_dataset
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        group = self.num_generations
        prompts = self.args.generation_batch_size // group
        self.sampler = _Groups(len(rows), seed, group, prompts, self.args.steps_per_generation)
        return self.sampler

    def _describe_rows(self, micro_batch: int) -> str:
        """The prompts of the current step, for a message."""
        sampler = self.sampler
        assert isinstance(sampler, _Groups)
        epoch, step = divmod(self.state.global_step, len(sampler.order(0)) // sampler.prompts)
        rows = sampler.order(epoch)[step * sampler.prompts : (step + 1) * sampler.prompts]
        return f"answers to the prompts {', '.join(map(str, rows))} of the training data (the first is 0)"

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log a line, without the seconds of a step, which no two runs share."""
        drop_metric(self, "step_time")
        set_tokens_seen(self, int(self.state.num_input_tokens_seen))
        super().log(logs, *args, **kwargs)


class _Groups(SeededSampler):
    """The rows of a seeded order in whole steps; a last one that is not full is left out.

    Args:
        rows: number of rows.
        seed: the run's seed.
        group: repetitions of a row in a step.
        prompts: rows of a step.
        repeats: repetitions of a step.
    """

    def __init__(self, rows: int, seed: int, group: int, prompts: int, repeats: int) -> None:
        super().__init__(rows, seed)
        self.group, self.prompts, self.repeats = group, prompts, repeats

    def __len__(self) -> int:
        return self.rows // self.prompts * self.prompts * self.group * self.repeats

    def __iter__(self) -> Iterator[int]:
        order = self.order(self.epoch)
        for start in range(0, self.rows // self.prompts * self.prompts, self.prompts):
            step = [row for row in order[start : start + self.prompts] for _ in range(self.group)]
            for _ in range(self.repeats):
                yield from step
