"""Stop requests: the first signal finishes the step and saves, a second one ends the process at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """A context that records the first SIGTERM or SIGINT instead of obeying it; a second one is obeyed.

    The previous handlers are restored at its end; a context of this kind around it records the signal too. Outside the
    main thread, where Python forbids handlers, it records nothing.

    Attributes:
        received: the number of the signal, or 0. A run that it ended exits with 128 + this, as in a shell.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._record) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _record(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            self.__exit__()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number
        around = getattr(self._before.get(number), "__self__", None)
        if isinstance(around, StopSignal):  # which would not hear of it: a run of a comparison may ignore it at its end
            around.received = around.received or number
