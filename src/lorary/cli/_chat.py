"""The conversation of `lorary chat`: its turns, its commands, and the adapters to switch between."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lorary.cli import printable
from lorary.cli._generation import Printer, Writer, chat_ids, room
from lorary.errors import LoraryError, did_you_mean
from lorary.train.data.row_formats import Messages

OFF = "off"
HELP = """/adapter         the adapters, and the one in use
/adapter NAME    switch to it, in the same conversation
/adapter off     the base alone
/reset           begin again
/system TEXT     begin again with a system message; without TEXT: without one
/help            this list
/quit            end; so does the end of input (Ctrl-D)
Ctrl-C stops an answer. A message that begins with a slash: put a space before it."""


class Conversation:
    """A conversation with a model.

    Args:
        writer: of the answers; it uses the first adapter.
        tokenizer: with a chat template.
        adapters: their names; the first is in use.
        system: the system message; empty for none.
    """

    def __init__(self, writer: Writer, tokenizer: Any, adapters: Sequence[str], system: str = "") -> None:
        self.writer, self.tokenizer = writer, tokenizer
        self.adapters, self.current = adapters, next(iter(adapters), OFF)
        self.system = system
        self.turns: Messages = []

    def say(self, line: str) -> bool:
        """Answer a message or follow a command, and print the result; returns whether the conversation goes on."""
        if not line.strip():
            return True
        if not line.startswith("/"):
            self._answer(line.strip())
            return True
        command, _, rest = line[1:].strip().partition(" ")
        return self._command(command, rest.strip())

    def _command(self, command: str, rest: str) -> bool:
        if command in ("quit", "exit"):
            return False
        if command == "adapter":
            self._switch(rest)
        elif command in ("reset", "system"):
            self.turns = []
            self.system = rest if command == "system" else self.system
            _note("a new conversation" + (f", with the system message {self.system!r}" if self.system else ""))
        elif command == "help":
            _note(HELP)
        else:
            fix = did_you_mean(command, ("adapter", "reset", "system", "help", "quit"))
            _note(f"/{printable(command)} is not a command, and was not sent: {fix}")
        return True

    def _switch(self, name: str) -> None:
        known = [*self.adapters, OFF]
        if not name:
            _note("  ".join(f"[{known_name}]" if known_name == self.current else known_name for known_name in known))
            return
        if name not in known:
            _note(f"there is no adapter `{printable(name)}`: {did_you_mean(name, known)}")
            return
        try:
            self.writer.use(None if name == OFF else name)
        except LoraryError as error:  # the one before stays in use
            _note(str(error))
            return
        self.current = name
        _note(f"adapter {name}" if name != OFF else "the base alone")

    def _answer(self, text: str) -> None:
        asked = [*self.turns, {"role": "user", "content": text}]
        messages = [{"role": "system", "content": self.system}, *asked] if self.system else asked
        try:
            ids = chat_ids(self.tokenizer, messages)
        except ValueError as error:
            _note(f"not sent: {error}")
            return
        limit = self.writer.context
        left = room(limit, len(ids))
        if left == 0:
            _note(f"not sent: with it the conversation has {len(ids):,} tokens, and the context is {limit:,}: /reset")
            return
        printer = Printer(self.tokenizer)
        try:
            (answer,) = self.writer.write([ids], printer)
            if not answer.ended:
                self._say_cut_off(printer, left, limit)
        except KeyboardInterrupt:
            printer.end()
            _note("stopped")
        except LoraryError as error:
            _note(f"not answered: {error}")
            return
        self.turns = [*asked, {"role": "assistant", "content": printer.text}]

    def _say_cut_off(self, printer: Printer, left: int | None, limit: int | None) -> None:
        """Tell an answer that ended without its end: in a full context, or at the length allowed."""
        if left is not None and len(printer.ids) >= left:
            _note(f"cut off: the context of {limit:,} tokens is full; /reset begins again")
        else:
            _note(f"cut off after {len(printer.ids):,} tokens: --max-new-tokens allows more")


def names_of(models: Iterable[str]) -> dict[str, str]:
    """Short name -> the name on the command line: the folder's, with a number where two are the same."""
    found: dict[str, str] = {}
    for model in models:
        path = Path(model)
        short = path.parent.name if path.name == "adapter" and path.parent.name else path.name or model
        name, i = short, 2
        while name in found or name == OFF:
            name, i = f"{short}-{i}", i + 1
        found[name] = model
    return found


def _note(text: str) -> None:
    """A remark, apart from the answers: on standard error."""
    print(text, file=sys.stderr, flush=True)
