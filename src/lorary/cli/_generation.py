"""Text generation of `lorary generate` and `lorary chat`: prompts as tokens, the room that is left, streaming."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from transformers import TextStreamer

from lorary.adapters.hub import CHAT_TEMPLATE
from lorary.cli import printable
from lorary.errors import ConfigError, DataError, Diagnostic
from lorary.model.loading.from_pretrained import load_tokenizer
from lorary.model.loading.source import ModelSection
from lorary.train.data.chat import TEMPLATES, render, use_template
from lorary.train.data.encode import encode_text
from lorary.train.data.row_formats import Messages, check_text


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Args:
        max_new_tokens: length of an answer at most.
        temperature: 0 takes the likeliest token.
        top_p: nucleus sampling.
        seed: of the draws.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int

    def options(self) -> dict[str, Any]:
        """For Transformers' `generate`, without the length and the seed."""
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}


@dataclass(frozen=True)
class Generation:
    """The inputs of a writer: model, adapters, sampling, and the sizes that memory is taken for.

    Args:
        model: the base, without an adapter, in evaluation mode.
        tokenizer: of the base.
        folders: name -> folder of the adapters.
        sampling: how tokens are drawn.
        prompts: the number of prompts that are given at once.
        rows: prompts that are computed at a time.
        tokens: length of the longest prompt with its answer; memory is taken for this many.
    """

    model: Any
    tokenizer: Any
    folders: Mapping[str, Path]
    sampling: Sampling
    prompts: int
    rows: int
    tokens: int


class Answer(NamedTuple):
    """A continuation.

    Args:
        text: without special tokens.
        ended: whether the model ended it; else it was cut off.
    """

    text: str
    ended: bool


class Printer(TextStreamer):  # type: ignore[misc]  # Transformers has no types
    """Prints a continuation as it is generated.

    Its base class decodes line by line, where tokenizers lose the space before a line's first word;
    here each piece is decoded with the one before it.

    Attributes:
        ids: the new tokens so far.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self.ids: list[int] = []
        self._prompt = True
        self._before = self._shown = 0  # where the previous piece began, and where it ended

    @property
    def text(self) -> str:
        """The continuation so far, without special tokens."""
        return self._decode(self.ids)

    def put(self, value: Any) -> None:
        """The prompt at first, then one token after another."""
        if self._prompt:
            self._prompt = False
            return
        self.ids += value.flatten().tolist()
        self._print_new(at_end=False)

    def end(self) -> None:
        """Print the rest and a line end."""
        self._print_new(at_end=True)
        print(flush=True)

    def _print_new(self, at_end: bool) -> None:
        before = self._decode(self.ids[self._before : self._shown])
        now = self._decode(self.ids[self._before :])
        if now.endswith("\N{REPLACEMENT CHARACTER}") and not at_end:
            return  # the first bytes of a character
        self._before, self._shown = self._shown, len(self.ids)
        piece = now[len(before) :]
        # a model's text must not control the terminal
        print(printable(piece) if sys.stdout.isatty() else piece, end="", flush=True)

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


class Writer(Protocol):
    """Continues prompts, with one adapter after another.

    Attributes:
        context: tokens of a prompt and its answer, with the adapter in use; None if the model states no limit.
    """

    @property
    def context(self) -> int | None: ...

    def use(self, name: str | None) -> None:
        """Answer with this adapter from now on; None is the base alone.

        Raises:
            LoraryError: it does not fit; the one before stays in use.
        """
        ...

    def write(self, rows: Sequence[Sequence[int]], printer: Printer | None = None) -> Iterator[Answer]:
        """The answers to prompts, in order; `printer` prints that to the only one as it is generated."""
        ...

    def close(self) -> None:
        """End what is computed."""
        ...


def tokenizer_of(section: ModelSection, folder: Path | None, template: str | None = None) -> Any:
    """The base's tokenizer, with the chat template `template`, else the one that the adapter was trained with."""
    tokenizer = load_tokenizer(section)
    if template is None and folder is not None and (folder / CHAT_TEMPLATE).is_file():
        template = str(folder / CHAT_TEMPLATE)
    use_template(tokenizer, template)
    return tokenizer


def require_chat_template(tokenizer: Any, name: str, headline: str) -> None:
    """Refuse a conversation with a tokenizer that has no chat template.

    Raises:
        ConfigError: it has none.
    """
    if not getattr(tokenizer, "chat_template", None):
        what = "its tokenizer has no chat template, so it was probably not trained on conversations"
        fix = f"give one with --template: {next(iter(TEMPLATES))}, or a Jinja file"
        raise ConfigError(headline, [Diagnostic(name, what, fix)])


def chat_ids(tokenizer: Any, messages: Messages) -> list[int]:
    """The tokens of a conversation up to the start of the next answer.

    Raises:
        ValueError: the template refuses the messages, with its reason; or they are not Unicode text.
    """
    text = render(tokenizer, messages, prompt=True)
    check_text(text, "the conversation")  # bytes that are not UTF-8 arrive as halves of surrogate pairs
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def text_ids(tokenizer: Any, prompt: str, where: str) -> list[int]:
    """The tokens of a text to continue, encoded as in training.

    Raises:
        DataError: it is empty, and the tokenizer has no BOS to begin with.
    """
    ids = encode_text(tokenizer, prompt) or [i for i in (tokenizer.bos_token_id,) if i is not None]
    if not ids:
        raise DataError("cannot generate text:", [Diagnostic(where, "is empty, and the tokenizer has no BOS")])
    return ids


def room(context: int | None, tokens: int) -> int | None:
    """The number of tokens left in a context after `tokens`; None if there is no limit."""
    return None if context is None else max(0, context - tokens)


def require_room(context: int | None, prompts: Sequence[tuple[str, Sequence[int]]]) -> None:
    """Refuse prompts that fill the context.

    Args:
        context: of the model; None for no limit.
        prompts: (place, tokens).

    Raises:
        DataError: every one that does.
    """
    problems = [
        Diagnostic(where, f"has {len(ids):,} tokens, but the model's context is {context:,}", "shorten it")
        for where, ids in prompts
        if room(context, len(ids)) == 0
    ]
    if problems:
        raise DataError("the prompt is too long:", problems)
