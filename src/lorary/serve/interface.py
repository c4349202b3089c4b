"""The interface of an engine, which generates text for many requests at a time, each with its own adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

from lorary.errors import LoraryError
from lorary.serve.request import Deliver, Request


class RequestError(LoraryError):
    """A request that cannot be served as it is: it is malformed, or does not fit the context."""


class UnknownAdapterError(LoraryError):
    """No adapter has this name."""


class BusyError(LoraryError):
    """The queue is full, or the engine stops. `retry_after` says in how many seconds to ask again."""

    retry_after: float = 1.0


@dataclass(frozen=True)
class AdapterCard:
    """An adapter as the engine sees it.

    Args:
        name: the name.
        uid: its content hash.
        folder: where it was read from.
        state: "on disk", "loading", "ready" (in memory), "resident" (beside the base), "draining" or "failed".
        form: how it is served: "low rank", "low rank with gain", "shared projections", "replica" and so on.
        rank: the highest of its sites; None if nothing of it has a rank.
        bytes: of its tensors as they are served; 0 before it is loaded.
        method: its presets, as `--method` takes them: "dora,rslora"; empty before it is loaded.
        running, waiting: its requests.
        error: why it failed.
        created: Unix time of its folder's last change; 0 if it is gone.
        max_context: the context that its RoPE scaling gives; None for the base's.
        notes: what a user should know: an approximation, what its form costs.
    """

    name: str
    uid: str = ""
    folder: str = ""
    state: str = "on disk"
    form: str = ""
    rank: int | None = None
    bytes: int = 0
    method: str = ""
    running: int = 0
    waiting: int = 0
    error: str = ""
    created: float = 0.0
    max_context: int | None = None
    notes: tuple[str, ...] = ()


class Statistics(TypedDict, total=False):
    """The figures of an engine: gauges of this moment, and counts since the start. An engine leaves out what it lacks.

    Args:
        running, waiting: requests in the batch, and before it.
        budget_bytes: what adapters and keys and values may take together.
        adapter_bytes, kv_bytes: what adapters beside the base take, and what keys and values take.
        kv_usage: the share of the room for keys and values that is in use, 0 to 1.
        host_bytes: adapters in host memory.
        loads, load_seconds: adapters read from disk, and the seconds that took.
        hits: requests whose adapters were in memory already.
        evictions: adapters that gave way to others.
        prefix_queries, prefix_hits: prompt tokens that were looked up in the prefix cache, and those found.
        begun, queue_seconds: requests that joined the batch, and the seconds that they waited before.
        replicas, retries: engines behind this one, and requests that were sent to another since theirs had died.
    """

    running: int
    waiting: int
    budget_bytes: int
    adapter_bytes: int
    kv_bytes: int
    kv_usage: float
    host_bytes: int
    loads: int
    load_seconds: float
    hits: int
    evictions: int
    prefix_queries: int
    prefix_hits: int
    begun: int
    queue_seconds: float
    replicas: int
    retries: int


class Engine(Protocol):
    """Generates text for requests. Every method may be called from any thread.

    Attributes:
        tokenizer: of the base.
        name: of the base, as a request calls it.
        max_context: tokens of a prompt and its continuation at most; None if the model states no limit.
    """

    tokenizer: Any
    name: str
    max_context: int | None

    def start(self) -> None:
        """Begin to serve; `stop` ends it."""
        ...

    def stop(self, drain: float = 0.0) -> None:
        """Refuse new requests, let those in flight end for `drain` seconds at most, and cancel the rest."""
        ...

    def submit(self, request: Request, deliver: Deliver) -> None:
        """Accept a request. `deliver` gets its tokens as they come, and one `Finished` in any case.

        Raises:
            RequestError: it cannot be served, with every reason.
            UnknownAdapterError: an adapter is unknown: the base never answers instead.
            FileError: an adapter is known, and its folder cannot be served, with every reason.
            BusyError: the queue is full, or the engine stops.
        """
        ...

    def cancel(self, id: str) -> None:
        """End a request; unknown ids are ignored. It still gets its `Finished`."""
        ...

    def load(self, name: str, folder: str, *, replace: bool = False, pinned: bool = False) -> AdapterCard:
        """Register an adapter under a name, after all checks; it blocks until the adapter is in memory.

        Raises:
            FileError: the folder cannot be served, or the name is taken and `replace` is False.
        """
        ...

    def unload(self, name: str) -> None:
        """Forget a name: new requests do not find it, those in flight end as they began.

        Raises:
            UnknownAdapterError: no adapter has this name.
        """
        ...

    def adapters(self) -> list[AdapterCard]:
        """All adapters that requests may name, by name."""
        ...

    def adapter(self, name: str) -> AdapterCard:
        """The adapter of this name: what `adapters` says of it, without the others.

        Raises:
            UnknownAdapterError: no adapter has this name.
        """
        ...

    def why_dead(self) -> str | None:
        """None while the engine works; what ended its thread otherwise."""
        ...

    def statistics(self) -> Statistics:
        """The figures of this moment."""
        ...
