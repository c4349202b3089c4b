"""New Pythons that begin where the dear imports are done: PyTorch and the libraries around it, nothing of lorary.

A server that has imported only those is forked for every program. What the program itself imports, warns of, sets or
leaves behind is therefore its own, as in a Python that was just started, and killing it is killing a process.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import warnings
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

GROUP = "fresh"  # the xdist group of the tests that start programs: one server serves them all
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "transformers.trainer", "peft", "trl", "datasets"])


class Program:
    """One that has been started: `python ARGUMENTS`, where they begin with `-m MODULE`, `-c CODE` or a file.

    Args:
        arguments: what stands behind `python`.
        folder: where it runs.
        beside: where what it prints is kept, in two files; beside `folder`, if nothing is said.
        path: a folder in which it finds modules first.
        strict: whether its warnings are errors.
    """

    def __init__(
        self,
        *arguments: str,
        folder: Path,
        beside: Path | None = None,
        path: Path | None = None,
        strict: bool = False,
    ) -> None:
        self._said = [(beside or folder.parent) / f"{folder.name}.{stream}" for stream in ("stdout", "stderr")]
        words = (arguments, folder, path, strict, self._said, dict(os.environ))
        self.process: ForkServerProcess = _CONTEXT.Process(target=_run, args=words)
        self.process.start()

    @property
    def running(self) -> bool:
        return self.process.is_alive()

    def kill(self) -> None:
        """kill -9."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGKILL)

    def ended(self, seconds: float = 300) -> tuple[int, str, str]:
        """Waits for its end: the exit status (minus the number of the signal that ended it), and what it printed."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.kill()
            self.process.join()
        out, err = (path.read_text(encoding="utf-8") for path in self._said)
        return self.process.exitcode or 0, out, err


def free_port() -> int:
    """A port of this machine that nothing listens on, for the processes of `together` to meet at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
    return port


def together(work: Callable[..., None], *arguments: Any, count: int = 2) -> None:
    """Does `work(number, *arguments)` in so many processes at once; raises what one of them raises."""
    torch.multiprocessing.start_processes(work, args=arguments, nprocs=count, start_method="forkserver")


def _run(
    arguments: tuple[str, ...], folder: Path, path: Path | None, strict: bool, said: list[Path], env: dict[str, str]
) -> None:
    for number, file in enumerate(said, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout.reconfigure(line_buffering=False)  # type: ignore[union-attr]
    assert not [name for name in sys.modules if name.partition(".")[0] == "lorary"]
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    torch.set_num_threads(torch.get_num_threads())  # the pool, before threads meet it half made
    warnings.resetwarnings()
    warnings.simplefilter("error" if strict else "default")
    if path is not None:
        sys.path.insert(0, str(path))
    if arguments[0] == "-m":
        sys.argv = list(arguments[1:])
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = list(arguments)
        runpy.run_path(arguments[0], run_name="__main__")
