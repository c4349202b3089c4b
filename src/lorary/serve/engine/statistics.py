"""The figures of an engine: what `Engine.statistics` reports, and metrics and the page show.

Gauges are of this moment; counts have grown since the start. An engine leaves out what it does not know.
"""

from __future__ import annotations

from typing import TypedDict


class Statistics(TypedDict, total=False):
    """The figures of an engine.

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
