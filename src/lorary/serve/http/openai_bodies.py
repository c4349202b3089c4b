"""The bodies of OpenAI's /v1/chat/completions and /v1/completions, with the fields that select adapters."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field, PlainValidator

from lorary.files.strict_json import show
from lorary.serve.http.bodies import Body, Choices, Name, NewTokens, Stops, Unsupported
from lorary.serve.http.prompts import read_messages
from lorary.serve.request import Sampling

_LOGPROBS = 20

# OpenAI's own, and those that vLLM adds
_NEITHER: Unsupported = {
    "service_tier": (("auto", "default"), "there is one tier: leave it out"),
    "min_p": ((0, 0.0), "min-p sampling is not supported: use `top_p` or `top_k`"),
    "repetition_penalty": ((1, 1.0), "is not supported: use `presence_penalty` or `frequency_penalty`"),
    "length_penalty": ((1, 1.0), "beam search is not supported"),
    "use_beam_search": ((False,), "beam search is not supported"),
    "min_tokens": ((0,), "a least number of tokens is not supported"),
    "stop_token_ids": (([],), "is not supported: use `stop`"),
    "include_stop_str_in_output": ((False,), "is not supported: the stop string is never part of the answer"),
    "skip_special_tokens": ((True,), "special tokens are never part of the text"),
    "spaces_between_special_tokens": ((True,), "special tokens are never part of the text"),
    "prompt_logprobs": ((0,), "log-probabilities of the prompt are not supported"),
    "structured_outputs": (({},), "constrained output is not supported"),
    "guided_json": ((), "constrained output is not supported"),
    "guided_regex": ((), "constrained output is not supported"),
    "guided_choice": (([],), "constrained output is not supported"),
    "guided_grammar": ((), "constrained output is not supported"),
    "response_format": (({"type": "text"},), "constrained output is not supported: ask for it in the prompt"),
}
_OF_CHAT: Unsupported = {
    "tools": (([],), "tool calls are not supported"),
    "tool_choice": (("none", "auto"), "tool calls are not supported"),
    "parallel_tool_calls": ((True, False), ""),
    "functions": (([],), "tool calls are not supported"),
    "function_call": (("none", "auto"), "tool calls are not supported"),
    "modalities": ((["text"],), "only text is supported"),
    "audio": ((), "only text is supported"),
    "prediction": ((), "predicted outputs are not supported"),
    "reasoning_effort": ((), "is not supported: it depends on the model's chat template"),
    "verbosity": ((), "is not supported: ask for it in the prompt"),
    "web_search_options": ((), "there is no web search"),
    "moderation": ((), "there is no moderation"),
    "chat_template": ((), "templates of clients are not run: put one beside the adapter"),
    "chat_template_kwargs": (({},), "is not supported"),
    "documents": (([],), "is not supported: put them into a message"),
    "continue_final_message": ((False,), "is not supported: use /v1/completions"),
    "add_generation_prompt": ((True,), "is not supported: use /v1/completions"),
}


def _prompts(value: Any) -> list[str | list[int]]:
    """Each prompt of a text, a list of texts, token ids, or lists of token ids."""
    prompts = [value] if isinstance(value, str) or (value and _are_ids(value)) else value
    all_texts = isinstance(prompts, list) and all(isinstance(prompt, str) for prompt in prompts)
    if not all_texts and not (isinstance(prompts, list) and all(map(_are_ids, prompts))):
        raise ValueError("must be a text, a list of texts, token ids, or lists of token ids")
    if not prompts:
        raise ValueError("is empty")
    return list(prompts)


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(i) is int for i in value)


Prompts = Annotated[list[str | list[int]], PlainValidator(_prompts)]


class StreamOptions(Body):
    """The options of a stream."""

    UNSUPPORTED: ClassVar[Unsupported] = {"continuous_usage_stats": ((False,), "usage comes in one chunk, at the end")}
    IGNORED: ClassVar[frozenset[str]] = frozenset({"include_obfuscation"})

    include_usage: bool = False


class Generation(Body):
    """The fields that both interfaces share; the last ones are those of vLLM, SGLang and this server."""

    UNSUPPORTED: ClassVar[Unsupported] = _NEITHER
    IGNORED: ClassVar[frozenset[str]] = frozenset({"user", "safety_identifier", "priority", "request_id"})

    model: Name
    max_tokens: NewTokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stops = ()
    n: Choices = 1
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(default_factory=dict)
    stream: bool = False
    stream_options: StreamOptions | None = None
    top_k: Annotated[int, Field(ge=-1)] = 0
    ignore_eos: bool = False
    adapters: dict[Name, Annotated[float, Field(ge=-100, le=100)]] = Field(default_factory=dict)
    lora_path: str = ""
    deadline: Annotated[float, Field(gt=0, le=86_400)] | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def problems(self) -> list[tuple[str, str]]:
        found = []
        if self.stream_options is not None and not self.stream:
            found.append(("stream_options", "has no effect without `stream`: leave it out, or set `stream`"))
        found += [("logit_bias", f"{show(k)} is not a token id") for k in self.logit_bias if not _is_id(k)][:1]
        return found

    def sampling(self, logprobs: int | None) -> Sampling:
        """How tokens are drawn."""
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(0, self.top_k),
            seed=self.seed,
            stop=self.stop,
            logprobs=logprobs,
            ignore_eos=self.ignore_eos,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias={int(key): value for key, value in self.logit_bias.items()},
        )


class ChatBody(Generation):
    """The body of /v1/chat/completions."""

    UNSUPPORTED: ClassVar[Unsupported] = {**_NEITHER, **_OF_CHAT}
    IGNORED: ClassVar[frozenset[str]] = Generation.IGNORED | {
        *("metadata", "store", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
    }

    messages: list[dict[str, Any]]
    max_completion_tokens: NewTokens | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=_LOGPROBS)] | None = None

    def problems(self) -> list[tuple[str, str]]:
        found = [*super().problems(), *read_messages(self.messages)[1]]
        if self.top_logprobs is not None and not self.logprobs:
            found.append(("top_logprobs", "needs `logprobs`: true"))
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            found.append(("max_tokens", f"is {both[0]}, and `max_completion_tokens` is {both[1]}: keep one"))
        return found


class CompletionBody(Generation):
    """The body of /v1/completions."""

    UNSUPPORTED: ClassVar[Unsupported] = {
        **_NEITHER,
        "best_of": ((1,), "is not supported: use `n`"),
        "suffix": (("",), "filling in the middle is not supported"),
        "prompt_embeds": ((), "prompts are texts or token ids"),
    }

    prompt: Prompts
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=_LOGPROBS)] | None = None

    def problems(self) -> list[tuple[str, str]]:
        found = super().problems()
        if self.echo and self.logprobs is not None:
            found.append(("echo", "log-probabilities of the prompt are not supported: leave out `echo` or `logprobs`"))
        return found


def _is_id(key: str) -> bool:
    return key.isascii() and key.isdigit() and len(key) < 10
