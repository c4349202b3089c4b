"""The interface of LoRAX and TGI: text to text, the adapter in `parameters.adapter_id`.

As theirs does, the generated text holds the stop string that ended it, and a stream has an event for each token, of
which the last carries the whole text; no `[DONE]` follows.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from lorary import __version__
from lorary.serve.http.bodies import Body, Name, NewTokens, Stops, Unsupported, check_body, read_json
from lorary.serve.http.continuation import Continuation, start
from lorary.serve.http.errors import ApiError, shaped_errors
from lorary.serve.http.models import adapters_of
from lorary.serve.http.prompts import chat_prompt, text_prompt
from lorary.serve.http.running import EventStream, Running, check_finished, collect, sse
from lorary.serve.http.settings import Settings
from lorary.serve.interface import AdapterCard, Engine
from lorary.serve.request import Finished, Sampling, Token

# Status -> their status and error type; others keep their status, and are errors of validation.
_ERRORS = {
    400: (422, "validation"),
    415: (422, "validation"),
    429: (429, "overloaded"),
    500: (424, "generation"),
    503: (503, "overloaded"),
}


class MergedAdapters(Body):
    """Several adapters for one request: the weighted sum of their updates, which is exact here."""

    UNSUPPORTED: ClassVar[Unsupported] = {
        "merge_strategy": (("linear",), "only `linear` is served; merge with `lorary mix` beforehand for another"),
        "density": ((0, 0.0, 1, 1.0), "is for the strategies that drop values, and only `linear` is served"),
        "majority_sign_method": (("total", "frequency"), "is for the strategy `ties`, and only `linear` is served"),
    }

    ids: Annotated[list[Name], Field(min_length=1)]
    weights: list[Annotated[float, Field(ge=-100, le=100)]]

    def problems(self) -> list[tuple[str, str]]:
        found = []
        if len(self.ids) != len(self.weights):
            found.append(("weights", f"{len(self.weights)} for {len(self.ids)} adapters"))
        if len(set(self.ids)) < len(self.ids):
            found.append(("ids", "an adapter is named twice"))
        return found


class Parameters(Body):
    """The parameters of generation."""

    UNSUPPORTED: ClassVar[Unsupported] = {
        "adapter_source": (("local",), "adapters come from this server only: load them first"),
        "api_token": ((), "the server downloads nothing for its clients"),
        "best_of": ((1,), "only one answer is generated: send the request several times"),
        "repetition_penalty": ((1, 1.0), "is not supported"),
        "frequency_penalty": ((0, 0.0), "is not supported here: use /v1/completions"),
        "typical_p": ((1, 1.0), "is not supported: use `top_p`"),
        "watermark": ((False,), "is not supported"),
        "decoder_input_details": ((False,), "log-probabilities of the prompt are not supported"),
        "response_format": ((), "constrained output is not supported"),
        "grammar": ((), "constrained output is not supported"),
        "schema": ((), "constrained output is not supported"),
    }
    IGNORED: ClassVar[frozenset[str]] = frozenset({"top_n_tokens"})

    adapter_id: str = ""
    merged_adapters: MergedAdapters | None = None
    do_sample: bool = False
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_k: Annotated[int, Field(ge=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    max_new_tokens: NewTokens | None = None
    ignore_eos_token: bool = False
    stop: Stops = ()
    truncate: Annotated[int, Field(ge=1)] | None = None
    details: bool = False
    return_full_text: bool = False
    return_k_alternatives: Annotated[int, Field(ge=1, le=20)] | None = None
    apply_chat_template: bool = False

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn: said outright, or by a parameter that matters to a draw only."""
        meant = self.do_sample or self.temperature != 1.0 or self.top_k is not None or self.top_p < 1.0
        return meant and self.temperature > 0

    def sampling(self) -> Sampling:
        """How tokens are drawn. A draw has a seed in any case: the details report it."""
        return Sampling(
            temperature=self.temperature if self.samples else 0.0,
            top_p=self.top_p,
            top_k=self.top_k or 0,
            seed=secrets.randbits(63) if self.seed is None and self.samples else self.seed,
            stop=self.stop,
            logprobs=self.return_k_alternatives or 0,
            ignore_eos=self.ignore_eos_token,
        )

    def adapters(self) -> tuple[str, dict[str, float]]:
        """(the one adapter, or the merged ones with their weights)."""
        merged = self.merged_adapters
        return self.adapter_id, dict(zip(merged.ids, merged.weights, strict=True)) if merged else {}

    def problems(self) -> list[tuple[str, str]]:
        if self.adapter_id and self.merged_adapters:
            return [("merged_adapters", "and `adapter_id`: keep one of them")]
        return []


class Generate(Body):
    """The body of LoRAX's routes."""

    inputs: Annotated[str, Field(min_length=1)]
    parameters: Parameters = Parameters()
    stream: bool = False


def error_response(error: ApiError) -> Response:
    """The error in LoRAX's shape."""
    status, _ = _ERRORS.get(error.status, (error.status, ""))
    return JSONResponse(_error(error), status, error.headers)


def _error(error: ApiError) -> dict[str, str]:
    return {"error": error.message, "error_type": _ERRORS.get(error.status, (0, "validation"))[1]}


