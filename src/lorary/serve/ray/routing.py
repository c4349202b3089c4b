"""The replica for a request: consistent hashing with bounded loads.

Every adapter has an order of the replicas that depends on its name and theirs alone (rendezvous hashing), and a request
goes to the first of them that is not busier than the others by more than a bound. So an adapter is in the memory of few
replicas, a popular one of as many as it needs, a replica that comes or goes moves only its own share, and there is no
table to keep. (Mirrokni, Thorup and Zadimoghaddam 2016, arXiv:1608.01350.)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

_SPARE = 1.25  # times the mean load, and one request


def ranked_replicas(adapter: str, loads: Mapping[str, int]) -> list[str]:
    """The replicas in the order in which they are tried.

    Args:
        adapter: of the request; empty for the base, which every replica has.
        loads: replica -> its requests in flight.

    >>> ranked_replicas("", {"a": 3, "b": 1})
    ['b', 'a']
    """
    if not loads:
        return []
    if not adapter:
        return sorted(loads, key=lambda replica: (loads[replica], replica))
    bound = math.ceil(_SPARE * (sum(loads.values()) + 1) / len(loads)) + 1
    order = sorted(loads, key=lambda replica: _score(adapter, replica), reverse=True)
    free = [replica for replica in order if loads[replica] < bound]
    return free + sorted((replica for replica in order if loads[replica] >= bound), key=loads.__getitem__)


def _score(adapter: str, replica: str) -> bytes:
    return hashlib.blake2b(f"{len(adapter)}:{adapter}{replica}".encode(), digest_size=8).digest()
