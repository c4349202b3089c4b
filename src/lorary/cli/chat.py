"""lorary chat: a conversation with a model, and with several adapters in turn."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Annotated

import typer

from lorary.cli._options import Base, MaxNewTokens, Seed, Temperature, Template, TopP

if TYPE_CHECKING:
    from lorary.cli._chat import Conversation
    from lorary.cli._generation import Sampling

_MOST_TOKENS = 16_384  # of a conversation, that memory is taken for


def chat(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Run or adapter folders of one base, or Hub ids; or a base first."),
    ],
    base: Base = None,
    system: Annotated[str, typer.Option("--system", help="System message.")] = "",
    template: Template = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
) -> None:
    """Talk to a model, in several turns.

    lorary chat out/ other/ talks to the adapter of out/; /adapter other switches, /adapter off is the base alone, /help
    lists the commands. Ctrl-C stops an answer. Messages may be piped in, one per line; the answers go to stdout.
    """
    from lorary.cli._generation import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    with _conversation(models, base, system, template, sampling) as conversation:
        _talk(conversation)


@contextmanager
def _conversation(
    models: list[str], base: str | None, system: str, template: str | None, sampling: Sampling
) -> Iterator[Conversation]:
    from lorary.adapters.resolve import adapter_at, find_adapter, find_model, read_adapter
    from lorary.cli._chat import Conversation, names_of
    from lorary.cli._generation import Generation, require_chat_template, tokenizer_of
    from lorary.cli._model import ready_base
    from lorary.cli._writer import AnyWriter
    from lorary.layers.rope import max_context, text_config

    adapted = models if adapter_at(models[0]) is not None else models[1:]
    folders = {name: find_adapter(model, "chat with") for name, model in names_of(adapted).items()}
    first = next(iter(folders), None)
    folder = folders.get(first or "")
    section = find_model(models[0], base)[1]
    tokenizer = tokenizer_of(section, folder, template)
    require_chat_template(tokenizer, models[0], "cannot chat:")
    for each in folders.values():  # those that cannot be read are refused before the first message
        read_adapter(each, section.id)
    model = ready_base(section, folder)
    tokens = min(max_context(text_config(model)) or _MOST_TOKENS, _MOST_TOKENS)
    with closing(AnyWriter(Generation(model, tokenizer, folders, sampling, 1, 1, tokens))) as writer:
        writer.use(first)
        yield Conversation(writer, tokenizer, [*folders], system)


def _talk(conversation: Conversation) -> None:
    """Read messages until the end of input or /quit."""
    terminal = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):  # a line that is not UTF-8 is refused alone
        sys.stdin.reconfigure(errors="surrogateescape")
    if terminal:
        with suppress(ImportError):  # Windows has none
            import readline  # noqa: F401 (editing and history of the input line)
        print("/help lists the commands; Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            line = input("> ") if terminal else sys.stdin.readline()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # drops the line
            print()
            continue
        if not line and not terminal:
            return
        if not conversation.say(line.removesuffix("\n")):
            return