def lorax_router(engine: Engine, settings: Settings) -> APIRouter:
    """The routes / (POST), /generate_stream and /info; /generate is in `lorary.serve.http.generate`."""
    router = APIRouter(route_class=shaped_errors(error_response))

    @router.post("/")
    async def compatible(http: HTTPRequest) -> Response:
        """What the clients of LoRAX and TGI call: /generate or /generate_stream, by `stream`; a list of one answer."""
        return await respond(engine, settings, http, in_list=True)

    @router.post("/generate_stream")
    async def generate_stream(http: HTTPRequest) -> Response:
        return await respond(engine, settings, http, stream=True)

    @router.get("/info")
    def info() -> dict[str, Any]:
        limit = engine.max_context
        return {
            "model_id": engine.name,
            "model_pipeline_tag": "text-generation",
            "max_best_of": 1,
            "max_input_length": limit and limit - 1,
            "max_total_tokens": limit,
            "version": __version__,
        }

    return router


async def respond(
    engine: Engine, settings: Settings, http: HTTPRequest, *, stream: bool | None = None, in_list: bool = False
) -> Response:
    """The answer to a request of LoRAX's interface.

    Args:
        engine, settings: of the server.
        http: the request.
        stream: whether to stream; None as its body says.
        in_list: whether the answer is the only item of a list.
    """
    body = check_body(await read_json(http), Generate)
    p = body.parameters
    name, merged = p.adapters()

    def prompt(cards: list[AdapterCard]) -> tuple[int, ...]:
        if p.apply_chat_template:
            tokens = chat_prompt(engine, cards, [{"role": "user", "content": body.inputs}], "inputs")
        else:
            tokens = text_prompt(engine, body.inputs, "inputs")
        return tokens[-p.truncate :] if p.truncate else tokens

    adapters = adapters_of(engine, settings, name or engine.name, merged, "")
    one = Continuation(prompt, adapters, p.sampling(), p.max_new_tokens)
    running = await start(engine, settings, http, [one], "max_new_tokens")
    shape = _Shape(engine.tokenizer, body, running.requests[0].sampling)
    if body.stream if stream is None else stream:
        return EventStream(running, shape.events(running))
    (answer,) = await collect(http, running)
    whole = shape.whole(answer.tokens, answer.finished)
    return JSONResponse([whole] if in_list else whole)


class _Shape:
    """Answers to one request in LoRAX's shape.

    Args:
        tokenizer: of the base.
        body: of the request.
        sampling: as it was submitted.
    """

    def __init__(self, tokenizer: Any, body: Generate, sampling: Sampling) -> None:
        self.tokenizer, self.body, self.sampling = tokenizer, body, sampling
        self.special = set(tokenizer.all_special_ids)

    def whole(self, tokens: list[Token], finished: Finished) -> dict[str, Any]:
        answer: dict[str, Any] = {"generated_text": self._text("".join(token.text for token in tokens), finished)}
        if self.body.parameters.details:
            details = self._details(finished)
            answer["details"] = details | {"prefill": [], "tokens": [self._token(token) for token in tokens]}
        return answer

    async def events(self, running: Running) -> AsyncIterator[str]:
        """One event for each token. The last one must say that it is the last: at the limit of new tokens it is known,
        and waits for the end; at a stop string or an end-of-sequence token, an event of that one follows.
        """
        texts: list[str] = []
        held: Token | None = None
        try:
            async for _, event in running:
                if isinstance(event, Token):
                    texts.append(event.text)
                    held = event
                    if len(texts) < self.sampling.max_tokens:
                        yield sse({"token": self._token(event), "generated_text": None, "details": None})
                else:
                    check_finished(event)
                    last = self._last(held, event, is_held=len(texts) == self.sampling.max_tokens)
                    text = self._text("".join(texts), event)
                    details = self._details(event) if self.body.parameters.details else None
                    yield sse({"token": last, "generated_text": text, "details": details})
        except ApiError as error:  # the status is sent already
            yield sse(_error(error))

    def _last(self, token: Token | None, finished: Finished, *, is_held: bool) -> dict[str, Any]:
        rest = finished.text + (finished.stop or "")
        if token is not None and is_held:
            return self._token(token) | {"text": token.text + rest}
        if token is None or _reason(finished) == "eos_token":
            eos = self.tokenizer.eos_token_id
            token = Token(-1 if eos is None else eos, "", 0.0)
        return self._token(token) | {"text": rest or (self.tokenizer.eos_token or ""), "special": not rest}

    def _text(self, text: str, finished: Finished) -> str:
        prompt = self.body.inputs if self.body.parameters.return_full_text else ""
        return prompt + text + finished.text + (finished.stop or "")

    def _details(self, finished: Finished) -> dict[str, Any]:
        return {
            "finish_reason": _reason(finished),
            "prompt_tokens": finished.prompt_tokens,
            "generated_tokens": finished.generated_tokens,
            "skipped_tokens": 0,
            "seed": self.sampling.seed if self.sampling.temperature > 0 else None,
        }

    def _token(self, token: Token) -> dict[str, Any]:
        found = {"id": token.id, "text": token.text, "logprob": token.logprob}
        found |= {"special": token.id in self.special, "skipped": False}
        if self.body.parameters.return_k_alternatives:
            found["alternative_tokens"] = [
                {"id": id, "text": self.tokenizer.decode([id]), "logprob": logprob} for id, logprob in token.top
            ]
        return found


def _reason(finished: Finished) -> str:
    if finished.reason == "length":
        return "length"
    return "eos_token" if finished.stop is None else "stop_sequence"
