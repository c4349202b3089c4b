"""A replica: one engine, whose requests come over Ray.

Replicas share no state. Each knows the same folders and the same root, and loads an adapter when the first request for
it comes, so that a replica that starts late, or again, can serve every request.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

from lorary.errors import LoraryError
from lorary.serve.interface import AdapterCard, Engine, Statistics, UnknownAdapterError
from lorary.serve.request import Event, Finished, Request

Answer = LoraryError | tuple[Event, ...]  # a refusal, or what has been generated since the last one


class Status(NamedTuple):
    """The state of a replica at a moment.

    Args:
        adapters: those that it serves.
        statistics: its figures.
        why_dead: what ended its engine; None while it works.
    """

    adapters: list[AdapterCard]
    statistics: Statistics
    why_dead: str | None


class Replica:
    """An engine behind Ray Serve.

    Args:
        open_engine: opens the engine; called once, in the replica's process.
    """

    def __init__(self, open_engine: Callable[[], Engine]) -> None:
        self.engine = open_engine()
        self.engine.start()

    async def generate(self, request: Request) -> AsyncIterator[Answer]:
        """The tokens of a request as they come. The first answer is empty once it is accepted, or the refusal."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def deliver(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        try:
            await asyncio.to_thread(self.engine.submit, request, deliver)
        except LoraryError as error:
            yield error
            return
        try:
            yield ()
            going = True
            while going:
                found = [await events.get()]
                while not events.empty():
                    found.append(events.get_nowait())
                going = not isinstance(found[-1], Finished)
                yield tuple(found)
        finally:  # also when the other side has gone
            self.engine.cancel(request.id)

    async def adapter(self, name: str) -> AdapterCard | None:
        """The adapter of this name; None if there is none."""
        try:
            return self.engine.adapter(name)
        except UnknownAdapterError:
            return None

    async def status(self) -> Status:
        """The replica at this moment."""
        return Status(self.engine.adapters(), self.engine.statistics(), self.engine.why_dead())

    def check_health(self) -> None:
        """Tell Ray Serve to replace this replica if its engine has died."""
        if (reason := self.engine.why_dead()) is not None:
            raise RuntimeError(reason)

    def __del__(self) -> None:  # Ray Serve calls it once no request is left, or its patience is at an end
        if hasattr(self, "engine"):
            self.engine.stop()


def affinity(request: Request) -> str:
    """The adapter that decides which replica is preferred: the one with the largest weight; empty for the base."""
    return max(request.adapters, key=lambda name: (abs(request.adapters[name]), name), default="")
