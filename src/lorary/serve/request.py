"""A request to generate text, and what comes back for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

_numbers = itertools.count()


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, and when to stop.

    Args:
        max_tokens: new tokens at most.
        temperature: 0 takes the likeliest token.
        top_p: nucleus sampling; 1 for none.
        top_k: the likeliest tokens that are drawn from; 0 for all.
        seed: of the draw; None for a fresh one. The draw of a request with a seed depends on nothing but its logits.
        stop: strings that end the text; they are not part of it.
        logprobs: None, or how many of the likeliest tokens are reported beside each token that was drawn.
        ignore_eos: go on after the end-of-sequence token, for benchmarks.
        presence_penalty, frequency_penalty: as in OpenAI's interface, on the tokens generated so far.
        logit_bias: token -> a number that is added to its logit.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """A request: tokens to continue, the adapters to continue them with.

    Args:
        prompt: the tokens of the prompt.
        adapters: name -> weight of the adapters; empty for the base alone.
        sampling: how tokens are drawn.
        tenant: whose request it is, for fair shares.
        deadline: seconds after its arrival within which it must have begun; None for none.
        id: unique in this process.
    """

    prompt: tuple[int, ...]
    adapters: Mapping[str, float] = field(default_factory=dict)
    sampling: Sampling = Sampling()
    tenant: str = ""
    deadline: float | None = None
    id: str = field(default_factory=lambda: f"request-{next(_numbers)}")


@dataclass(frozen=True)
class Token:
    """A generated token.

    Args:
        id: the token.
        text: the text that it completes; empty within a character of several tokens, or while it may begin a stop
            string.
        logprob: the natural logarithm of its probability, if asked for; before temperature and truncation.
        top: (token, its logprob) of the likeliest tokens, as many as asked for.
    """

    id: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


FinishReason = Literal["stop", "length", "cancelled", "deadline", "refused", "error"]


@dataclass(frozen=True)
class Finished:
    """The end of a request; nothing follows it.

    Args:
        reason: "stop" at an end-of-sequence token or a stop string, "length" at `max_tokens` or a full context.
        text: text that was held back, in case that it began a stop string.
        prompt_tokens, cached_tokens, generated_tokens: its tokens; cached ones were not computed again.
        error: what went wrong, for the reasons "error", "deadline" and "refused": an adapter that cannot be served.
        stop: the stop string that ended it.
    """

    reason: FinishReason
    text: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    error: str = ""
    stop: str | None = None


Event = Token | Finished
Deliver = Callable[[Event], None]  # called in the engine's thread: it must be quick and must not raise
