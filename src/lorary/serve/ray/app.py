"""The Ray Serve application: the HTTP side, and replicas of the engine behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lorary.errors import ConfigError, Diagnostic
from lorary.serve.engine import Engine
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
        """Why they are not acceptable."""
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
