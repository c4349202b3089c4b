"""The policy of `routing` as a request router of Ray Serve, which imports this file by its name."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import RequestRouter

from lorary.serve.ray.routing import ranked_replicas


class AdapterRouter(RequestRouter):  # type: ignore[misc]
    """The router in a handle of the replicas. The adapter comes as the multiplexed model id."""

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        """The replicas in the order in which they are tried; see Ray's `RequestRouter`."""
        by_name = {str(replica.replica_id.unique_id): replica for replica in candidate_replicas}
        queued = self.replica_queue_len_cache.get
        loads = {name: queued(replica.replica_id) or 0 for name, replica in by_name.items()}
        adapter = pending_request.metadata.multiplexed_model_id if pending_request is not None else ""
        return [[by_name[name]] for name in ranked_replicas(adapter, loads)]
