"""Requests that have come and whose adapters are not in memory yet.

Adapters are read while requests wait. Where those of all requests together have no room on the host, the youngest are
parked: they give back what they hold, and ask again one by one, the oldest first, when another request has ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lorary.errors import LoraryError
from lorary.serve.engine.in_flight import InFlight
from lorary.serve.interface import BusyError
from lorary.serve.pool.registry import Registry
from lorary.serve.request import FinishReason


@dataclass(frozen=True)
class Sorted:
    """The arrivals that need to wait no longer.

    Args:
        ready: those whose adapters are in memory, in order of arrival.
        ended: id -> why it ends here.
    """

    ready: list[InFlight] = field(default_factory=list)
    ended: dict[str, tuple[FinishReason, str]] = field(default_factory=dict)


class Arrivals:
    """The requests whose adapters are not in memory yet. All but `borrow` is called with the engine's lock.

    Args:
        registry: of the adapters.
        notify: called from any thread when `has_news` may have become true.
        patience: seconds after which a parked request keeps younger ones from reading adapters.
    """

    def __init__(self, registry: Registry, notify: Callable[[], None], patience: float) -> None:
        self._registry, self._notify, self._patience = registry, notify, patience
        self._waiting: dict[str, InFlight] = {}
        self._parked: dict[str, InFlight] = {}  # some of them
        self._retried: str | None = None  # the one of them that has asked again
        self._alone = False  # whether no other request held adapters then
        self._freed = False  # whether a request has ended since
        self._crowded = False  # whether a parked request has waited too long

    def borrow(self, flight: InFlight) -> None:
        """Begin to read the adapters of a request.

        Raises:
            UnknownAdapterError: an adapter is unknown.
            FileError, MethodError: its folder cannot be served, as found before.
            BusyError: too many adapters are being read.
        """
        if self._crowded:
            for name in flight.request.adapters:
                self._registry.card(name)
        else:
            flight.borrow(self._registry, self._notify)

    def add(self, flight: InFlight) -> None:
        """Let a request wait for its adapters."""
        id = flight.request.id
        self._waiting[id] = flight
        if len(flight.leases) < len(flight.request.adapters):
            self._parked[id] = flight

    def remove(self, id: str) -> None:
        """Forget a request; unknown ids are ignored."""
        self._waiting.pop(id, None)
        self._parked.pop(id, None)
        if self._retried == id:
            self._retried = None

    def freed(self) -> None:
        """Note that a request has ended: its adapters may have made room."""
        self._freed = bool(self._parked)

    @property
    def has_news(self) -> bool:
        """Whether `sort` would find something."""
        return self._freed or any(flight.ready for flight in self._waiting.values())

    @property
    def next_deadline(self) -> float | None:
        """When the first request will have waited too long."""
        return min((f.begin_by for f in self._waiting.values() if f.begin_by is not None), default=None)

    def sort(self, others: Mapping[str, InFlight]) -> Sorted:
        """Take out what needs to wait here no longer.

        Args:
            others: all requests in flight: those that hold adapters will free them.
        """
        now, found = time.monotonic(), Sorted()
        for id, flight in list(self._waiting.items()):
            if flight.begin_by is not None and flight.begin_by <= now:
                late = "it could not begin in time" if flight.ready else "its adapters were not loaded in time"
                found.ended[id] = ("deadline", late)
            elif flight.ready and flight.busy:
                alone = self._retried == id and self._alone and _without_leases(others, flight)
                self._park(flight)
                if alone:
                    found.ended[id] = ("error", "its adapters have no room in the host's memory together")
            elif flight.ready and flight.errors:
                found.ended[id] = ("refused" if flight.refused else "error", "; ".join(flight.errors))
            elif flight.ready:
                found.ready.append(flight)
        for id in [*found.ended, *(flight.request.id for flight in found.ready)]:
            self.remove(id)
        if (failed := self._ask_again(others)) is not None:
            found.ended[failed[0]] = ("error", failed[1])
            self.remove(failed[0])
        oldest = next(iter(self._parked.values()), None)
        self._crowded = oldest is not None and now - oldest.arrived > self._patience
        return found

    def _park(self, flight: InFlight) -> None:
        flight.give_back()
        id = flight.request.id
        if self._retried == id:
            self._retried = None
            self._parked = {id: flight, **self._parked}  # it stays the first
        else:
            self._parked[id] = flight

    def _ask_again(self, others: Mapping[str, InFlight]) -> tuple[str, str] | None:
        """Let the oldest parked request ask again, if there may be room; (id, reason) if it fails."""
        idle = _without_leases(others)
        if self._retried is not None or not self._parked or not (self._freed or idle):
            return None
        self._freed = False
        id, flight = next(iter(self._parked.items()))
        try:
            flight.borrow(self._registry, self._notify)
        except BusyError:
            return None
        except LoraryError as error:
            return id, str(error)
        del self._parked[id]
        self._retried, self._alone = id, idle
        return None


def _without_leases(flights: Mapping[str, InFlight], but: InFlight | None = None) -> bool:
    """Whether no request, or none but one, has leased adapters."""
    return not any(flight.leases for flight in flights.values() if flight is not but)
