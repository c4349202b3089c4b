"""The start of `lorary serve`: adapters found, the base loaded, the engine started, the server run."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO, TypeVar

from lorary.cli import printable
from lorary.cli._notes import print_notes
from lorary.cli._progress import progress_bar
from lorary.errors import ConfigError, Diagnostic, FileError, LoraryError
from lorary.files.strict_json import show
from lorary.serve.address import local_url
from lorary.serve.http.settings import Settings

if TYPE_CHECKING:
    from lorary.serve.engine.batching import BatchingEngine
    from lorary.serve.interface import Engine
    from lorary.spec.interfaces import Storage

A = TypeVar("A")
_SHOWN = 10


@dataclass(frozen=True)
class Start:
    """The command line of `lorary serve`, apart from the HTTP server's settings.

    Args:
        adapters: folders, run folders, Hub ids, or NAME=FOLDER.
        base: of them; None for their own, or the built-in one.
        name: of the base in requests; None for the base as given.
        root: the folder of adapters that are loaded by name.
        budget: bytes of adapters and keys and values; None for the engine's choice.
        adapter_bytes, rank: of an adapter at most; None for any rank.
        dtype: of the base.
        quantize: "nf4", "no", or "auto": as the adapters were trained, if all agree.
        template: chat template of the base.
    """

    adapters: tuple[str, ...]
    base: str | None
    name: str | None
    root: Path | None
    budget: int | None
    adapter_bytes: int
    rank: int | None
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    quantize: str
    template: str | None


def run(start: Start, settings: Settings, host: str, port: int) -> None:
    """Serve until a signal; every fault of the command line is found before the base is loaded.

    Raises:
        LoraryError: an adapter or the base cannot be served, with every reason; or the address is taken.
    """
    folders = find_adapters(start.adapters)
    base = base_of(folders, start.base)
    check_names(folders, base_name(start, base))
    from lorary.serve.address import bind

    with bind(host, port) as listener:
        engine = opened(start, base, folders)
        load_adapters(engine, folders)
        print_notes(f"{card.name}: {note}" for card in engine.adapters() for note in card.notes)
        engine.start()
        try:
            _serve(engine, settings, listener)
        finally:
            engine.stop()


def _serve(engine: BatchingEngine, settings: Settings, listener: Any) -> None:
    from lorary.serve.http.app import create_app
    from lorary.serve.http.limits import Traffic
    from lorary.serve.http.server import Server

    traffic = Traffic()
    app = create_app(engine, settings, traffic)
    text = printable(welcome(engine, settings, listener.getsockname()[:2], summary(engine)))
    ready = partial(say, text, sys.stdout)
    Server(app, settings, traffic, stop=engine.stop, ready=ready).run(sockets=[listener])
    say("stopped", sys.stderr)


def say(text: str, stream: TextIO) -> None:
    """Print a line; a server goes on where nobody reads it any more, or the disk of its log is full."""
    try:
        print(text, file=stream, flush=True)
    except OSError:
        with open(os.devnull, "w") as nowhere:  # else the interpreter fails at its end on what is in the buffer
            os.dup2(nowhere.fileno(), stream.fileno())


def find_adapters(given: Iterable[str]) -> dict[str, Path]:
    """Name -> folder of adapters on the command line.

    Raises:
        ConfigError: two have one name.
        FileError: every one that is not there.
    """
    from lorary.adapters.resolve import find_adapter
    from lorary.cli._chat import names_of
    from lorary.model.loading.source import BUILTIN

    named = [_named(text) for text in given]
    unnamed = names_of(folder for name, folder in named if not name)
    pairs = [*((name, folder) for name, folder in named if name), *unnamed.items()]
    found, problems = dict[str, Path](), list[Diagnostic]()
    for name, count in Counter(name for name, _ in pairs).items():
        if count > 1:
            problems.append(Diagnostic(name, f"{count} adapters have this name", "name the others: NAME=FOLDER"))
    for name, folder in pairs:
        try:
            found[name] = find_adapter(folder, "serve")
        except FileError as error:
            is_base = folder in BUILTIN or (Path(folder) / "config.json").is_file()
            problems += [Diagnostic(folder, "is a base", f"use --base {folder}")] if is_base else error.problems
    if problems:
        raise FileError("cannot serve these adapters:", problems)
    return found


def check_names(names: Iterable[str], base: str) -> None:
    """Refuse names that no adapter can have.

    Raises:
        FileError: every one that is not valid, or the base's.
    """
    from lorary.serve.pool.names import name_problems

    problems = [
        Diagnostic(show(name), problem.what.removeprefix(f"{show(name)} "), "name it: NAME=FOLDER")
        for name in names
        for problem in name_problems(name, (base,), taken=False)
    ]
    if problems:
        raise FileError("cannot serve these adapters:", problems)


def _named(text: str) -> tuple[str, str]:
    """(name or "", folder) of NAME=FOLDER or FOLDER, whose path may hold an `=` itself."""
    name, equals, folder = text.partition("=")
    return (name, folder) if equals and "/" not in name and not Path(text).exists() else ("", text)


def base_of(folders: dict[str, Path], base: str | None) -> str:
    """The base of adapters: `base`, or their own, or the built-in one.

    Raises:
        ConfigError: they have several.
        FileError: every one that cannot be read, or does not name its base.
    """
    from lorary.adapters.resolve import find_base
    from lorary.model.loading.source import BUILTIN

    if base is not None or not folders:
        return base or BUILTIN[0]
    bases = _of_each(folders, lambda _, folder: find_base(folder, None).id)
    if len(set(bases.values())) > 1:
        problems = [Diagnostic(name, f"its base is {one}") for name, one in bases.items()]
        raise ConfigError("these adapters have several bases; serve each from a process of its own:", problems)
    return next(iter(bases.values()))


def _of_each(folders: Mapping[str, Path], read: Callable[[str, Path], A]) -> dict[str, A]:
    """Name -> what `read` returns for the name and the folder.

    Raises:
        FileError: every adapter for which it raises an error.
    """
    found, problems = dict[str, A](), list[Diagnostic]()
    with progress_bar(len(folders)) as update:
        for name, folder in folders.items():
            update(description=name)
            try:
                found[name] = read(name, folder)
            except LoraryError as error:
                problems += error.problems_of(name)
            update(advance=1)
    if problems:
        raise FileError("cannot serve these adapters:", problems)
    return found


def storage_of(base: str, folders: Mapping[str, Path], quantize: str) -> Storage | None:
    """The storage of the base: as said, or that in which all adapters were trained; None for plain weights.

    Raises:
        FileError: every adapter that cannot be read.
    """
    from lorary.adapters.resolve import read_adapter
    from lorary.layers.nf4 import NF4
    from lorary.model.loading.from_pretrained import load_storage

    if quantize != "auto":
        return NF4() if quantize == "nf4" else None

    def of(_: str, folder: Path) -> Storage | None:
        adapter = read_adapter(folder, base)
        return load_storage(adapter.method, adapter.full, adapter.sites)

    found = list(_of_each(folders, of).values())
    same = bool(found) and all(storage == found[0] for storage in found)
    return found[0] if same and found[0] is not None and not found[0].writable else None


def opened(start: Start, base: str, folders: Mapping[str, Path]) -> BatchingEngine:
    """The engine for the base of these adapters, which are not loaded yet; it is not started."""
    from lorary.serve.open import open_engine
    from lorary.serve.pool.loader import Limits
    from lorary.train.data.chat import use_template

    limits = Limits(bytes=start.adapter_bytes, rank=start.rank)
    engine = open_engine(
        base,
        dtype=start.dtype,
        storage=storage_of(base, folders, start.quantize),
        name=base_name(start, base),
        root=start.root,
        budget=start.budget,
        limits=limits,
    )
    use_template(engine.tokenizer, start.template)
    return engine


def base_name(start: Start, base: str) -> str:
    """The name of the base in requests."""
    return start.name or (base if not Path(base).exists() else Path(base).resolve().name)


def load_adapters(engine: Engine, folders: dict[str, Path]) -> None:
    """Load adapters into the engine, with a bar.

    Raises:
        FileError: every one that cannot be served.
    """
    _of_each(folders, lambda name, folder: engine.load(name, str(folder)))


def summary(engine: BatchingEngine) -> str:
    """The base's dtype, storage and device, how it is computed, the budget, and the number of adapters, in a line."""
    from lorary.layers.quantized_weight import is_quantized
    from lorary.model.plan import human_bytes

    model, count = engine.runner.model, len(engine.adapters())
    dtype, budget = str(model.dtype).removeprefix("torch."), human_bytes(engine.statistics()["budget_bytes"])
    quantized = sorted({type(layer).__name__ for layer in model.modules() if is_quantized(layer)})
    storage = f"quantised in {', '.join(quantized)}" if quantized else "not quantised"
    found = f"{count} adapter{'s' if count != 1 else ''} found"
    return f"{dtype}, {storage}, on {model.device}, in {engine.runner.kind}; budget {budget}; {found}"


def welcome(engine: Engine, settings: Settings, address: tuple[str, int], facts: str = "") -> str:
    """The text for the terminal: where the server is, facts about it, its models, and a request to try."""
    url, names = local_url(*address), [card.name for card in engine.adapters()]
    shown = [engine.name, *names[:_SHOWN], *([f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else [])]
    body = json.dumps({"model": names[0] if names else engine.name, "prompt": "def parse(", "max_tokens": 32})
    key = " -H 'Authorization: Bearer KEY'" if settings.guarded else ""
    lines = [f"lorary serves {engine.name} at {url}", *([f"  {facts}"] if facts else [])]
    lines.append(f"  models: {', '.join(shown)}")
    if not names:
        lines.append("  no adapters yet: lorary serve FOLDER..., or --root DIR for all that lie in a folder")
    lines += [
        f"  try: curl {url}/v1/completions{key} -H 'Content-Type: application/json' -d '{body}'",
        f"  page: {url}/",
        "  Ctrl-C stops it.",
    ]
    return "\n".join(lines)
