"""Fair shares: the virtual token counters of the tenants (VTC, arXiv:2401.00588)."""

from __future__ import annotations

from collections import Counter

from lorary.serve.scheduler.policy import Policy


class Shares:
    """What each tenant has been served, weighted.

    A tenant that comes back from idleness is lifted to the lowest counter of the active ones: idleness earns no credit.
    A higher counter is kept, as a debt, until the active tenants have passed it.

    Args:
        policy: the weights.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._active: Counter[str] = Counter()  # tenant -> requests that wait or run
        self._floor = 0.0  # the lowest counter of the active tenants, or of the last ones
        self.served: dict[str, float] = {}

    def enter(self, tenant: str) -> None:
        """A request of a tenant has come."""
        if not self._active[tenant]:
            floor = self._lowest()
            self.served = {t: n for t, n in self.served.items() if self._active[t] or n > floor}
            self.served[tenant] = max(self.served.get(tenant, 0.0), floor)
        self._active[tenant] += 1

    def leave(self, tenant: str) -> None:
        """A request of a tenant has ended, in whatever way."""
        self._lowest()
        self._active[tenant] -= 1
        if not self._active[tenant]:
            del self._active[tenant]

    def charge(self, tenant: str, prompt: int = 0, generated: int = 0) -> None:
        """Count tokens that were computed for a tenant."""
        self.served[tenant] = self.served.get(tenant, self._floor) + self._policy.weigh(prompt, generated)

    def _lowest(self) -> float:
        if self._active:
            self._floor = max(self._floor, min(self.served[tenant] for tenant in self._active))
        return self._floor
