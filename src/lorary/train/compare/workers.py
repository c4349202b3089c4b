"""The processes that do the jobs of a comparison: this one, or several with a share of the cores each.

A run has a process to itself, rather than a part of the batch of one (`lorary.train.shared_base`): on a CPU, training
eight adapters at once is faster than in turn only while a batch has few tokens (1.7 times at 16, 0.9 times at 512), and
needs the activations of all of them, while a second core takes a second run whatever its batch.
"""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any

from lorary.errors import Diagnostic, TrainingError
from lorary.train.compare.bench import Bench
from lorary.train.compare.outcomes import Stopped
from lorary.train.compare.request import Request
from lorary.train.compare.worker import FAILURE, STEPS, send
from lorary.train.trainer.signals import StopSignal

_POLL = 0.2  # seconds between two looks for a signal


class Workers:
    """A context in which jobs are done, and a signal stops them, also between two. A job has `run(bench, tell)`.

    Args:
        request: the comparison.
        bench: of this process, which does the jobs if it is the only one.
        tell: takes the optimizer steps done since its last call, from any thread.
    """

    def __init__(self, request: Request, bench: Bench, tell: Callable[[int], None]) -> None:
        self.request, self.bench, self.tell = request, bench, tell
        self.count = request.settings.workers
        self.stop = StopSignal()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()

    def __enter__(self) -> Workers:
        self.stop.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.__exit__()
        for process in self._processes:
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):  # the process is gone
                    pipe.close()  # type: ignore[union-attr]  # it has pipes
            process.wait()

    def run(self, jobs: Sequence[Any], done: Callable[[Any, Any], None]) -> None:
        """Do the jobs; `done` takes each with its result, one after the other.

        Raises:
            Stopped: a job has stopped before its end, and with it the others.
            LoraryError: of the first job that failed.
        """
        if self.count == 1:
            for job in jobs:
                done(job, self.here(job))
            return
        self._start(min(self.count, len(jobs)))
        with ThreadPoolExecutor(self.count) as pool:
            running = {pool.submit(self._remote, job): job for job in jobs}
            try:
                self._collect(running, done)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in self._processes:  # they finish their step, save and stop
                    process.terminate()
                raise

    def here(self, job: Any) -> Any:
        """The result of a job, done in this process.

        Raises:
            Stopped: a signal has come since the last job, or stops this one.
        """
        self.check()
        return job.run(self.bench, self.tell)

    def check(self) -> None:
        """Stop if a signal has come.

        Raises:
            Stopped: one has.
        """
        if self.stop.received:
            raise Stopped(f"signal {self.stop.received}", self.stop.received)

    def _collect(self, running: dict[Future[Any], Any], done: Callable[[Any, Any], None]) -> None:
        while running:
            for future in wait(running, timeout=_POLL, return_when=FIRST_COMPLETED).done:
                done(running.pop(future), future.result())
            self.check()

    def _start(self, count: int) -> None:
        """Start workers until there are so many."""
        while len(self._processes) < count:
            threads = str(max(1, (os.cpu_count() or 1) // self.count))
            process = subprocess.Popen(
                [sys.executable, "-m", "lorary.train.compare.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"},
                start_new_session=True,  # the terminal's Ctrl-C is for the comparison, which stops its workers
            )
            self._processes.append(process)
            with suppress(BrokenPipeError):  # it has ended already, which its first job will say
                send(process.stdin, self.request)
            self._idle.put(process)

    def _remote(self, job: Any) -> Any:
        """The result of a job, done by an idle worker."""
        process = self._idle.get()
        try:
            send(process.stdin, job)
            while (message := pickle.load(process.stdout))[0] == STEPS:  # type: ignore[arg-type]  # a pipe
                self.tell(message[1])
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            what = f"has ended in {job}"
            fix = "look at its messages above; if memory ran out, use fewer workers"
            raise TrainingError("a process of the comparison has ended:", [Diagnostic("workers", what, fix)]) from None
        finally:
            self._idle.put(process)
        kind, value = message
        if kind == FAILURE:
            raise value
        return value
