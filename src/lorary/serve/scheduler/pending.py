"""Requests that wait, indexed so that a decision need not look at all of them."""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from lorary.errors import Diagnostic, StateError
from lorary.serve.interface import RequestError


@dataclass(frozen=True)
class Pending:
    """A request that waits, or runs.

    Args:
        id: the request.
        adapters: the uids of its adapters, sorted; empty for the base.
        tenant: whose it is.
        arrived: seconds on the clock of `Snapshot.now`.
        deadline: the time by which it must have begun; None for none.
        tokens: those left to compute and to generate, at most.
        prompt: those of them that are the prompt's.
    """

    id: str
    adapters: tuple[str, ...] = ()
    tenant: str = ""
    arrived: float = 0.0
    deadline: float | None = None
    tokens: int = 0
    prompt: int = 0

    def __post_init__(self) -> None:
        if problems := _why_invalid(self):
            raise RequestError(f"invalid request {self.id!r}:", problems)


def _why_invalid(request: Pending) -> list[Diagnostic]:
    problems = []
    if request.tokens < 0:
        problems.append(Diagnostic("tokens", f"is {request.tokens}, and must not be negative"))
    elif not 0 <= request.prompt <= request.tokens:
        problems.append(Diagnostic("prompt", f"is {request.prompt}, and must be from 0 to tokens, {request.tokens}"))
    if len(request.adapters) > 1 and list(request.adapters) != sorted(set(request.adapters)):
        problems.append(Diagnostic("adapters", f"are {list(request.adapters)}, and must be sorted, each once"))
    for name, value in (("arrived", request.arrived), ("deadline", request.deadline)):
        if value != value:
            problems.append(Diagnostic(name, "is not a number"))
    return problems


_Queue = OrderedDict[str, tuple[int, Pending]]  # id -> (its number in the order of arrival, the request)


class Waiting:
    """Requests in order of arrival, also by tenant and adapters, and by deadline.

    Args:
        requests: in order of arrival.
    """

    def __init__(self, requests: Iterable[Pending] = ()) -> None:
        self._requests: OrderedDict[str, Pending] = OrderedDict()
        self._tenants: dict[str, _Queue] = {}
        self._groups: dict[str, dict[tuple[str, ...], _Queue]] = {}  # tenant -> adapters -> its requests for these
        self._several: dict[str, dict[tuple[str, ...], None]] = {}  # tenant -> the groups of more than one adapter
        self._deadlines: list[tuple[float, str]] = []  # sorted
        self._first, self._last = 0, 0  # numbers
        self.wanted: Counter[str] = Counter()  # uid -> requests that name it
        for request in requests:
            self.add(request)

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Pending]:
        return iter(self._requests.values())

    def __contains__(self, id: object) -> bool:
        return id in self._requests

    @property
    def tenants(self) -> Mapping[str, Pending]:
        """tenant -> its oldest request."""
        return {tenant: next(iter(queue.values()))[1] for tenant, queue in self._tenants.items()}

    def add(self, request: Pending, *, first: bool = False) -> None:
        """Add a request, after all others or before them.

        Raises:
            StateError: its id is taken.
        """
        if request.id in self._requests:
            raise StateError("cannot queue the request:", [Diagnostic(request.id, "the id is taken")])
        self._first, self._last = self._first - first, self._last + (not first)
        self._requests[request.id] = request
        queue = self._tenants.setdefault(request.tenant, OrderedDict())
        group = self._groups.setdefault(request.tenant, {}).setdefault(request.adapters, OrderedDict())
        queue[request.id] = group[request.id] = (self._first if first else self._last, request)
        if first:
            for order in (self._requests, queue, group):
                order.move_to_end(request.id, last=False)
        if len(request.adapters) > 1:
            self._several.setdefault(request.tenant, {})[request.adapters] = None
        if request.deadline is not None:
            insort(self._deadlines, (request.deadline, request.id))
        self.wanted.update(request.adapters)

    def pop(self, id: str) -> Pending | None:
        """Take one out; None if it is unknown."""
        if (request := self._requests.pop(id, None)) is None:
            return None
        groups = self._groups[request.tenant]
        del self._tenants[request.tenant][id], groups[request.adapters][id]
        if not groups[request.adapters]:
            del groups[request.adapters]
            self._several.get(request.tenant, {}).pop(request.adapters, None)
        if not groups:
            del self._groups[request.tenant], self._tenants[request.tenant]
            self._several.pop(request.tenant, None)
        if request.deadline is not None:
            del self._deadlines[bisect_right(self._deadlines, (request.deadline, id)) - 1]
        for uid in request.adapters:
            self.wanted[uid] -= 1
            if not self.wanted[uid]:
                del self.wanted[uid]
        return request

    def expired(self, now: float) -> tuple[str, ...]:
        """Those whose deadline has passed, the earliest first."""
        return tuple(id for _, id in self._deadlines[: self._after(now)])

    def next_deadline(self, now: float) -> float:
        """The first that is to come; infinity for none."""
        rest = self._deadlines[(after := self._after(now)) : after + 1]
        return rest[0][0] if rest else math.inf

    def _after(self, now: float) -> int:
        return bisect_right(self._deadlines, now, key=lambda item: item[0])

    def in_order(self, tenant: str) -> Iterator[tuple[int, Pending]]:
        """The numbers and requests of a tenant."""
        return iter(self._tenants[tenant].values())

    def groups_within(
        self, tenant: str, uids: Collection[str]
    ) -> Iterator[tuple[tuple[str, ...], Collection[tuple[int, Pending]]]]:
        """The groups of a tenant that need no other adapters than these: adapters, and numbers and requests."""
        groups = self._groups[tenant]
        for adapters in ((), *((uid,) for uid in uids), *self._several.get(tenant, ())):
            if adapters in groups and all(uid in uids for uid in adapters):
                yield adapters, groups[adapters].values()
