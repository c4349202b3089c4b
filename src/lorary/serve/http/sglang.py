"""The interface of SGLang: texts or token ids to text, the adapter in `lora_path`; and its routes for adapters."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field, PlainValidator
from starlette.concurrency import run_in_threadpool

from lorary.serve.http.adapters import load_adapter, unload_adapter
from lorary.serve.http.bodies import Body, Choices, NewTokens, Stops, Unsupported, check_body, read_body, read_json
from lorary.serve.http.continuation import Continuation, start
from lorary.serve.http.errors import ApiError, shaped_errors
from lorary.serve.http.models import adapters_of, resolved_root, shown_folder
from lorary.serve.http.prompts import plain_prompt
from lorary.serve.http.running import DONE, Answer, EventStream, Running, collect, sse
from lorary.serve.http.security import require_admin
from lorary.serve.http.settings import Settings
from lorary.serve.interface import Engine
from lorary.serve.request import Finished, Sampling

_CONSTRAINED = "constrained output is not supported"
_ONLY_TEXT = "only text is supported"


class SamplingParams(Body):
    """The parameters of sampling."""

    UNSUPPORTED: ClassVar[Unsupported] = {
        "min_p": ((0, 0.0), "is not supported: use `top_p` or `top_k`"),
        "repetition_penalty": ((1, 1.0), "is not supported: use `presence_penalty` or `frequency_penalty`"),
        "min_new_tokens": ((0,), "a least number of tokens is not supported"),
        "stop_token_ids": (([],), "is not supported: use `stop`"),
        "stop_regex": ((), "is not supported: use `stop`"),
        "no_stop_trim": ((False,), "is not supported: the stop string is never part of the answer"),
        "skip_special_tokens": ((True,), "special tokens are never part of the text"),
        "spaces_between_special_tokens": ((True,), "special tokens are never part of the text"),
        "custom_params": (({},), "custom logit processors are not run"),
    } | dict.fromkeys(("json_schema", "regex", "ebnf", "structural_tag"), ((), _CONSTRAINED))
    IGNORED: ClassVar[frozenset[str]] = frozenset({"stream_interval"})

    max_new_tokens: NewTokens | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = -1
    stop: Stops = ()
    n: Choices = 1
    ignore_eos: bool = False
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    sampling_seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None

    def sampling(self, logprobs: int | None) -> Sampling:
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(0, self.top_k),
            seed=self.sampling_seed,
            stop=self.stop,
            logprobs=logprobs,
            ignore_eos=self.ignore_eos,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
        )


def _texts(value: Any) -> Any:
    if isinstance(value, str) or (value and _is_list(value, str)):
        return value
    raise ValueError("must be a text or a list of texts, and not empty")


def _ids(value: Any) -> Any:
    if value and (_is_list(value, int) or (_is_list(value, list) and all(_is_list(ids, int) for ids in value))):
        return value
    raise ValueError("must be token ids or lists of token ids, and not empty")


def _names(value: Any) -> Any:
    if isinstance(value, str) or _is_list(value, str, type(None)):
        return value
    raise ValueError("must be the name of an adapter, or a list of one for each prompt, null for the base")


def _is_list(value: Any, *kinds: type) -> bool:
    return isinstance(value, list) and all(type(item) in kinds for item in value)


class Generate(Body):
    """The body of SGLang's /generate."""

    UNSUPPORTED: ClassVar[Unsupported] = {
        "logprob_start_len": ((-1,), "log-probabilities of the prompt are not supported"),
        "token_ids_logprob": (([],), "is not supported: use `top_logprobs_num`"),
        "return_hidden_states": ((False,), "hidden states are not returned"),
        "custom_logit_processor": ((), "clients' code is not run"),
        "session_params": ((), "there are no sessions: send the whole prompt"),
        "input_embeds": ((), "prompts are texts or token ids"),
    } | dict.fromkeys(("image_data", "audio_data", "video_data"), ((), _ONLY_TEXT))
    IGNORED: ClassVar[frozenset[str]] = frozenset({"rid", "log_metrics", "no_logs", "priority", "lora_id"})

    text: Annotated[str | list[str] | None, PlainValidator(_texts)] = None
    input_ids: Annotated[list[int] | list[list[int]] | None, PlainValidator(_ids)] = None
    sampling_params: SamplingParams = SamplingParams()
    lora_path: Annotated[str | list[str | None], PlainValidator(_names)] = ""
    return_logprob: bool = False
    top_logprobs_num: Annotated[int, Field(ge=0, le=20)] = 0
    return_text_in_logprobs: bool = False
    stream: bool = False

    @property
    def single(self) -> bool:
        """Whether there is one prompt, not a list of them."""
        return isinstance(self.text, str) or (self.input_ids is not None and isinstance(self.input_ids[0], int))

    def prompts(self) -> list[Any]:
        """The texts or lists of token ids."""
        given = self.text if self.input_ids is None else self.input_ids
        return [given] if self.single else list(given or ())

    def names(self) -> list[str]:
        """The adapter of each prompt; "" for the base."""
        if isinstance(self.lora_path, str):
            return [self.lora_path] * len(self.prompts())
        return [name or "" for name in self.lora_path]

    def problems(self) -> list[tuple[str, str]]:
        if (self.text is None) == (self.input_ids is None):
            return [("text", "or `input_ids`: exactly one of them is needed")]
        if len(self.names()) != len(self.prompts()):
            return [("lora_path", f"{len(self.names())} adapters for {len(self.prompts())} prompts")]
        return []


