"""The registry: names of adapters, the content that each stands for, and the requests in flight.

A name stands for what its folder holds: when the files change, the next request gets the new content, under another
uid, and requests in flight keep what they began with. Equal bytes have an equal uid, so that a reload of the same
adapter keeps its prefix cache. Unloading forgets the name at once, and the content with the last request.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Collection
from concurrent.futures import Future
from pathlib import Path

from lorary.errors import Diagnostic, FileError, LoraryError
from lorary.files.safe_open import checked_path
from lorary.files.strict_json import show
from lorary.serve.interface import AdapterCard, BusyError, UnknownAdapterError
from lorary.serve.pool.adapter_root import AdapterRoot, changed_at, invalid_name, stamp
from lorary.serve.pool.lease import Entry, Lease, Reading, lies_in_files
from lorary.serve.pool.loader import Loaded, Loader, failure
from lorary.serve.pool.names import name_problems, unknown_name
from lorary.serve.pool.pool import Pool

_HEADLINE = "cannot load the adapter:"
_STOPS = BusyError("no room for the adapter now:", [Diagnostic("", "the server stops")])


class Registry:
    """Names of adapters. Every method may be called from any thread.

    Args:
        pool: where contents are kept.
        loader: reads them.
        root: below which adapters are found without being registered, and to which `load` is confined; None: neither.
        reserved: names that no adapter can have: the base's.
        recheck: seconds for which the files of an adapter are taken to be unchanged.
    """

    def __init__(
        self,
        pool: Pool,
        loader: Loader,
        *,
        root: AdapterRoot | None = None,
        reserved: Collection[str] = (),
        recheck: float = 0.5,
    ) -> None:
        self.pool, self.loader, self.root, self.reserved, self.recheck = pool, loader, root, reserved, recheck
        self._lock = threading.RLock()
        self._entries = dict[str, Entry]()
        self._unloaded = set[str]()  # names below the root that are not found again
        self._users = Counter[str]()  # uid -> names that stand for it, and requests that lease it
        self._pins = Counter[str]()  # uid -> pinned names

    def entry(self, name: str) -> Entry:
        """What a name stands for now. A request keeps it: the name may stand for another adapter soon.

        Raises:
            UnknownAdapterError: no adapter has this name.
        """
        with self._lock:
            return self._entry(name)

    def lease(self, of: str | Entry) -> Lease:
        """Lease an adapter for a request; it is read first if it is not on the host.

        Args:
            of: its name, or what the name stood for when the request came.

        Raises:
            UnknownAdapterError: no adapter has this name.
            FileError, MethodError: its folder cannot be served, as found before.
            BusyError: too many adapters are being read.
        """
        with self._lock:
            entry = of if isinstance(of, Entry) else self._entry(of)
            name = entry.name
            self._look(entry)
            if entry.source is None and not entry.stamp:  # it was found below the root, and is gone
                if not entry.replaced:
                    self._replace(name, None)
                raise self._unknown(name)
            if entry.error is not None:
                raise type(entry.error)(entry.error.headline, entry.error.problems)
            lease = Lease(name, self.pool, self._release)
            if entry.stale or not (entry.uid and self.pool.hold(entry.uid)):
                self._read(entry, lease)
                return lease
            self._grant(lease, entry.uid)
        lease.future.set_result(lease.uid)
        return lease

    def load(
        self, name: str, folder: str, *, replace: bool = False, pinned: bool = False, trusted: bool = False
    ) -> AdapterCard:
        """Register an adapter; it blocks until the adapter is on the host.

        Args:
            name: the name.
            folder: its folder; below the root, unless it is trusted.
            replace: whether another adapter of this name is replaced; its requests in flight keep it.
            pinned: whether it stays in memory.
            trusted: whether the folder comes from the server's owner.

        Raises:
            FileError: the name or the folder cannot be used, with every reason; nothing has changed.
            MethodError: its method cannot be served on this base.
            BusyError: there is no room for it now.
        """
        entry = Entry(name, folder, trusted, pinned)
        with self._lock:
            problems = self._name_problems(name, replace)
            try:
                entry.folder = self._path(entry)
                problems += [] if problems or replace else self._found_elsewhere(name, entry.folder)
            except FileError as error:
                problems += error.problems
            if problems:
                raise FileError(_HEADLINE, problems)
            self._look(entry)
            lease = Lease(name, self.pool, self._release)
            self._read(entry, lease)
        lease.future.result()
        try:
            with self._lock:
                if problems := self._name_problems(name, replace):  # another call was quicker
                    self._abandon(entry)
                    raise FileError(_HEADLINE, problems)
                self._replace(name, entry)
                return self._card(entry)
        finally:
            lease.release()

    def unload(self, name: str) -> None:
        """Forget a name, also one that is found below the root, until it is loaded again.

        Raises:
            UnknownAdapterError: no adapter has this name.
        """
        with self._lock:
            self._entry(name)
            self._replace(name, None)
            if self.root is not None and self.root.find(name) is not None:
                self._unloaded.add(name)

    def cards(self) -> list[AdapterCard]:
        """All adapters that requests may name, by name."""
        paths = {name: f"{self.root.folder}/{name}" for name in self.root.names()} if self.root is not None else {}
        found = {n: AdapterCard(n, folder=p, created=changed_at(p)) for n, p in paths.items()}  # requests need the lock
        with self._lock:
            for name in [n for n, entry in self._entries.items() if entry.source is None and n not in found]:
                self._replace(name, None)  # its folder is gone
            hidden = self._unloaded | self._entries.keys() | set(self.reserved)
            cards = {n: found[n] for n in found.keys() - hidden} | {n: self._card(e) for n, e in self._entries.items()}
        return [cards[name] for name in sorted(cards)]

    def card(self, name: str) -> AdapterCard:
        """One adapter.

        Raises:
            UnknownAdapterError: no adapter has this name.
        """
        with self._lock:
            return self._card(self._entry(name))

    def statistics(self) -> dict[str, int]:
        """Figures of this moment."""
        with self._lock:
            entries = list(self._entries.values())
            return {
                "names": len(entries),
                "reading": sum(entry.reading is not None for entry in entries),
                "failed": sum(entry.error is not None for entry in entries),
                "draining": len(self._users.keys() - {entry.uid for entry in entries}),
            }

    # --- names --------------------------------------------------------------------------------------------------------

    def _entry(self, name: str) -> Entry:
        """The entry of a name, made if it is found below the root."""
        if invalid_name(name):  # also what is no text
            raise self._unknown(name)
        if name in self._entries:
            return self._entries[name]
        hidden = self.root is None or name in self._unloaded or name in self.reserved
        found = None if self.root is None or hidden else self.root.find(name)
        if found is None:
            raise self._unknown(name)
        return self._entries.setdefault(name, Entry(name, folder=found))

    def _unknown(self, name: str) -> UnknownAdapterError:
        inside = f"{name}/adapter"  # a run folder's
        there = self.root is not None and inside not in self._unloaded and self.root.find(inside) is not None
        return unknown_name(name, self._entries, inside if there else None)

    def _name_problems(self, name: str, replace: bool) -> list[Diagnostic]:
        entry = self._entries.get(name)
        taken = entry is not None and entry.source is not None and not replace
        return name_problems(name, self.reserved, taken=taken)

    def _found_elsewhere(self, name: str, folder: Path) -> list[Diagnostic]:
        there = self.root.find(name) if self.root is not None and name not in self._unloaded else None
        what = f"{show(name)} is that of another folder below the root"
        return [Diagnostic("name", what, "use another, or replace it")] if there not in (None, folder) else []

    def _path(self, entry: Entry) -> Path:
        """Where the folder of an entry is, links followed."""
        if entry.trusted:
            return Path(checked_path(entry.source, _HEADLINE)).resolve()
        if self.root is None:
            what, fix = "this server loads no adapters while it runs", "start it with a root for them"
            raise FileError(_HEADLINE, [Diagnostic("", what, fix)])
        return self.root.confine(entry.name if entry.source is None else entry.source)

    def _replace(self, name: str, entry: Entry | None) -> None:
        """Let a name stand for another entry, or for none."""
        old = self._entries.pop(name, None)
        if entry is not None:
            self._entries[name] = entry
            self._unloaded.discard(name)
        if old is not None:
            self._abandon(old)
            old.reading, old.replaced = None, True  # its requests get what is read, the name does not

    # --- contents -----------------------------------------------------------------------------------------------------

    def _look(self, entry: Entry) -> None:
        """Have an adapter read again if its files have changed since."""
        now = time.monotonic()
        if entry.stamp and now - entry.checked < self.recheck:
            return
        try:
            entry.folder = self._path(entry)
            found = stamp(entry.folder)
        except FileError:  # a link that leads elsewhere now
            found = ()
        entry.checked = now
        if found != entry.stamp:
            entry.stamp, entry.stale, entry.error, entry.reading = found, True, None, None

    def _read(self, entry: Entry, lease: Lease) -> None:
        """Let a request wait for an adapter that is being read."""
        if entry.reading is not None:
            entry.reading.leases.append(lease)
            return
        within = None if entry.trusted or self.root is None else self.root.folder
        future = self.loader.request(entry.folder, entry.name, within=within)
        entry.reading = reading = Reading([lease])
        future.add_done_callback(lambda done: self._finish(entry, reading, done))

    def _finish(self, entry: Entry, reading: Reading, done: Future[Loaded]) -> None:
        """Take an adapter that was read, or the reason why not."""
        with self._lock:
            waiting = [lease for lease in reading.leases if not lease.released]
            current = entry if entry.reading is reading and not entry.replaced else None
            error = _STOPS if done.cancelled() else done.exception() or self._keep(current, waiting, done.result())
            if current is not None:
                entry.reading = None
                if error is not None:
                    self._abandon(entry)
                if lies_in_files(error):
                    entry.error = error  # until they change
        for lease in waiting:
            if error is not None:
                lease.future.set_exception(error)
            else:
                lease.future.set_result(lease.uid)

    def _keep(self, entry: Entry | None, waiting: list[Lease], loaded: Loaded) -> LoraryError | None:
        """Put an adapter into the pool, for an entry and for requests; why it has no place there."""
        uid = loaded.flat.form.uid
        try:
            self.pool.put(uid, loaded.flat)
        except FileError as error:  # the pool knows its content alone
            names = [entry.name] if entry is not None else [lease.name for lease in waiting]
            problems = [Diagnostic("", problem.what, problem.fix) for problem in error.problems]
            return FileError(failure(names[0]) if names else error.headline, problems)
        except LoraryError as error:
            return error
        for lease in waiting:
            self.pool.hold(uid)
            self._grant(lease, uid)
        if entry is not None:
            self._users[uid] += 1
            self._pins[uid] += entry.pinned
            self._abandon(entry)  # perhaps of the same content
            entry.take(loaded.flat, loaded.stamp)
            self.pool.pin(uid, self._pins[uid] > 0)
        self.pool.unhold(uid)
        if not self._users[uid]:  # all requests for it have gone
            self.pool.drop(uid)
        return None

    def _abandon(self, entry: Entry) -> None:
        """Let an entry stand for no content."""
        uid, entry.uid, entry.form, entry.bytes = entry.uid, "", None, 0
        if uid:
            self._pins[uid] -= entry.pinned
            self.pool.pin(uid, self._pins[uid] > 0)
            self._leave(uid)

    def _grant(self, lease: Lease, uid: str) -> None:
        lease.uid = uid
        self._users[uid] += 1

    def _release(self, lease: Lease) -> None:
        with self._lock:
            if lease.released:
                return
            lease.released = True
            if lease.uid:
                self.pool.unhold(lease.uid)
                self._leave(lease.uid)
        if not lease.uid:
            lease.future.cancel()

    def _leave(self, uid: str) -> None:
        """Forget a content with its last user."""
        self._users[uid] -= 1
        if not self._users[uid]:
            del self._users[uid], self._pins[uid]
            self.pool.drop(uid)

    def _card(self, entry: Entry) -> AdapterCard:
        if self.pool.resident(entry.uid):
            return entry.card("resident")
        return entry.card("ready" if entry.uid in self.pool else "on disk")
