"""The Ray Serve application: the HTTP side, and replicas of the engine behind it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lorary.errors import ConfigError, Diagnostic
from lorary.serve.interface import Engine
from lorary.serve.ray.remote_engine import RemoteEngine
from lorary.serve.ray.replica import Replica

NAME = "lorary"
_ROUTER = "lorary.serve.ray.router:AdapterRouter"


@dataclass(frozen=True)
class RaySettings:
    """The settings of the application.

    Args:
        replicas: of the engine.
        fronts: processes of the HTTP side.
        ongoing: requests in flight that a replica takes at most.
        queued: requests that wait for a replica at most, in each front.
        cpus, gpus: what a replica occupies.
        drain: seconds that requests in flight have to end when a replica is removed.
    """

    replicas: int = 2
    fronts: int = 1
    ongoing: int = 512
    queued: int = 1024
    cpus: float = 1.0
    gpus: float = 0.0
    drain: float = 30.0

    def problems(self) -> list[Diagnostic]:
        """The reasons why they are not acceptable."""
        found = []
        for name in ("replicas", "fronts", "ongoing", "queued", "cpus", "gpus", "drain"):
            least = 1 if name in ("replicas", "fronts", "ongoing") else 0
            value = getattr(self, name)
            if not isinstance(value, int | float) or type(value) is bool or not least <= value < 1e6:
                found.append(Diagnostic(name, f"is {value!r}, and must be at least {least}"))
        return found


class Front:
    """The HTTP side: an application of `lorary.serve.http` whose engine is the replicas.

    Args:
        handle: of the replicas.
        make_app: engine -> the application.
        describe: gives the tokenizer, the name and the context of the base, in this process.
    """

    def __init__(
        self, handle: Any, make_app: Callable[[Engine], Any], describe: Callable[[], tuple[Any, str, int | None]]
    ) -> None:
        self._engine = RemoteEngine(handle, *describe())
        self._engine.start()
        self._application = make_app(self._engine)

    def __serve_build_asgi_app__(self) -> Any:
        return self._application

    def __del__(self) -> None:
        self._engine.stop()


def application(
    open_engine: Callable[[], Engine],
    make_app: Callable[[Engine], Any],
    describe: Callable[[], tuple[Any, str, int | None]],
    settings: RaySettings = RaySettings(),
) -> Any:
    """The application, to be run by `ray.serve.run` or `serve run`.

    Args:
        open_engine: opens an engine, in the process of a replica; it and the others are sent there by pickle.
        make_app: engine -> the HTTP application, in the process of a front.
        describe: gives the tokenizer, the name and the context of the base, in the process of a front.
        settings: how many of each.

    Raises:
        ConfigError: the settings are not acceptable, with every reason; or Ray is not installed.
    """
    if problems := settings.problems():
        raise ConfigError("cannot serve with Ray:", problems)
    serve = ray_serve()
    from ray.serve.config import RequestRouterConfig

    common = {
        "graceful_shutdown_timeout_s": settings.drain + 10,
        "graceful_shutdown_wait_loop_s": 0.2,
        "logging_config": {"enable_access_log": False},
    }
    engine = serve.deployment(
        Replica,
        name="Engine",
        num_replicas=settings.replicas,
        max_ongoing_requests=settings.ongoing,
        max_queued_requests=settings.queued,
        request_router_config=RequestRouterConfig(request_router_class=_ROUTER),
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        health_check_period_s=5,
        max_constructor_retry_count=2,
        **common,
    )
    front = serve.deployment(
        serve.ingress()(Front),
        name="Front",
        num_replicas=settings.fronts,
        max_ongoing_requests=4096,
        ray_actor_options={"num_cpus": 0},
        **common,
    )
    return front.bind(engine.bind(open_engine), make_app, describe)


@contextmanager
def started(host: str, port: int) -> Iterator[Cluster]:
    """Ray Serve at an address of every machine of the cluster that RAY_ADDRESS names, or else of this one."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported unasked
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve = ray_serve()
    import ray

    own = not (ray.is_initialized() or os.environ.get("RAY_ADDRESS"))
    if not ray.is_initialized():
        options: dict[str, Any] = {"include_dashboard": False} if own else {}
        ray.init(address="local" if own else None, log_to_driver=False, logging_level="ERROR", **options)
    serve.start(http_options={"host": host, "port": port}, logging_config={"log_level": "ERROR"})
    try:
        found = ray.cluster_resources()
        yield Cluster(own, found.get("CPU", 0.0), found.get("GPU", 0.0))
    finally:
        if own:
            serve.shutdown()
            ray.shutdown()


@dataclass(frozen=True)
class Cluster:
    """The cluster that the application runs on.

    Args:
        own: whether it was started for it, on this machine, and ends with it.
        cpus, gpus: that it has.
    """

    own: bool
    cpus: float
    gpus: float

    def settings(self, replicas: int, drain: float) -> RaySettings:
        """The settings for a number of replicas: a GPU for each if there are any, or an equal share of the cores.

        Raises:
            ConfigError: there are not enough for all.
        """
        kind, there = ("GPUs", self.gpus) if self.gpus else ("CPUs", self.cpus)
        if replicas > there and (self.own or self.gpus):  # a cluster of CPUs may grow
            what = f"is {replicas}, and {there:.0f} {kind} are there, one for each at least"
            raise ConfigError("cannot serve with Ray:", [Diagnostic("--replicas", what, f"--replicas {there:.0f}")])
        cores = self.cpus // replicas if self.own else 1
        return RaySettings(replicas, cpus=max(1, int(cores)), gpus=1 if self.gpus else 0, drain=drain)

    def remove(self, name: str) -> None:
        """Remove an application, once its requests have ended."""
        ray_serve().delete(name)


def ray_serve() -> Any:
    """The module `ray.serve`.

    Raises:
        ConfigError: Ray is not installed.
    """
    try:
        from ray import serve
    except ImportError:
        problem = Diagnostic("--engine ray", "Ray Serve is not installed", "pip install 'lorary[ray]'")
        raise ConfigError("cannot serve with Ray:", [problem]) from None
    return serve
