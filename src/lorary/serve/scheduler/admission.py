"""The state around the policy: the queue, the batch, and the shares of the tenants."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lorary.errors import Diagnostic, StateError
from lorary.serve.scheduler.decide import decide
from lorary.serve.scheduler.pending import Pending, Waiting
from lorary.serve.scheduler.policy import Decision, Policy, Snapshot
from lorary.serve.scheduler.shares import Shares


@dataclass
class _Running:
    """A request in the batch, and what has been computed of it."""

    request: Pending
    prompt: int = 0
    generated: int = 0

    def rest(self) -> Pending:
        r = self.request
        tokens, prompt = r.tokens - self.prompt - self.generated, r.prompt - self.prompt
        return Pending(r.id, r.adapters, r.tenant, r.arrived, r.deadline, max(tokens, 0), max(prompt, 0))


class Admission:
    """The queue, the batch and the tenants' shares of an engine. It belongs to the engine's thread.

        admission.add(request)                      when it comes and its adapters are in memory
        if admission.due(now):                      before a step
            decision = admission.decide(now, ...)   moves what is admitted into the batch, forgets what is too late
        admission.computed(id, prompt=n)            after a step
        admission.remove(id)                        when it ends, or is cancelled

    Args:
        policy: the settings.
        choose: the policy itself.

    Attributes:
        until: when the policy is worth asking again.
    """

    def __init__(self, policy: Policy, choose: Callable[[Snapshot, Policy], Decision] = decide) -> None:
        self.policy, self._choose = policy, choose
        self.shares = Shares(policy)
        self.waiting = Waiting()
        self._running: dict[str, _Running] = {}
        self._users: dict[str, int] = {}  # uid -> requests in the batch
        self._since: dict[str, float] = {}
        self.until = math.inf

    @property
    def running(self) -> tuple[str, ...]:
        """The ids in the batch, in order of admission."""
        return tuple(self._running)

    @property
    def _full(self) -> bool:
        return len(self._running) >= self.policy.max_running

    @property
    def in_batch(self) -> Mapping[str, int]:
        """uid -> requests in the batch."""
        return self._users

    def add(self, request: Pending) -> None:
        """Let a request wait.

        Raises:
            StateError: its id is taken.
        """
        if request.id in self._running:
            raise StateError("cannot queue the request:", [Diagnostic(request.id, "the id is taken")])
        self.waiting.add(request)
        self.shares.enter(request.tenant)
        if self._full:
            self.until = min(self.until, math.inf if request.deadline is None else request.deadline)
        else:
            self.changed()

    def remove(self, id: str) -> None:
        """Forget a request that has ended or is cancelled; unknown ids are ignored."""
        if (request := self.waiting.pop(id) or self._leave_batch(id)) is not None:
            self.shares.leave(request.tenant)
            self.changed()

    def put_back(self, ids: Sequence[str], retry: float) -> None:
        """Let requests that were admitted and could not begin wait again, before all others, in their order.

        Args:
            retry: when to ask again although nothing changes.
        """
        for id in reversed(ids):
            if (request := self._leave_batch(id)) is not None:
                self.waiting.add(request, first=True)
        self.until = min(self.until, retry)

    def _leave_batch(self, id: str) -> Pending | None:
        if (running := self._running.pop(id, None)) is None:
            return None
        for uid in running.request.adapters:
            self._users[uid] -= 1
            if not self._users[uid]:
                del self._users[uid], self._since[uid]
        return running.request

    def computed(self, id: str, prompt: int = 0, generated: int = 0) -> None:
        """Count tokens that were computed for a request in the batch."""
        running = self._running[id]
        running.prompt += prompt
        running.generated += generated
        self.shares.charge(running.request.tenant, prompt, generated)

    def changed(self) -> None:
        """Ask the policy before the next step: memory became free, say."""
        self.until = -math.inf

    def due(self, now: float) -> bool:
        """Whether the policy could decide anything that it has not."""
        return bool(self.waiting) and now >= self.until

    def decide(
        self,
        now: float,
        *,
        free: int = 0,
        resident: Mapping[str, int] | None = None,
        sizes: Mapping[str, int] | None = None,
        pinned: frozenset[str] = frozenset(),
    ) -> Decision:
        """The policy's decision, carried out on the queue: see `Snapshot` for the arguments."""
        snapshot = Snapshot(
            now,
            self.waiting,
            [running.rest() for running in self._running.values()],
            resident or {},
            sizes or {},
            free,
            self.shares.served,
            self._since,
            pinned,
        )
        decision = self._choose(snapshot, self.policy)
        for id in decision.admit:
            request = self.waiting.pop(id)
            assert request is not None  # the policy admits what waits
            self._running[id] = _Running(request)
            for uid in request.adapters:
                self._users[uid] = self._users.get(uid, 0) + 1
                self._since.setdefault(uid, now)
        for id in (*decision.expired, *decision.refused):
            self.remove(id)
        self.until = decision.until
        return decision
