"""The lease of an adapter by a request, and the registry's entry of a name."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from lorary.errors import FileError, LoraryError, MethodError
from lorary.serve.forms.flat import Flat
from lorary.serve.forms.serving_form import ServingForm
from lorary.serve.interface import AdapterCard, BusyError
from lorary.serve.pool.adapter_root import Stamp, changed_at
from lorary.serve.pool.pool import Pool


def lies_in_files(error: BaseException | None) -> TypeGuard[LoraryError]:
    """Whether an adapter's files are the reason, and not the machine."""
    return isinstance(error, FileError | MethodError) and error.__cause__ is None


class Lease:
    """The right of a request to an adapter, which stays as it is until `release`, whatever happens to its name.

    Its content is on the host once `future` has a result, and beside the base from `bring` to `leave_batch`. These two,
    and a `release` between them, belong to the engine's thread; the rest may be called from any.

    Args:
        name: the adapter's.
        pool: holds the content.
        release: takes the lease back; of the registry.

    Attributes:
        future: its uid, once it is on the host; or why it cannot be served. Cancelled if released before.
        uid: the same, empty before; for the registry to set.
        released: whether it was given back; for the registry to set.
    """

    def __init__(self, name: str, pool: Pool, release: Callable[[Lease], None]) -> None:
        self.name, self.future = name, Future[str]()
        self.uid, self.released = "", False
        self._pool, self._release, self._brought = pool, release, False

    @property
    def ready(self) -> bool:
        """Whether the adapter is on the host, or cannot be used."""
        return self.future.done()

    @property
    def error(self) -> str:
        """Why it cannot be used; empty if it can, or while it is read."""
        return str(self._exception or "")

    @property
    def refused(self) -> bool:
        """Whether its files are the reason, and not the machine."""
        return lies_in_files(self._exception)

    @property
    def busy(self) -> bool:
        """Whether the host has no room for it now."""
        return isinstance(self._exception, BusyError)

    @property
    def form(self) -> ServingForm:
        """Its form on the host, once it is ready and has no error."""
        return self._pool.form(self.uid)

    def bring(self) -> ServingForm | None:
        """Its form with tensors beside the base, until `leave_batch`; None if there is no room now.

        Raises:
            FileError: there will never be room.
        """
        form = self._pool.bring(self.uid)
        self._brought = form is not None
        return form

    def leave_batch(self) -> None:
        """Give up its place beside the base; nothing happens if it has none."""
        if self._brought:
            self._brought = False
            self._pool.release(self.uid)

    def release(self) -> None:
        """Give the adapter back; further calls do nothing."""
        self.leave_batch()
        self._release(self)

    @property
    def _exception(self) -> BaseException | None:
        return self.future.exception() if self.future.done() and not self.future.cancelled() else None


@dataclass(eq=False)
class Reading:
    """An adapter that is being read, and the requests that wait for it."""

    leases: list[Lease]


@dataclass(eq=False)
class Entry:
    """A name, and the content that it stands for.

    Args:
        name: the name.
        source: its folder as it was given; None if it was found below the root.
        trusted: whether the folder comes from the server's owner.
        pinned: whether it stays in memory.
        folder: where the source led when it was last looked at.
        stamp: of the files there, and what `uid` or `error` comes from.
        checked: when that was, on the monotonic clock.
        uid: the content; empty before it was read.
        stale: whether the files have changed since, and are to be read.
        form: how it is served, without tensors.
        bytes: of its tensors.
        error: why the files cannot be served.
        reading: in progress.
        replaced: whether the name stands for something else now.
    """

    name: str
    source: str | None = None
    trusted: bool = False
    pinned: bool = False
    folder: Path = Path()
    stamp: Stamp = ()
    checked: float = float("-inf")
    uid: str = ""
    stale: bool = False
    form: ServingForm | None = None
    bytes: int = 0
    error: LoraryError | None = None
    reading: Reading | None = None
    replaced: bool = False

    def take(self, flat: Flat, stamp: Stamp) -> None:
        """Stand for the content that these files hold."""
        self.uid, self.stamp, self.stale = flat.form.uid, stamp, False
        self.form, self.bytes = flat.form, flat.bytes

    def card(self, state: str) -> AdapterCard:
        """For the users.

        Args:
            state: where the content is, if it is neither being read nor refused.
        """
        form, error = self.form, self.error
        return AdapterCard(
            self.name,
            self.uid,
            str(self.folder),
            "loading" if self.reading is not None else "failed" if error is not None else state,
            form.kind if form is not None else "",
            form.rank if form is not None else None,
            self.bytes,
            form.method if form is not None else "",
            error=str(error) if error is not None else "",
            created=changed_at(self.folder),
            max_context=form.max_context if form is not None else None,
            notes=form.notes if form is not None else (),
        )
