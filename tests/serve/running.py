"""Engines in tests: a tokenizer for tiny vocabularies, adapters as after training, and the answers to requests."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import lorary
from lorary.serve.interface import Engine
from lorary.serve.request import Event, Finished, Request, Token
from tests import tiny


def words(size: int) -> Any:
    """A tokenizer with one word for each token: w0 w1 ..."""
    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def saved_adapter(base: Any, method: lorary.Method, folder: Path, targets: Any = None, size: float = 0.3) -> str:
    """The folder of an adapter as after training; it uses up the base."""
    plan = lorary.plan(base, method) if targets is None else lorary.plan(base, method, targets)
    lorary.save(tiny.shaken(lorary.attach(base, plan, data=tiny.data_for(plan)), size), folder)
    return str(folder)


@dataclass
class Answer:
    """What came back for a request."""

    tokens: list[Token] = field(default_factory=list)
    finished: Finished | None = None
    events: int = 0
    over: threading.Event = field(default_factory=threading.Event)

    def deliver(self, event: Event) -> None:
        assert self.finished is None, "something came after the end"
        self.events += 1
        if isinstance(event, Token):
            self.tokens.append(event)
        else:
            self.finished = event
            self.over.set()

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens) + (self.finished.text if self.finished else "")

    @property
    def end(self) -> Finished:
        assert self.over.wait(60), "no end after a minute"
        assert self.finished is not None
        return self.finished


def submitted(engine: Engine, request: Request) -> Answer:
    """The answer to a request, as it comes."""
    answer = Answer()
    engine.submit(request, answer.deliver)
    return answer


def answers(engine: Engine, requests: Iterable[Request]) -> list[Answer]:
    """The answers to requests that are submitted at once, when all have ended."""
    found = [submitted(engine, request) for request in requests]
    assert all(answer.end for answer in found)
    return found


def difference(found: Answer, expected: Answer, tie: float = 1e-4) -> str:
    """How an answer differs from another, whose tokens have the logprobs of the two likeliest; empty if it does not.

    Where these two are as likely as each other to `tie`, either is right, and nothing after it is compared.
    """
    for place, (own, other) in enumerate(zip(found.tokens, expected.tokens, strict=False)):
        if own.id != other.id:
            (_, first), (_, second) = other.top[:2]
            return "" if first - second < tie else f"token {place} is {own.id}, not {other.id}"
    ends: Sequence[Any] = [(len(a.tokens), a.end.reason, a.end.error) for a in (found, expected)]
    return "" if ends[0] == ends[1] else f"it ended as {ends[0]}, not {ends[1]}"
