"""lorary generate: the continuation of texts, with or without an adapter."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from lorary.cli._options import Base, MaxNewTokens, Seed, Temperature, Template, TopP

if TYPE_CHECKING:
    from lorary.cli._generation import Writer
    from lorary.train.data.prompts import Prompt


def generate(
    model: Annotated[str, typer.Argument(help="Adapter or run folder, Hub id, model folder, or builtin:base.")],
    prompt: Annotated[str | None, typer.Argument(help="The text to continue; read from stdin if left out.")] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", help="Prompts instead: .txt with one per line, or rows with `prompt` or `messages`."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="New JSONL file for the answers to --file.")] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "-b", min=1, max=100_000, help="Prompts of --file at a time.")
    ] = 8,
    base: Base = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask as a user, through the chat template.")] = False,
    template: Template = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    stream: Annotated[
        bool | None, typer.Option("--stream/--no-stream", help="Print word by word; the default on a terminal.")
    ] = None,
) -> None:
    """Continue a text, or all prompts of a file.

    lorary generate out/ "def parse(text):" uses the adapter of a run; lorary generate builtin:base the base alone.
    With --file the answers are JSON lines. In fp32 they do not depend on the batch size.
    """
    from lorary.adapters.resolve import find_model
    from lorary.train.data.prompts import Prompt, read_prompts

    _check(prompt, file, out)
    prompts = read_prompts(file) if file is not None else [Prompt(_text(prompt), "prompt")]
    if chat:
        prompts = [p if p.field == "messages" else _asked(p) for p in prompts]
    from lorary.cli._generation import Generation, Sampling, tokenizer_of
    from lorary.cli._model import ready_base
    from lorary.cli._writer import AnyWriter

    folder, section = find_model(model, base)
    tokenizer = tokenizer_of(section, folder, template)
    rows = _rows(tokenizer, prompts, model)
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    with _output(out) as written:
        base_alone, folders = ready_base(section, folder), {} if folder is None else {model: folder}
        size = (len(rows), min(batch_size, len(rows)), max(map(len, rows)) + max_new_tokens)
        with closing(AnyWriter(Generation(base_alone, tokenizer, folders, sampling, *size))) as writer:
            writer.use(next(iter(folders), None))
            if file is not None:
                _answer_file(writer, prompts, rows, written)
            else:
                _answer(writer, tokenizer, rows[0], sys.stdout.isatty() if stream is None else stream)


def _check(prompt: str | None, file: Path | None, out: Path | None) -> None:
    from lorary.errors import ConfigError, Diagnostic

    problems = []
    if file is not None and prompt is not None:
        problems.append(Diagnostic("--file", "names the prompts, and one is an argument", "keep one of the two"))
    if file is None and out is not None:
        problems.append(Diagnostic("--out", "has no effect without --file", "redirect the output: > FILE"))
    if problems:
        raise ConfigError("conflicting options:", problems)


def _text(prompt: str | None) -> str:
    """The prompt, from the argument or from stdin. Invalid UTF-8 arrives as lone surrogates."""
    from lorary.errors import ConfigError, DataError, Diagnostic

    try:
        if prompt is None:
            if sys.stdin.isatty():
                raise ConfigError("no prompt: give one as an argument or on stdin")
            prompt = sys.stdin.read()
        prompt.encode()
    except UnicodeError as error:
        problem = Diagnostic("prompt", "holds bytes that are not UTF-8", "save it as UTF-8")
        raise DataError("cannot read the prompt:", [problem]) from error
    return prompt


def _asked(prompt: Prompt) -> Prompt:
    """The text as a user's message."""
    import dataclasses

    return dataclasses.replace(prompt, value=[{"role": "user", "content": prompt.value}])


def _rows(tokenizer: Any, prompts: Sequence[Prompt], model: str) -> list[list[int]]:
    """The tokens of every prompt."""
    from lorary.cli._generation import chat_ids, require_chat_template, text_ids
    from lorary.errors import DataError, Diagnostic

    if any(prompt.field == "messages" for prompt in prompts):
        require_chat_template(tokenizer, model, "cannot answer conversations:")
    rows, problems = [], []
    for prompt in prompts:
        try:
            value = prompt.value
            rows.append(
                text_ids(tokenizer, value, prompt.where) if isinstance(value, str) else chat_ids(tokenizer, value)
            )
        except ValueError as error:
            if isinstance(error, DataError):
                raise
            problems.append(Diagnostic(prompt.where, str(error)))
    if problems:
        raise DataError("cannot answer these conversations:", problems[:5])
    return rows


@contextmanager
def _output(path: Path | None) -> Iterator[TextIO]:
    """The new file for the answers, or stdout. It is opened before the work."""
    from lorary.errors import Diagnostic, FileError

    if path is None:
        yield sys.stdout
        return
    try:
        file = path.open("x", encoding="utf-8")
    except FileExistsError:
        problem = Diagnostic(str(path), "exists already, and was not changed", "name another file")
        raise FileError("nothing was written:", [problem]) from None
    with file:
        try:
            yield file
        except BaseException:
            if not file.tell():  # nothing is answered yet: the same command can be given again
                path.unlink(missing_ok=True)
            raise


def _answer(writer: Writer, tokenizer: Any, ids: list[int], stream: bool) -> None:
    from lorary.cli._generation import Printer, require_room

    require_room(writer.context, [("prompt", ids)])
    (answer,) = writer.write([ids], Printer(tokenizer) if stream else None)
    if not stream:
        print(answer.text)


def _answer_file(writer: Writer, prompts: Sequence[Prompt], rows: Sequence[list[int]], written: TextIO) -> None:
    """Answer every prompt, and write a row for each, in order, as soon as it is done."""
    from lorary.cli._generation import require_room
    from lorary.cli._progress import progress_bar

    require_room(writer.context, [(prompt.where, ids) for prompt, ids in zip(prompts, rows, strict=True)])
    with progress_bar(len(rows), quiet=written is sys.stdout and sys.stdout.isatty()) as update:
        for prompt, answer in zip(prompts, writer.write(rows), strict=True):
            row = {prompt.field: prompt.value, "completion": answer.text}
            print(json.dumps(row, ensure_ascii=False), file=written, flush=True)
            update(advance=1)
