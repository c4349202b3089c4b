"""The next tokens of a batch, each drawn as its own request says.

A draw depends on nothing but the request's logits and its seed: one uniform number of the request's own generator, and
the inverse of the cumulative distribution. Logits themselves differ in the last bits between batches.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorary.serve.request import Sampling

NOT_FINITE = "the logits are not finite: a weight of the adapter, or of the base, is too large"


_BELOW_ONE = 1 - 2**-40  # so that rounding cannot reach the end of the distribution, where tokens may have no weight


class Drawn(NamedTuple):
    """A token that was drawn.

    Args:
        token: the token; -1 if there is none.
        logprob: the natural logarithm of its probability before temperature and truncation, if asked for.
        top: (token, its logprob) of the likeliest tokens.
        error: why there is no token.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    error: str = ""


class Sampler:
    """The random numbers and the token counts of one request."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        seed = sampling.seed  # `random` takes -1 for 1, and answers with consecutive seeds are to differ
        self.random = random.Random(2**64 - seed if seed is not None and seed < 0 else seed)
        self.counts: Counter[int] = Counter()

    @property
    def shifts(self) -> dict[int, float]:
        """Token -> what is added to its logit: the bias, and the penalties of the tokens generated so far."""
        sampling, shifts = self.sampling, dict(self.sampling.logit_bias)
        if sampling.presence_penalty or sampling.frequency_penalty:
            for token, count in self.counts.items():
                penalty = sampling.presence_penalty + sampling.frequency_penalty * count
                shifts[token] = shifts.get(token, 0.0) - penalty
        return shifts


def draw(logits: Tensor, samplers: Sequence[Sampler]) -> list[Drawn]:
    """The next token of every request.

    Args:
        logits: [requests, vocabulary], fp32; unchanged.
        samplers: of the requests.
    """
    scores = logits
    for row, sampler in enumerate(samplers):
        if shifts := sampler.shifts:
            scores = logits.clone() if scores is logits else scores
            tokens = torch.tensor(list(shifts), device=logits.device)
            scores[row, tokens] += torch.tensor(list(shifts.values()), device=logits.device)
    tokens = scores.argmax(-1)
    for truncated in (False, True):  # apart: whether a row is sorted may not depend on the others
        chosen_rows = [row for row, sampler in enumerate(samplers) if _draws(sampler.sampling, truncated)]
        if chosen_rows:
            rows = torch.tensor(chosen_rows, device=logits.device)
            tokens[rows] = _sampled(scores[rows], [samplers[row] for row in chosen_rows], truncated)
    finite = logits.amax(-1).isfinite()  # NaN is the greatest of all; -inf is fine beside finite ones
    chosen, fine = torch.stack([tokens, finite.long()]).tolist()
    drawn = [Drawn(token) if ok else Drawn(-1, error=NOT_FINITE) for token, ok in zip(chosen, fine, strict=True)]
    for row, sampler in enumerate(samplers):
        sampler.counts[drawn[row].token] += 1
        if sampler.sampling.logprobs is not None and fine[row]:
            drawn[row] = _with_logprobs(drawn[row].token, logits[row], sampler.sampling.logprobs)
    return drawn


def _draws(sampling: Sampling, truncated: bool) -> bool:
    """Whether tokens are drawn, from the likeliest ones alone or from all."""
    return sampling.temperature > 0 and (sampling.top_k > 0 or sampling.top_p < 1) is truncated


def _sampled(scores: Tensor, samplers: Sequence[Sampler], truncated: bool) -> Tensor:
    """Draws with temperature, top-k and top-p, in this order, the last two if `truncated`: [rows]."""

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=scores.device)[:, None]

    settings = [sampler.sampling for sampler in samplers]
    scores = scores.double()
    # from the greatest, so that no temperature is so low that the quotients are infinite
    scores = (scores - scores.amax(-1, keepdim=True)) / column([one.temperature for one in settings])
    order: Tensor | None = None
    if truncated:
        scores, order = scores.sort(dim=-1, descending=True, stable=True)
        most = column([one.top_k or scores.shape[-1] for one in settings])
        scores = scores.masked_fill(torch.arange(scores.shape[-1], device=scores.device) >= most, -torch.inf)
        probabilities = scores.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # of the likelier ones: the likeliest is always kept
        scores = scores.masked_fill(
            before >= column([one.top_p if one.top_p < 1 else 2.0 for one in settings]), -torch.inf
        )
    total = scores.softmax(-1).nan_to_num().cumsum(-1)
    uniform = column([sampler.random.random() * _BELOW_ONE for sampler in samplers])
    places = torch.searchsorted(total, uniform * total[:, -1:], right=True)
    places = places.clamp(max=scores.shape[-1] - 1)
    return (places if order is None else order.gather(-1, places))[:, 0]


def _with_logprobs(token: int, logits: Tensor, top: int) -> Drawn:
    logprobs = logits.log_softmax(-1)
    values, tokens = logprobs.topk(min(top, logprobs.shape[-1]))
    likeliest = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
    return Drawn(token, float(logprobs[token]), likeliest)
