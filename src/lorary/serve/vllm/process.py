"""The process of a server: started, waited for, and stopped as its parent is.

The server gets a session of its own, so that Ctrl-C reaches it once, through us, and so that nothing that it started
outlives it. Its output is kept back while it starts, shown if it fails, and passed on once it answers.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPException
from typing import Any

from lorary.errors import ConfigError, Diagnostic, LoraryError
from lorary.files import strict_json
from lorary.files.strict_json import show

_KEPT_LINES = 60  # of its output
_MOST_OF_LINE = 500
_MOST_BYTES = 2**24  # of a list of models
_PATIENCE = 30.0  # seconds to end after a signal


class ServerError(LoraryError):
    """A server that did not start, or ended by itself."""


class Server:
    """A running server. Set `ready` once it serves: its output is passed on, and a signal ends it, not us.

    Args:
        command: its arguments.
        environment: variables beside our own.
        title: its name in messages.

    Raises:
        ConfigError: the command cannot be found.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], title: str) -> None:
        program = shutil.which(command[0])
        if program is None:
            fix = f"install {title}, or name its command, such as --{title.lower()} /path/to/bin/{command[0]}"
            problem = Diagnostic(show(command[0]), "there is no such program", fix)
            raise ConfigError(f"cannot start {title}:", [problem])
        self.title, self.started, self.ready = title, time.monotonic(), False
        self.lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self.process = subprocess.Popen(
            [program, *command[1:]],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        """Keep the last lines of its output, and pass them on once it answers."""
        assert self.process.stdout is not None
        with self.process.stdout as output:
            for raw in output:
                line = raw.decode("utf-8", "replace").rstrip()[:_MOST_OF_LINE]
                self.lines.append("".join(c if c.isprintable() else " " for c in line))
                if self.ready:
                    print(self.lines[-1], file=sys.stderr, flush=True)

    def wait_until_healthy(
        self, url: str, seconds: float, progress: Callable[[str], object] = lambda text: None
    ) -> None:
        """Wait until `/health` answers.

        Raises:
            ServerError: it ended, or did not answer in time; with the end of its output.
        """
        while not _answers(f"{url}/health"):
            after = time.monotonic() - self.started
            if (code := self.process.poll()) is not None:
                raise self._failed(f"it ended with the exit code {_shell_code(code)} before it answered")
            if after > seconds:
                raise self._failed(f"it did not answer at {url} within {seconds:g} s")
            progress(f"{self.title} starts ({after:.0f} s): {self.lines[-1] if self.lines else ''}"[:100])
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(0.25)
        if self.process.poll() is not None:
            raise self._failed(f"it ended, and another server answers at {url}")

    def _failed(self, what: str) -> ServerError:
        self.stop()
        said = "\n".join(f"  | {line}" for line in self.lines)
        return ServerError(f"{self.title} failed: {what}\n{said}" if said else f"{self.title} failed: {what}")

    def wait(self) -> int:
        """Its exit code, as a shell has it, once it has ended."""
        code = self.process.wait()
        self._reader.join(_PATIENCE)
        return _shell_code(code)

    def send(self, number: int) -> None:
        """Pass a signal on to it."""
        with suppress(ProcessLookupError):
            self.process.send_signal(number)

    def stop(self, patience: float = _PATIENCE) -> None:
        """End it, politely at first, and everything that it started."""
        self.send(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join(_PATIENCE)


@contextmanager
def running(command: Sequence[str], environment: Mapping[str, str], title: str) -> Iterator[Server]:
    """A server that ends with the block. SIGINT and SIGTERM go on to it; before it is ready, they end us, too."""
    server = Server(command, environment, title)

    def forward(number: int, frame: object) -> None:
        server.send(number)
        if not server.ready:
            raise SystemExit(128 + number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield server
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        server.stop()


def check_models(url: str, key: str, names: Collection[str], title: str) -> None:
    """Refuse a server whose list of models lacks a name.

    Raises:
        ServerError: with every name that it lacks.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    found = _json(urllib.request.Request(f"{url}/v1/models", headers=headers))
    data = found.get("data") if isinstance(found, dict) else None
    served = {entry.get("id") for entry in data if isinstance(entry, dict)} if isinstance(data, list) else set()
    if missing := [name for name in names if name not in served]:
        what = "is not in its list of models"
        raise ServerError(f"{title} does not serve every model:", [Diagnostic(name, what) for name in missing])


_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is this machine


def _answers(url: str) -> bool:
    try:
        with _DIRECT.open(url, timeout=5) as reply:
            return bool(reply.status == 200)
    except (OSError, HTTPException, ValueError):
        return False


def _json(request: urllib.request.Request) -> Any:
    try:
        with _DIRECT.open(request, timeout=30) as reply:
            return strict_json.parse(reply.read(_MOST_BYTES + 1), _MOST_BYTES)
    except (OSError, HTTPException, ValueError, json.JSONDecodeError):
        return None


def _shell_code(code: int) -> int:
    """The exit code of a process, 128 and more for a signal."""
    return code if code >= 0 else 128 - code
