"""Prompts to continue, which the bodies of all interfaces come down to, and their requests to the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from fastapi import Request as HTTPRequest

from lorary.serve.http.errors import ApiError
from lorary.serve.http.running import Running
from lorary.serve.http.security import caller
from lorary.serve.http.settings import Settings
from lorary.serve.interface import AdapterCard, Engine
from lorary.serve.request import Request, Sampling


@dataclass(frozen=True)
class Continuation:
    """A prompt to continue.

    Args:
        prompt: its tokens, by the cards of its adapters, whose chat template it may need; called in another thread.
        adapters: name -> weight; empty for the base alone.
        sampling: how tokens are drawn, but for `max_tokens`, which is set from the next two.
        most: new tokens at most, as the client asked: they must fit the context. None for no wish.
        default: instead of None; cut to what fits. None for the whole context.
        n: how many answers; with a seed, each has a seed of its own.
        deadline: see `Request`.
    """

    prompt: Callable[[list[AdapterCard]], tuple[int, ...]]
    adapters: Mapping[str, float]
    sampling: Sampling
    most: int | None = None
    default: int | None = None
    n: int = 1
    deadline: float | None = None

    def requests(self, engine: Engine, tenant: str, field: str) -> list[Request]:
        """The `n` requests to the engine.

        Raises:
            LoraryError: an adapter is unknown, or the prompt does not fit.
        """
        cards = [engine.adapter(name) for name in self.adapters]
        prompt = self.prompt(cards)
        limit = next((card.max_context for card in cards if card.max_context), engine.max_context)
        length, seed = self._max_tokens(len(prompt), limit, field), self.sampling.seed
        seeds = [None if seed is None else (seed + choice) % 2**63 for choice in range(self.n)]
        return [
            Request(prompt, self.adapters, replace(self.sampling, max_tokens=length, seed=seed), tenant, self.deadline)
            for seed in seeds
        ]

    def _max_tokens(self, prompt: int, limit: int | None, field: str) -> int:
        most, wanted = self.most, self.most or self.default
        if limit is None:
            return wanted or 1024
        if prompt >= limit or (most and prompt + most > limit):
            asked = f" and {most} new ones were asked for" if most else ""
            what = f"the prompt has {prompt:,} tokens{asked}, and the context is {limit:,}: shorten the prompt"
            raise ApiError(400, what + (f" or `{field}`" if most else ""), param=field if most else None)
        return min(wanted or limit, limit - prompt)


async def start(
    engine: Engine,
    settings: Settings,
    http: HTTPRequest,
    continuations: Sequence[Continuation],
    field: str = "max_tokens",
) -> Running:
    """Submit continuations: first all answers to the first one, then those to the next.

    Args:
        engine, settings: of the server.
        http: the client's request.
        continuations: what it asks for.
        field: what its interface calls the number of new tokens.

    Raises:
        LoraryError: one of them cannot be served; then none is.
    """
    tenant = caller(http).tenant
    answers = sum(one.n for one in continuations)
    if answers > settings.choices:
        what = f"{len(continuations)} prompts with `n` = {continuations[0].n}: more than the {settings.choices} answers"
        raise ApiError(400, f"{what} of one request", param="n")
    size = len(engine.tokenizer)
    for token in (token for one in continuations for token in one.sampling.logit_bias if token >= size):
        what = f"`logit_bias`: the token {token} is not one of the vocabulary's {size:,}"
        raise ApiError(400, what, param="logit_bias")
    return await Running.start(
        engine, lambda: [r for one in continuations for r in one.requests(engine, tenant, field)]
    )
