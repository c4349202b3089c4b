"""The adapters of an engine: names in the registry, contents in the pool, and the loan of an adapter from both."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from lorary.serve.forms.serving_form import ServingForm
from lorary.serve.interface import BusyError, Statistics
from lorary.serve.pool.lease import Lease
from lorary.serve.pool.pool import Pool
from lorary.serve.pool.registry import Registry


class Loan:
    """An adapter that a request uses: it stays as it is, whatever happens to its name, until the loan ends."""

    def __init__(self, lease: Lease, pool: Pool) -> None:
        self._lease, self._pool = lease, pool
        self._brought = False

    @property
    def name(self) -> str:
        return self._lease.name

    @property
    def ready(self) -> bool:
        """Whether it is in host memory, or cannot be used."""
        return self._lease.future.done()

    @property
    def error(self) -> str:
        """Why it cannot be used; empty if it can, or while it is read."""
        future = self._lease.future
        if not future.done() or future.cancelled():
            return ""
        return str(future.exception() or "")

    @property
    def busy(self) -> bool:
        """Whether the host has no room for it now."""
        future = self._lease.future
        return future.done() and not future.cancelled() and isinstance(future.exception(), BusyError)

    @property
    def uid(self) -> str:
        """Its content hash; empty before it is ready."""
        return self._lease.uid

    @property
    def form(self) -> ServingForm:
        """Its form on the host, once it is ready and has no error."""
        return self._pool.form(self.uid)

    def bring(self) -> ServingForm | None:
        """Its form with tensors beside the base, until `release`; None if there is no room now. In the engine's thread.

        Raises:
            FileError: there will never be room.
        """
        form = self._pool.bring(self.uid)
        self._brought = form is not None
        return form

    def release(self) -> None:
        """The batch needs its tensors no longer; nothing happens if they were not brought. In the engine's thread."""
        if self._brought:
            self._brought = False
            self._pool.release(self.uid)

    def end(self) -> None:
        """Give it back; `release` comes before."""
        self._lease.release()


class Store:
    """Adapters by name. Every method may be called from any thread, `memory` from the engine's alone.

    Args:
        registry: of names.
        pool: of contents, the registry's.
    """

    def __init__(self, registry: Registry, pool: Pool) -> None:
        self.registry, self.pool = registry, pool

    def borrow(self, name: str, when_ready: Callable[[], None]) -> Loan:
        """Use an adapter; it begins to be read if it must.

        Args:
            name: of the adapter.
            when_ready: called from any thread when the loan becomes ready; at once if it is.

        Raises:
            UnknownAdapterError: no adapter has this name.
            FileError, MethodError: its folder cannot be served, as found before.
            BusyError: too many adapters are being read.
        """
        lease = self.registry.lease(name)
        lease.future.add_done_callback(lambda _: when_ready())
        return Loan(lease, self.pool)

    def memory(self, waiting: Collection[str]) -> dict[str, Any]:
        """What the scheduling policy must know of memory, as `Admission.decide` takes it.

        Args:
            waiting: the uids that are waited for, on the host.
        """
        arena = self.pool.space.arena
        most = self.pool.space.capacity - self.pool.space.taken
        return {
            "free": min(len(arena.free()) * arena.sector_bytes + arena.reclaimable(), most),
            "resident": self.pool.residents(),
            "sizes": {uid: self.pool.size(uid) for uid in waiting},
            "pinned": frozenset(uid for uid in self.pool.pinned if self.pool.resident(uid)),
        }

    def statistics(self) -> Statistics:
        """The figures of the adapters."""
        figures, loader = self.pool.statistics(), self.registry.loader
        return {
            "adapter_bytes": figures["taken_bytes"],
            "host_bytes": figures["host_bytes"],
            "loads": loader.count,
            "load_seconds": loader.seconds,
            "hits": figures["hits"],
            "evictions": figures["evictions"],
        }

    def close(self) -> None:
        """End what is read in the background."""
        self.registry.close()
