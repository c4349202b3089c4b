"""The lease of an adapter by a request, and the registry's entry of a name."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from lorary.errors import LoraryError
from lorary.serve.forms.flat import Flat
from lorary.serve.forms.serving_form import ServingForm
from lorary.serve.interface import AdapterCard
from lorary.serve.pool.adapter_root import Stamp


class Lease:
    """The right of a request to an adapter: its content is on the host from the future's result to `release`.

    Attributes:
        name: the adapter's.
        future: its uid, once it is on the host; or why it cannot be served. Cancelled if released before.
        uid: the same, empty before; for the registry.
        released: whether it was given back; for the registry.
    """

    def __init__(self, name: str, release: Callable[[Lease], None]) -> None:
        self.name, self.future = name, Future[str]()
        self.uid, self.released = "", False
        self._release = release

    def release(self) -> None:
        """Give the adapter back; further calls do nothing."""
        self._release(self)


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
        created: Unix time.
        folder: where the source led when it was last looked at.
        stamp: of the files there, and what `uid` or `error` comes from.
        checked: when that was, on the monotonic clock.
        uid: the content; empty before it was read.
        stale: whether the files have changed since, and are to be read.
        form: how it is served, without tensors.
        bytes: of its tensors.
        error: why the files cannot be served.
        reading: in progress.
    """

    name: str
    source: str | None = None
    trusted: bool = False
    pinned: bool = False
    created: float = field(default_factory=time.time)
    folder: Path = Path()
    stamp: Stamp = ()
    checked: float = float("-inf")
    uid: str = ""
    stale: bool = False
    form: ServingForm | None = None
    bytes: int = 0
    error: LoraryError | None = None
    reading: Reading | None = None

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
            created=self.created,
            max_context=form.max_context if form is not None else None,
            notes=form.notes if form is not None else (),
        )
