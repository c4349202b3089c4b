"""The learning rate by model size and family: Tinker's rule, and what was measured outside of its range.

    lr = 5e-5 * 10 * (2000 / H)^P        H: hidden size; P: 0.781 for Llama, 0.0775 for Qwen

5e-5 is a rate of full fine-tuning, 10 is LoRA's factor over it (15 in runs of under 100 steps, as B starts at zero).
A public sweep of 35 models (batch 128, 780 steps) puts the best fixed rate at 3e-4: median regret 0.00 %, 2.6 % at
most.

The rate follows the square root of the batch. A batch is counted in tokens in the loss, which decide how noisy its
gradient is: 16 short answers are a smaller batch than 16 texts. Between 4 answers of 64 tokens, the least batch that is
advised for ordinary answers, and the sweep (128 rows of about 500) one rate serves. The lower end was measured on two
small tasks with three epochs, where the best evaluation is kept and a rate that is too high costs little; where rows
are seen once it has not been measured. The factor for short runs is left out where rows are seen again: these overfit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FULL_FINE_TUNING, FACTOR = 5e-5, 10.0
EXPONENTS = {"llama": 0.781, "qwen": 0.0775}
FIXED = 3e-4  # for other families
SWEPT = 1000  # the least hidden size in the sweep, about
SHORT, SHORT_FACTOR = 100, 1.5  # steps; 15 / 10
HIGHEST = 1.0  # that a configuration takes
TOKENS = (4 * 64, 128 * 512)  # in the loss of a step: the least batch of ordinary answers, and the sweep

TINKER = "Tinker's rule, tinker-cookbook hyperparam_utils.py"
SWEEP = "sweep of 35 models, tinker-cookbook sft_sweep.md"
BUILTIN = "measured on builtin:base, benchmarks/advice.py"


@dataclass(frozen=True)
class Rate:
    """A learning rate with its derivation.

    Args:
        value: of LoRA, for the task `sft`.
        reason: the derivation in one sentence.
        source: of the rule.
        extrapolated: whether the model is smaller than those of the sweep.
    """

    value: float
    reason: str
    source: str
    extrapolated: bool


def lora_rate(family: str, hidden: int, tokens: int, steps: int, *, repeats: bool = False) -> Rate:
    """LoRA's learning rate in supervised fine-tuning.

    Args:
        family: the model's type as Transformers names it, such as `qwen3`.
        hidden: its hidden size.
        tokens: in the loss of an optimizer step.
        steps: optimizer steps of the run.
        repeats: whether rows are seen more than once.

    >>> round(lora_rate("llama", 4096, 8192, 1000).value, 6), lora_rate("gemma3_text", 2560, 8192, 1000).value
    (0.000286, 0.0003)
    """
    name = next((known for known in EXPONENTS if family.startswith(known)), None)
    small = hidden < SWEPT
    if name is not None:
        P = EXPONENTS[name]
        value = FULL_FINE_TUNING * FACTOR * (2000 / hidden) ** P
        reason = f"{name.capitalize()}, hidden size {hidden:,}: 10 x 5e-5 x (2000/{hidden})^{P:g} = {value:.2g}"
        source = TINKER
    else:
        value = FIXED * max(1.0, SWEPT / hidden) ** EXPONENTS["llama"]
        reason = f"no rule for the family `{family}`: {FIXED:g}, the best single rate of the sweep"
        reason += f", times ({SWEPT}/{hidden})^0.781 for a hidden size below {SWEPT:,}" if small else ""
        source = SWEEP
    factor = batch_factor(tokens)
    if factor != 1:
        reason += f"; x sqrt({tokens}/{TOKENS[factor > 1]}) for {tokens:,} tokens in the loss of a step"
    if steps < SHORT and not repeats:
        factor *= SHORT_FACTOR
        reason += f"; x {SHORT_FACTOR:g} for fewer than {SHORT} steps"
    return Rate(value * factor, reason, source, small)


def batch_factor(tokens: int) -> float:
    """The factor of the rate for a smaller or larger batch than those between which one rate serves."""
    least, most = TOKENS
    return math.sqrt(tokens / min(max(tokens, least), most))


def rounded(rate: float) -> float:
    """A rate with two digits.

    >>> rounded(0.00028614)
    0.00029
    """
    return float(f"{rate:.2g}")
