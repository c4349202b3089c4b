"""A process that does jobs of a comparison: `python -m lorary.train.compare.worker`.

It reads the request and then jobs from its standard input, and writes messages to its standard output, as pickles,
which no other program can reach; what libraries print goes to standard error. It ends at once when its input does, so
that none outlives a comparison that is killed.
"""

from __future__ import annotations

import os
import pickle
import queue
import sys
import threading
import traceback
from typing import Any

import transformers

from lorary.train.compare.bench import Bench

STEPS, RESULT, FAILURE = "steps", "result", "failure"  # the kinds of messages


def send(stream: Any, value: Any) -> None:
    """Write a value to a pipe."""
    pickle.dump(value, stream)
    stream.flush()


def main() -> None:
    """Do jobs until the input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    transformers.logging.set_verbosity_error()
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(sys.stdin.buffer, inbox), daemon=True).start()
    bench = Bench(inbox.get())
    while True:
        job = inbox.get()
        try:
            message = RESULT, job.run(bench, lambda count: send(answers, (STEPS, count)))
        except Exception as error:
            message = FAILURE, error
        send(answers, message)


def _read(stream: Any, inbox: queue.SimpleQueue[Any]) -> None:
    """Pass on what comes in; at its end, or if it cannot be read, end this process: nobody else would."""
    try:
        while True:
            inbox.put(pickle.load(stream))
    except (EOFError, OSError):
        os._exit(0)
    except Exception:
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    main()
