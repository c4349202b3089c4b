"""A time limit for a whole call, of a server that may be slow on purpose."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TypeVar, cast

T = TypeVar("T")


def within(seconds: float, call: Callable[[], T]) -> T:
    """The result of a call, if it comes in time.

    The timeout of a socket is for each read: a server that sends one byte at a time never exceeds it. The call runs in
    a thread of its own, which is left to itself if it takes longer.

    Raises:
        TimeoutError: it takes longer.
    """
    done: queue.SimpleQueue[tuple[T | None, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((call(), None))
        except Exception as error:
            done.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        found, error = done.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return cast(T, found)
