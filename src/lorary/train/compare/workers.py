"""The processes that do the jobs of a comparison: this one, or several with a share of the cores each.

A worker is `python -m lorary.train.compare.workers`. It reads the request and jobs from its standard input and writes
their results to its standard output, as pickles, which no other program can reach; what libraries print goes to
standard error. It ends at once when its input does, so that none outlives a comparison that is killed.
"""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

from lorary.errors import Diagnostic, TrainingError
from lorary.train.compare.bench import Bench
from lorary.train.compare.request import Request
from lorary.train.compare.stopped import Stopped
from lorary.train.trainer.signals import StopSignal

Tell = Callable[[int], None]  # takes the optimizer steps done since the last call


class Job(Protocol):
    """Something to be done with a bench."""

    def run(self, bench: Bench, tell: Tell) -> Any:
        """The result."""
        ...


class Workers:
    """A context in which jobs are done.

    Args:
        request: the comparison.
        bench: of this process, which does the jobs if it is the only one.
        tell: takes the optimizer steps done, from any process.
    """

    def __init__(self, request: Request, bench: Bench, tell: Tell) -> None:
        self.request, self.bench, self.tell = request, bench, tell
        self.count = request.settings.workers
        self._processes: list[subprocess.Popen[bytes]] = []
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.stdin.close()  # type: ignore[union-attr]  # a pipe
            process.wait()

    def run(self, jobs: Sequence[Any], done: Callable[[Any, Any], None]) -> None:
        """Do the jobs; `done` takes each with its result, one after the other.

        Raises:
            Stopped: a job has stopped before its end, and with it the others.
            LoraryError: of the first job that failed.
        """
        if self.count == 1:
            for job in jobs:
                done(job, job.run(self.bench, self.tell))
            return
        self._start(min(self.count, len(jobs)))
        with StopSignal() as stop, ThreadPoolExecutor(self.count) as pool:
            running = {pool.submit(self._remote, job): job for job in jobs}
            try:
                self._collect(running, stop, done)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                if any(future.running() for future in running):
                    self._terminate()

    def _collect(self, running: dict[Future[Any], Any], stop: StopSignal, done: Callable[[Any, Any], None]) -> None:
        while running:
            for future in wait(running, timeout=0.2, return_when=FIRST_COMPLETED).done:
                done(running.pop(future), future.result())
            if stop.received:
                raise Stopped(f"signal {stop.received}", stop.received)

    def _start(self, count: int) -> None:
        while len(self._processes) < count:
            threads = str(max(1, (os.cpu_count() or 1) // self.count))
            process = subprocess.Popen(
                [sys.executable, "-m", "lorary.train.compare.workers"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"},
                start_new_session=True,  # the terminal's Ctrl-C is for the comparison, which stops its workers
            )
            _send(process.stdin, self.request)
            self._processes.append(process)
            self._idle.put(process)

    def _terminate(self) -> None:
        """Let the workers finish their step, save and end."""
        for process in self._processes:
            process.terminate()

    def _remote(self, job: Job) -> Any:
        """The result of a job, done by an idle worker."""
        process = self._idle.get()
        try:
            _send(process.stdin, job)
            while isinstance(answer := pickle.load(process.stdout), _Steps):  # type: ignore[arg-type]  # a pipe
                self.tell(answer.count)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            what = f"has ended while it trained {job}"
            fix = "look at its messages above; if memory ran out, use one worker"
            raise TrainingError("a worker process has ended:", [Diagnostic("workers", what, fix)]) from None
        self._idle.put(process)
        if isinstance(answer, Exception):
            raise answer
        return answer


class _Steps:
    """Optimizer steps done, as a message."""

    def __init__(self, count: int) -> None:
        self.count = count


def _send(stream: Any, value: Any) -> None:
    pickle.dump(value, stream)
    stream.flush()


def _read(stream: Any, inbox: queue.SimpleQueue[Any]) -> None:
    """Pass on what comes in; at its end, end this process."""
    while True:
        try:
            inbox.put(pickle.load(stream))
        except (EOFError, OSError):
            os._exit(0)


def main() -> None:
    """A worker."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(sys.stdin.buffer, inbox), daemon=True).start()
    bench = Bench(inbox.get())
    while True:
        job = inbox.get()
        try:
            result = job.run(bench, lambda count: _send(answers, _Steps(count)))
        except Exception as error:
            result = error
        _send(answers, result)


if __name__ == "__main__":
    from lorary.train.compare import workers  # so that the classes of pickles are the parent's, not `__main__`'s

    workers.main()
