"""The checks of a request: values out of range, prompts that are too long."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from lorary.errors import Diagnostic
from lorary.serve.request import Request, Sampling

_MOST_SHIFT = 1e6  # of a logit: far above all of them, and far below what fp32 holds
_SHIFT = f"be a number from -{_MOST_SHIFT:,.0f} to {_MOST_SHIFT:,.0f}"


def request_problems(request: Request, vocabulary: int) -> Iterator[Diagnostic]:
    """Values that are out of range.

    Args:
        request: the request.
        vocabulary: tokens of the base.
    """
    if not request.prompt:
        yield Diagnostic("prompt", "has no token")
    yield from _unknown_tokens("prompt", request.prompt, vocabulary)
    if request.deadline is not None and not request.deadline > 0:
        yield Diagnostic("deadline", f"is {request.deadline}, and must be a number above 0")
    yield from _sampling_problems(request.sampling, vocabulary)


def length_problems(request: Request, context: int | None, room: int | None) -> Iterator[Diagnostic]:
    """Why the prompt is too long.

    Args:
        request: the request.
        context: tokens that the base computes, with the request's adapters; None for any number.
        room: tokens that the memory for keys and values holds; None for any number.
    """
    tokens = len(request.prompt)
    if context is not None and tokens >= context:
        fix = "give a shorter one, or an adapter with a longer context"
        yield Diagnostic("prompt", f"has {tokens} tokens, and the context is {context}", fix)
    elif room is not None and tokens >= room:
        what = f"has {tokens} tokens, and the memory for keys and values holds {room}"
        yield Diagnostic("prompt", what, "give a shorter one, or the engine a larger budget")


def _sampling_problems(sampling: Sampling, vocabulary: int) -> Iterator[Diagnostic]:
    ranges = {
        "max_tokens": (sampling.max_tokens >= 1, "be at least 1"),
        "temperature": (0 <= sampling.temperature < math.inf, "be a number from 0 up"),
        "top_p": (0 < sampling.top_p <= 1, "be above 0 and at most 1"),
        "top_k": (sampling.top_k >= 0, "be at least 0"),
        "logprobs": ((sampling.logprobs or 0) >= 0, "be at least 0"),
        "presence_penalty": (abs(sampling.presence_penalty) <= _MOST_SHIFT, _SHIFT),
        "frequency_penalty": (abs(sampling.frequency_penalty) <= _MOST_SHIFT, _SHIFT),
    }
    for name, (fine, must) in ranges.items():
        if not fine:
            yield Diagnostic(name, f"is {getattr(sampling, name)}, and must {must}")
    if "" in sampling.stop:
        yield Diagnostic("stop", "holds an empty string")
    yield from _unknown_tokens("logit_bias", [*sampling.logit_bias], vocabulary)
    for token, value in sampling.logit_bias.items():
        if not abs(value) <= _MOST_SHIFT:
            yield Diagnostic("logit_bias", f"of token {token} is {value}, and must {_SHIFT}")


def _unknown_tokens(where: str, tokens: Sequence[int], vocabulary: int) -> Iterator[Diagnostic]:
    unknown = list(dict.fromkeys(token for token in tokens if not 0 <= token < vocabulary))
    if unknown:
        named = " and ".join(map(str, unknown[:3])) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        yield Diagnostic(where, f"has tokens that the base does not: {named}; it has 0 to {vocabulary - 1}")
