"""The answers of OpenAI's interface: whole ones, chunks of streams, log-probabilities, usage."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from lorary.serve.http.running import Answer
from lorary.serve.request import Finished, Token

Object = dict[str, Any]  # of JSON


class TokenTexts:
    """The texts of single tokens, as they are in the middle of a text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._before = tokenizer("a", add_special_tokens=False)["input_ids"][:1]
        self._length = len(self._decode([]))  # some tokenizers drop the space before the first word

    def __call__(self, id: int) -> str:
        return self._decode([id])[self._length :]

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode([*self._before, *ids], clean_up_tokenization_spaces=False))


class Interface(Protocol):
    """One of the two shapes of answers.

    Attributes:
        OBJECT, CHUNK, PREFIX: the `object` of answers and of chunks, and the beginning of their ids.
    """

    OBJECT: str
    CHUNK: str
    PREFIX: str

    def first(self, index: int) -> Object | None:
        """The choice of the first chunk; None for none."""
        ...

    def piece(self, index: int, text: str, tokens: Sequence[Token], reason: str | None) -> Object:
        """The choice of a chunk."""
        ...

    def whole(self, index: int, text: str, tokens: Sequence[Token], reason: str | None) -> Object:
        """A choice of an answer."""
        ...


class Chat:
    """The shape of /v1/chat/completions.

    Args:
        texts: of tokens.
        logprobs: whether the request asked for log-probabilities.
    """

    OBJECT, CHUNK, PREFIX = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def __init__(self, texts: TokenTexts, logprobs: bool) -> None:
        self.texts, self.logprobs = texts, logprobs

    def first(self, index: int) -> Object | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, index: int, text: str, tokens: Sequence[Token], reason: str | None) -> Object:
        delta = {"content": text} if text or tokens else {}
        return {"index": index, "delta": delta, "logprobs": self._logprobs(tokens), "finish_reason": reason}

    def whole(self, index: int, text: str, tokens: Sequence[Token], reason: str | None) -> Object:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._logprobs(tokens), "finish_reason": reason}

    def _logprobs(self, tokens: Sequence[Token]) -> Object | None:
        if not self.logprobs or not tokens:
            return None
        content = [
            self._one(token.id, token.logprob) | {"top_logprobs": [self._one(*pair) for pair in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _one(self, id: int, logprob: float | None) -> Object:
        text = self.texts(id)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}


class Completion:
    """The shape of /v1/completions.

    Args:
        texts: of tokens.
        logprobs: how many of the likeliest tokens the request asked for; None for no log-probabilities.
        echo: the texts of the prompts, if each choice begins with its own.
    """

    OBJECT, CHUNK, PREFIX = "text_completion", "text_completion", "cmpl-"

    def __init__(self, texts: TokenTexts, logprobs: int | None, echo: Sequence[str] = ()) -> None:
        self.texts, self.logprobs, self.echo = texts, logprobs, echo
        self._offsets: dict[int, int] = {}

    def first(self, index: int) -> Object | None:
        return self.piece(index, self.echo[index], (), None) if self.echo else None

    def piece(self, index: int, text: str, tokens: Sequence[Token], reason: str | None) -> Object:
        return {"index": index, "text": text, "logprobs": self._logprobs(index, tokens), "finish_reason": reason}

    def whole(self, index: int, text: str, tokens: Sequence[Token], reason: str | None) -> Object:
        return self.piece(index, (self.echo[index] if self.echo else "") + text, tokens, reason)

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> Object | None:
        if self.logprobs is None or not tokens:
            return None
        texts, offsets = [self.texts(token.id) for token in tokens], []
        for text in texts:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(text)
        top = [{self.texts(id): _finite(logprob) for id, logprob in reversed(token.top)} for token in tokens]
        return {
            "text_offset": offsets,
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "tokens": texts,
            "top_logprobs": top if self.logprobs else None,
        }


class Envelope:
    """The fields of answers and chunks around their choices."""

    def __init__(self, interface: Interface, model: str) -> None:
        self.interface = interface
        self._common = {"id": f"{interface.PREFIX}{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def answer(self, answers: Sequence[Answer], used: Object) -> Object:
        """The whole answer."""
        choices = [
            self.interface.whole(i, answer.text, answer.tokens, answer.finished.reason)
            for i, answer in enumerate(answers)
        ]
        return {**self._common, "object": self.interface.OBJECT, "choices": choices, "usage": used}

    def chunk(self, choices: list[Object], used: Object | None = None, *, with_usage: bool = False) -> Object:
        """A chunk; with `with_usage` it says that its usage comes later."""
        chunk = {**self._common, "object": self.interface.CHUNK, "choices": choices}
        return chunk | ({"usage": used} if with_usage else {})


def _finite(logprob: float | None) -> float | None:
    """JSON has no infinities: OpenAI writes -9999 for a token that is impossible."""
    return None if logprob is None else max(logprob, -9999.0)


def usage(finished: Sequence[Finished], n: int) -> Object:
    """The tokens of all choices, where each prompt has `n` of them and counts once."""
    prompt = sum(one.prompt_tokens for one in finished[::n])
    generated = sum(one.generated_tokens for one in finished)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in finished[::n])},
    }