async def respond(engine: Engine, settings: Settings, http: Request) -> Response:
    """The answer to a request of SGLang's interface."""
    begun = time.perf_counter()
    body = check_body(await read_json(http), Generate)
    params, field = body.sampling_params, "text" if body.input_ids is None else "input_ids"
    sampling = params.sampling(body.top_logprobs_num if body.return_logprob else None)
    each = [
        Continuation(
            partial(plain_prompt, engine, prompt, field),
            adapters_of(engine, settings, engine.name, {}, name),
            sampling,
            params.max_new_tokens,
            128,  # SGLang's default
            params.n,
        )
        for prompt, name in zip(body.prompts(), body.names(), strict=True)
    ]
    running = await start(engine, settings, http, each, "max_new_tokens")
    shape = _Shape(engine.tokenizer, body, running, begun)
    if body.stream:
        return EventStream(running, shape.events())
    answers = [shape.answer(i, answer, answer.finished) for i, answer in enumerate(await collect(http, running))]
    return JSONResponse(answers[0] if shape.single else answers)


class _Shape:
    """Answers to the requests of one body in SGLang's shape.

    Args:
        tokenizer: of the base.
        body: of the request.
        running: its requests.
        begun: when it came, on `time.perf_counter`.
    """

    def __init__(self, tokenizer: Any, body: Generate, running: Running, begun: float) -> None:
        self.tokenizer, self.body, self.running, self.begun = tokenizer, body, running, begun
        self.single = body.single and body.sampling_params.n == 1

    def answer(self, index: int, answer: Answer, finished: Finished | None) -> dict[str, Any]:
        """An answer, whole or as far as it has come."""
        meta: dict[str, Any] = {
            "id": self.running.requests[index].id,
            "finish_reason": None if finished is None else self._reason(finished),
            "prompt_tokens": len(self.running.requests[index].prompt),
            "completion_tokens": len(answer.tokens) if finished is None else finished.generated_tokens,
            "cached_tokens": 0 if finished is None else finished.cached_tokens,
            "e2e_latency": time.perf_counter() - self.begun,
        }
        if self.body.return_logprob:
            meta["input_token_logprobs"] = []
            meta["output_token_logprobs"] = [self._logprob(token.id, token.logprob) for token in answer.tokens]
            if self.body.top_logprobs_num:
                meta["output_top_logprobs"] = [[self._logprob(*pair) for pair in token.top] for token in answer.tokens]
        return {"text": answer.text, "output_ids": [token.id for token in answer.tokens], "meta_info": meta}

    async def events(self) -> AsyncIterator[str]:
        """Events that each hold the whole answer so far, as SGLang's do; with its `index` if there are several."""
        answers = [Answer(finished=Finished("stop")) for _ in self.running.requests]
        try:
            async for index, event in self.running:
                answers[index].take(event)
                finished = event if isinstance(event, Finished) else None
                number = {} if self.single else {"index": index}
                yield sse(self.answer(index, answers[index], finished) | number)
        except ApiError as error:  # the status is sent already
            yield sse(error.body())
        yield DONE

    def _reason(self, finished: Finished) -> dict[str, Any]:
        if finished.reason == "length":
            return {"type": "length", "length": finished.generated_tokens}
        matched = self.tokenizer.eos_token_id if finished.stop is None else finished.stop
        return {"type": "stop", "matched": matched}

    def _logprob(self, id: int, logprob: float | None) -> list[Any]:
        return [logprob, id, self.tokenizer.decode([id]) if self.body.return_text_in_logprobs else None]


class _Load(Body):
    IGNORED: ClassVar[frozenset[str]] = frozenset({"lora_id"})

    lora_name: Annotated[str, Field(min_length=1)]
    lora_path: Annotated[str, Field(min_length=1)]
    pinned: bool = False


class _Unload(Body):
    IGNORED: ClassVar[frozenset[str]] = frozenset({"lora_id"})

    lora_name: Annotated[str, Field(min_length=1)]


def sglang_router(engine: Engine, settings: Settings) -> APIRouter:
    """SGLang's routes for adapters; /generate is in `lorary.serve.http.generate`."""
    below = resolved_root(settings)

    def outcome(error: ApiError | None = None) -> Response:
        cards = (card for card in engine.adapters() if card.state != "on disk")
        loaded = {card.name: shown_folder(card.folder, below) for card in cards}
        body = {"success": error is None, "error_message": error and error.message, "loaded_adapters": loaded}
        return JSONResponse(body, error.status if error else 200, error.headers if error else None)

    router = APIRouter(route_class=shaped_errors(outcome))

    @router.post("/load_lora_adapter")
    async def load(http: Request) -> Response:
        require_admin(http)
        body = await read_body(http, _Load)
        name, path = body.lora_name, body.lora_path
        await run_in_threadpool(load_adapter, engine, settings, name, path, pinned=body.pinned)
        return outcome()

    @router.post("/unload_lora_adapter")
    async def unload(http: Request) -> Response:
        require_admin(http)
        body = await read_body(http, _Unload)
        await run_in_threadpool(unload_adapter, engine, settings, body.lora_name)
        return outcome()

    @router.post("/load_lora_adapter_from_tensors")
    async def load_from_tensors(http: Request) -> Response:
        require_admin(http)
        what = "serialised tensors are not read from requests: reading them can run code. Put the adapter below the"
        raise ApiError(400, f"{what} root of the adapters, as safetensors, and use /load_lora_adapter")

    @router.get("/get_model_info")
    def model_info() -> dict[str, Any]:
        return {"model_path": engine.name, "tokenizer_path": engine.name, "is_generation": True}

    return router
