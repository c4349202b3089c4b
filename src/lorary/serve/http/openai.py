"""OpenAI's /v1/chat/completions and /v1/completions, where the model is the base or an adapter."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from lorary.serve.http.bodies import read_body
from lorary.serve.http.continuation import Continuation, start
from lorary.serve.http.errors import ApiError
from lorary.serve.http.models import adapters_of
from lorary.serve.http.openai_answers import Chat, Completion, Envelope, Interface, TokenTexts, usage
from lorary.serve.http.openai_bodies import ChatBody, CompletionBody, Generation
from lorary.serve.http.prompts import chat_prompt, plain_prompt, read_messages
from lorary.serve.http.running import DONE, EventStream, Running, check_finished, collect, sse
from lorary.serve.http.settings import Settings
from lorary.serve.interface import AdapterCard, Engine
from lorary.serve.request import Finished


def openai_router(engine: Engine, settings: Settings) -> APIRouter:
    """The routes /v1/chat/completions and /v1/completions."""
    router, texts = APIRouter(), TokenTexts(engine.tokenizer)

    @router.post("/v1/chat/completions")
    async def chat(http: Request) -> Response:
        body = await read_body(http, ChatBody)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        adapters = adapters_of(engine, settings, body.model, body.adapters, body.lora_path)

        def prompt(cards: list[AdapterCard]) -> tuple[int, ...]:
            return chat_prompt(engine, cards, read_messages(body.messages)[0])

        one = Continuation(prompt, adapters, body.sampling(logprobs), most, None, body.n, body.deadline)
        running = await start(engine, settings, http, [one])
        return await _respond(http, running, body, Chat(texts, body.logprobs))

    @router.post("/v1/completions")
    async def completions(http: Request) -> Response:
        body = await read_body(http, CompletionBody)
        sampling = body.sampling(body.logprobs)
        adapters = adapters_of(engine, settings, body.model, body.adapters, body.lora_path)
        prompts = [partial(plain_prompt, engine, prompt, "prompt") for prompt in body.prompt]
        each = [Continuation(p, adapters, sampling, body.max_tokens, 16, body.n, body.deadline) for p in prompts]
        running = await start(engine, settings, http, each)
        echo = [p if isinstance(p, str) else engine.tokenizer.decode(p) for p in body.prompt] if body.echo else []
        echoed = [text for text in echo for _ in range(body.n)]
        return await _respond(http, running, body, Completion(texts, body.logprobs, echoed))

    return router


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
        yield sse(error.body())
    else:
        if with_usage:
            ends = [finished[index] for index in range(len(running.requests))]
            yield sse(envelope.chunk([], usage(ends, body.n), with_usage=True))
    yield DONE
