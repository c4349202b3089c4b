"""`lorary serve --engine ray`: replicas of the engine on the machines of a Ray cluster, or on this one."""

from __future__ import annotations

import re
import signal
import sys
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorary.cli import printable
from lorary.cli._notes import print_notes
from lorary.cli._serve import (
    Start,
    base_name,
    base_of,
    check_names,
    find_adapters,
    load_adapters,
    opened,
    say,
    welcome,
)
from lorary.errors import Diagnostic, LoraryError

if TYPE_CHECKING:
    from lorary.serve.http.settings import Settings
    from lorary.serve.interface import Engine

_SHOWN_LINES = 12
_RAISED = re.compile(r"[A-Za-z_][\w.]*(Error|Exception)\b")  # the last line of a traceback


def run_ray(start: Start, settings: Settings, host: str, port: int, replicas: int) -> None:
    """Serve until a signal.

    Args:
        start: what the command line asks for.
        settings: of the HTTP side.
        host, port: where Ray Serve listens, on every machine.
        replicas: of the engine.

    Raises:
        LoraryError: an adapter cannot be found, or the replicas do not start, with the reason.
    """
    from lorary.serve.address import free_port
    from lorary.serve.ray.app import NAME, application, ray_serve, started
    from lorary.serve.ray.remote_engine import RemoteEngine

    folders = {name: folder.absolute() for name, folder in find_adapters(start.adapters).items()}
    base = base_of(folders, start.base)
    check_names(folders, base_name(start, base))
    serve, port = ray_serve(), free_port(host, port)
    describe, make_app = partial(described, start, base), partial(http_app, settings)
    with started(host, port) as cluster:
        chosen = cluster.settings(replicas, settings.drain)
        app = application(partial(opened_replica, start, base, folders), make_app, describe, chosen)
        _note(f"starting {replicas} replicas")
        try:
            serve.run(app, name=NAME, route_prefix="/")
        except RuntimeError as error:
            raise failed_start(serve.status().applications.get(NAME), error) from None
        engine = RemoteEngine(serve.get_deployment_handle("Engine", app_name=NAME), *describe())
        engine.start()
        print_notes(f"{card.name}: {note}" for card in engine.adapters() for note in card.notes)
        say(printable(welcome(engine, settings, (host, port))), sys.stdout)
        _wait_for_signal()
        _note("stopping: running requests end first")
        engine.stop()
        cluster.remove(NAME)
    _note("stopped")


def opened_replica(start: Start, base: str, folders: dict[str, Path]) -> Engine:
    """The engine of a replica, in its process."""
    engine = opened(start, base, folders)
    load_adapters(engine, folders)
    return engine


def http_app(settings: Settings, engine: Engine) -> Any:
    """The HTTP application of a front, in its process."""
    from lorary.serve.http.app import create_app

    return create_app(engine, settings)


def described(start: Start, base: str) -> tuple[Any, str, int | None]:
    """The tokenizer of the base, its name and its context, without its weights."""
    from lorary.layers.rope import max_context
    from lorary.model.loading.from_pretrained import load_config, load_tokenizer
    from lorary.model.loading.source import ModelSection
    from lorary.train.data.chat import use_template

    section = ModelSection.of(base, dtype=start.dtype)
    tokenizer, config = load_tokenizer(section), load_config(section)
    use_template(tokenizer, start.template)
    return tokenizer, base_name(start, base), max_context(config.get_text_config())


def failed_start(status: Any, error: Exception) -> LoraryError:
    """The error of replicas that did not start: what they raised, without the way there."""
    said = "\n".join(deployment.message for deployment in status.deployments.values()) if status is not None else ""
    lines = (said or str(error)).strip().splitlines()
    raised = [i for i, line in enumerate(lines) if _RAISED.match(line)]
    shown = [line.strip().removeprefix("- ") for line in lines[raised[-1] if raised else 0 :] if line.strip()]
    return LoraryError("the replicas did not start:", [Diagnostic("", line) for line in shown[:_SHOWN_LINES]])


def _wait_for_signal() -> None:
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    while not ended.wait(1.0):
        pass


def _note(text: str) -> None:
    say(text, sys.stderr)
