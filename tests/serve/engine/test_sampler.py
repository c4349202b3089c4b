"""Draws: greedy, by seed, truncated, penalised; logprobs; rows that are not finite."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from lorary.serve.engine.sampler import NOT_FINITE, Sampler, draw
from lorary.serve.request import Sampling

LOGITS = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 2


def sampler(**options: Any) -> Sampler:
    return Sampler(Sampling(**options))


def drawn(logits: Tensor, times: int, **options: Any) -> Counter[int]:
    """How often each token comes in that many draws of one request."""
    one = sampler(**options)
    return Counter(draw(logits[None], [one])[0].token for _ in range(times))


def test_greedy_rows_take_the_likeliest_token() -> None:
    found = draw(LOGITS, [sampler(temperature=0.0) for _ in LOGITS])
    assert [one.token for one in found] == LOGITS.argmax(-1).tolist()
    assert found[0].logprob is None
    assert not found[0].top


def test_draws_have_the_probabilities_of_the_softmax() -> None:
    found = drawn(LOGITS[0], 6000, temperature=1.5, seed=0)
    expected = (LOGITS[0] / 1.5).softmax(-1)
    assert all(abs(found[i] / 6000 - float(p)) < 0.02 for i, p in enumerate(expected))


@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_p": 0.7}, {"top_k": 8, "top_p": 0.5}, {"top_p": 1e-9}])
def test_truncation_keeps_the_tokens_that_transformers_keeps(options: dict[str, Any]) -> None:
    scores = LOGITS[:1] / 2.0
    if "top_k" in options:
        scores = TopKLogitsWarper(options["top_k"])(None, scores)
    if "top_p" in options:
        scores = TopPLogitsWarper(options["top_p"])(None, scores)
    kept = set(scores[0].isfinite().nonzero()[:, 0].tolist())
    probable = {i for i in kept if scores[0].softmax(-1)[i] > 0.01}
    found = set(drawn(LOGITS[0], 1500, temperature=2.0, seed=1, **options))
    assert probable <= found <= kept


@pytest.mark.parametrize("temperature", [1e-30, 1e-310, 5e-324])
@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.5}])
def test_the_lowest_temperatures_take_the_likeliest_token(temperature: float, options: dict[str, Any]) -> None:
    found = draw(LOGITS, [sampler(temperature=temperature, seed=3, **options) for _ in LOGITS])
    assert [one.token for one in found] == LOGITS.argmax(-1).tolist()


def test_seeds_of_either_sign_differ() -> None:
    first, second = sampler(seed=-1), sampler(seed=1)
    assert first.random.random() != second.random.random()


def test_a_draw_with_a_seed_does_not_depend_on_the_batch() -> None:
    settings = [
        {"seed": i, "temperature": 0.5 + i, "top_k": 10 * (i % 2), "top_p": (0.9, 1.0)[i % 3 > 0]} for i in range(6)
    ]
    together, alone = [sampler(**s) for s in settings], [sampler(**s) for s in settings]
    for _ in range(20):
        row = draw(LOGITS, together)
        assert row == [draw(LOGITS[i : i + 1], [one])[0] for i, one in enumerate(alone)]
    assert len({one.token for one in row}) > 1
    first, second = (drawn(LOGITS[0], 20, seed=seed) for seed in (1, 2))
    assert first != second
    assert drawn(LOGITS[0], 20) != drawn(LOGITS[0], 20), "without a seed each request has its own"


def test_logprobs_are_those_before_temperature_and_truncation() -> None:
    found = draw(LOGITS, [sampler(temperature=2.0, top_k=3, seed=i, logprobs=4) for i in range(len(LOGITS))])
    for one, logits in zip(found, LOGITS, strict=True):
        expected = logits.log_softmax(-1)
        assert one.logprob == pytest.approx(float(expected[one.token]))
        values, tokens = expected.topk(4)
        assert [token for token, _ in one.top] == tokens.tolist()
        assert [value for _, value in one.top] == pytest.approx(values.tolist())
    (none,) = draw(LOGITS[:1], [sampler(temperature=0.0, logprobs=0)])
    assert none.logprob is not None
    assert none.top == ()
    (all_of_them,) = draw(LOGITS[:1], [sampler(temperature=0.0, logprobs=500)])
    assert len(all_of_them.top) == 50


def test_penalties_count_the_tokens_generated_so_far() -> None:
    before, one = LOGITS.clone(), sampler(temperature=0.0, presence_penalty=0.5, frequency_penalty=0.25)
    logits, counts = LOGITS[0].clone(), Counter[int]()
    for _ in range(40):
        expected = logits.clone()
        for token, count in counts.items():
            expected[token] -= 0.5 + 0.25 * count
        (found,) = draw(LOGITS[:1], [one])
        assert found.token == int(expected.argmax())
        counts[found.token] += 1
    assert len(counts) > 3
    assert torch.equal(LOGITS, before)


def test_a_bias_moves_a_token() -> None:
    unlikely = int(LOGITS[0].argmin())
    first, second = draw(
        LOGITS[:1].repeat(2, 1), [sampler(temperature=0.0, logit_bias={unlikely: 100.0}), sampler(temperature=0.0)]
    )
    assert (first.token, second.token) == (unlikely, int(LOGITS[0].argmax()))
    likely = int(LOGITS[0].argmax())
    assert drawn(LOGITS[0], 200, seed=0, logit_bias={likely: -100.0})[likely] == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_fails_alone(value: float, temperature: float) -> None:
    broken = LOGITS.clone()
    broken[2, 7] = value
    settings = [{"temperature": temperature, "seed": i, "logprobs": 2} for i in range(6)]
    found = draw(broken, [sampler(**s) for s in settings])
    assert [one.error for one in found] == ["", "", NOT_FINITE, "", "", ""]
    right = draw(LOGITS, [sampler(**s) for s in settings])
    assert found[:2] + found[3:] == right[:2] + right[3:]


def test_a_token_that_is_masked_is_never_drawn() -> None:
    masked = LOGITS.clone()
    masked[:, 3:] = -torch.inf
    assert set(drawn(masked[0], 300, seed=0, temperature=5.0)) == {0, 1, 2}
    assert draw(masked[:1], [sampler(temperature=0.0)])[0].error == ""
