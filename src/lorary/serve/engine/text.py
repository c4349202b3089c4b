"""The text of generated tokens as they come: whole characters, and nothing that may begin a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_CONTEXT = 6  # tokens of the prompt: whether a token begins with a space depends on those before it
_MOST_HELD = 16  # tokens: no character has as many, so the bytes are not one
_BROKEN = "\ufffd"


class TextStream:
    """The text of one request.

    Text is held back while it may be the beginning of a stop string, and bytes while they may be the beginning of a
    character. What is given out does not depend on how the text falls into tokens.

    Args:
        tokenizer: of the base.
        prompt: the tokens before the first generated one.
        stops: the strings that end the text; none is empty.

    Attributes:
        stop: the stop string that has ended the text, or None.

    Example:
        >>> stream = TextStream(tokenizer, prompt, ["\\n\\n"])
        >>> "".join(stream.push(token) for token in tokens) + stream.rest()
        'the text before the blank line'
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self._decoder, self._stops = tokenizer, tuple(stops)
        self._ids = list(prompt[-_CONTEXT:])
        self._prompt = len(self._ids)
        self._start, self._read = 0, self._prompt  # the window that is decoded, and its part that was given out
        self._held = ""
        self.stop: str | None = None

    def push(self, token: int) -> str:
        """The text that a token completes, as far as it cannot begin a stop string."""
        self._ids.append(token)
        return self._give(self._decoded(at_end=False), at_end=False)

    def rest(self) -> str:
        """The text that was held back, at the end of the request: `stop` may be found in it."""
        return "" if self.stop is not None else self._give(self._decoded(at_end=True), at_end=True)

    def _decoded(self, at_end: bool) -> str:
        """The text that the tokens since the last call have completed."""
        before = self._text(self._ids[self._start : self._read])
        if self._read == self._prompt:  # a character that the prompt began belongs to the text
            before = before.rstrip(_BROKEN)
        whole = self._text(self._ids[self._start :])
        held = len(self._ids) - self._read
        if not held or (whole.endswith(_BROKEN) and not at_end and held < _MOST_HELD):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return whole[len(before) :]

    def _text(self, ids: list[int]) -> str:
        text = self._decoder.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def _give(self, new: str, at_end: bool) -> str:
        self._held += new
        if new and (found := _first(self._held, self._stops)) is not None:
            start, self.stop = found
            given, self._held = self._held[:start], ""
            return given
        keep = 0 if at_end else _beginning(self._held, self._stops)
        cut = len(self._held) - keep
        given, self._held = self._held[:cut], self._held[cut:]
        return given


def _first(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """The start of the stop string that ends first, the longest of those that end there, and the string itself."""
    found = [(start + len(stop), start, stop) for stop in stops if (start := text.find(stop)) >= 0]
    return min(found)[1:] if found else None


def _beginning(text: str, stops: Sequence[str]) -> int:
    """The length of the longest end of a text that begins a stop string."""
    longest = max(map(len, stops), default=1) - 1
    return next((n for n in range(min(longest, len(text)), 0, -1) if text.endswith(_prefixes(stops, n))), 0)


def _prefixes(stops: Sequence[str], length: int) -> tuple[str, ...]:
    return tuple(stop[:length] for stop in stops if len(stop) > length)
