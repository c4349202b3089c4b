"""OpenAI's /v1/chat/completions and /v1/completions, where the model is the base or an adapter."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from lorary.serve.engine import AdapterCard, Engine
from lorary.serve.http import errors
from lorary.serve.http.bodies import read_body
from lorary.serve.http.errors import ApiError
from lorary.serve.http.models import adapters_of
from lorary.serve.http.openai_answers import Chat, Completion, Envelope, Interface, TokenTexts, usage
from lorary.serve.http.openai_bodies import ChatBody, CompletionBody, Generation
from lorary.serve.http.prompts import chat_prompt, read_messages, text_prompt, token_prompt
from lorary.serve.http.running import EventStream, Running, check_finished, collect, sse
from lorary.serve.http.security import caller
from lorary.serve.http.settings import Settings
from lorary.serve.request import Finished
from lorary.serve.request import Request as EngineRequest

Prompts = Callable[[list[AdapterCard]], Sequence[tuple[int, ...]]]


def openai_router(engine: Engine, settings: Settings) -> APIRouter:
    """The routes /v1/chat/completions and /v1/completions."""
    router, texts = APIRouter(), TokenTexts(engine.tokenizer)

    @router.post("/v1/chat/completions")
    async def chat(http: Request) -> Response:
        body = await read_body(http, ChatBody)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None

        def prompts(cards: list[AdapterCard]) -> Sequence[tuple[int, ...]]:
            return [chat_prompt(engine, cards, read_messages(body.messages)[0])]

        most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        running = await _start(engine, settings, http, body, prompts, most, logprobs)
        return await _respond(http, running, body, Chat(texts, body.logprobs))

    @router.post("/v1/completions")
    async def completions(http: Request) -> Response:
        body = await read_body(http, CompletionBody)

        def prompts(cards: list[AdapterCard]) -> Sequence[tuple[int, ...]]:
            return [
                text_prompt(engine, p, "prompt") if isinstance(p, str) else token_prompt(engine, p, "prompt")
                for p in body.prompt
            ]

        running = await _start(engine, settings, http, body, prompts, body.max_tokens, body.logprobs, default=16)
        echo = [p if isinstance(p, str) else engine.tokenizer.decode(p) for p in body.prompt] if body.echo else []
        echoed = [text for text in echo for _ in range(body.n)]
        return await _respond(http, running, body, Completion(texts, body.logprobs, echoed))

    return router


async def _start(
    engine: Engine,
    settings: Settings,
    http: Request,
    body: Generation,
    prompts: Prompts,
    most: int | None,
    logprobs: int | None,
    default: int | None = None,
) -> Running:
    """Submit the requests of a body: `n` for each prompt, of `most` tokens, or by default of `default` that fit."""
    adapters = adapters_of(engine, settings, body.model, body.adapters, body.lora_path)
    tenant = caller(http).tenant

    def make() -> list[EngineRequest]:
        cards = [engine.adapter(name) for name in adapters]
        rows = prompts(cards)
        if len(rows) * body.n > settings.choices:
            what = f"{len(rows)} prompts with `n` = {body.n}: more than the {settings.choices} answers of one request"
            raise ApiError(400, what, param="n")
        limit = next((card.max_context for card in cards if card.max_context), engine.max_context)
        lengths = [_max_tokens(len(row), most, default, limit) for row in rows]
        _check_tokens(engine, body)
        return [
            EngineRequest(row, adapters, body.sampling(length, logprobs, choice), tenant, body.deadline)
            for row, length in zip(rows, lengths, strict=True)
            for choice in range(body.n)
        ]

    return await Running.start(engine, make)


def _max_tokens(prompt: int, most: int | None, default: int | None, limit: int | None) -> int:
    """New tokens at most; those that the client asked for must fit the context, a default is cut to it."""
    wanted = most or default
    if limit is None:
        return wanted or 1024
    if prompt >= limit or (most and prompt + most > limit):
        asked = f" and {most} new ones were asked for" if most else ""
        what = f"the prompt has {prompt:,} tokens{asked}, and the context is {limit:,}: shorten the prompt"
        raise ApiError(400, what + (" or `max_tokens`" if most else ""), param="max_tokens" if most else None)
    return min(wanted or limit, limit - prompt)


def _check_tokens(engine: Engine, body: Generation) -> None:
    size = len(engine.tokenizer)
    for token in map(int, body.logit_bias):
        if token >= size:
            what = f"`logit_bias`: the token {token} is not one of the vocabulary's {size:,}"
            raise ApiError(400, what, param="logit_bias")


async def _respond(http: Request, running: Running, body: Generation, interface: Interface) -> Response:
    envelope = Envelope(interface, body.model)
    if body.stream:
        return EventStream(running, _events(running, body, envelope))
    answers = await collect(http, running)
    return JSONResponse(envelope.answer(answers, usage([answer.finished for answer in answers], body.n)))


async def _events(running: Running, body: Generation, envelope: Envelope) -> AsyncIterator[str]:
    """The chunks of a stream, in the order in which the tokens come."""
    interface, with_usage = envelope.interface, body.include_usage
    every_token = any(request.sampling.logprobs is not None for request in running.requests)

    def chunk(choice: dict[str, Any]) -> str:
        return sse(envelope.chunk([choice], with_usage=with_usage))

    firsts = map(interface.first, range(len(running.requests)))
    for first in firsts:
        if first is not None:
            yield chunk(first)
    finished: dict[int, Finished] = {}
    try:
        async for index, event in running:
            if isinstance(event, Finished):
                check_finished(event)
                finished[index] = event
                if event.text:
                    yield chunk(interface.piece(index, event.text, (), None))
                yield chunk(interface.piece(index, "", (), event.reason))
            elif event.text or every_token:
                yield chunk(interface.piece(index, event.text, (event,), None))
    except ApiError as error:  # the status is sent already
        yield errors.event(error)
    else:
        if with_usage:
            ends = [finished[index] for index in range(len(running.requests))]
            yield sse(envelope.chunk([], usage(ends, body.n), with_usage=True))
    yield "data: [DONE]\n\n"
