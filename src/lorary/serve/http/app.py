"""The HTTP application: routes, keys, limits and errors around an engine."""

from __future__ import annotations

from fastapi import FastAPI, Response

from lorary import __version__
from lorary.serve.http.adapters import adapters_router
from lorary.serve.http.errors import ApiError, handle_errors, log
from lorary.serve.http.generate import generate_router
from lorary.serve.http.limits import Limits, Traffic
from lorary.serve.http.lorax import lorax_router
from lorary.serve.http.metrics import CountErrors, metrics_router
from lorary.serve.http.models import models_router
from lorary.serve.http.observed import Observed
from lorary.serve.http.openai import openai_router
from lorary.serve.http.page import page_router
from lorary.serve.http.security import Keys
from lorary.serve.http.settings import Settings
from lorary.serve.http.sglang import sglang_router
from lorary.serve.interface import Engine


def create_app(engine: Engine, settings: Settings | None = None, traffic: Traffic | None = None) -> FastAPI:
    """The application that serves an engine.

    Args:
        engine: started already; whoever started it stops it.
        settings: keys, root and limits.
        traffic: counts the requests in flight, for a drain.

    Returns:
        An ASGI application.
    """
    settings, traffic = settings or Settings(), traffic or Traffic()
    observed = engine = Observed(engine)
    # no pages of its own: they would describe bodies that FastAPI does not see, to callers without a key
    app = FastAPI(title="lorary", version=__version__, openapi_url=None, docs_url=None, redoc_url=None)
    handle_errors(app)
    routers = (openai_router, models_router, adapters_router, generate_router, lorax_router, sglang_router)
    for router in routers:
        app.include_router(router(engine, settings))
    app.include_router(metrics_router(observed.metrics))
    app.include_router(page_router(observed))

    @app.get("/health")
    def health() -> Response:
        if (why := engine.why_dead()) is not None:
            log.error("the engine is dead: %s", why)
            raise ApiError(503, "the engine has stopped; its log says why")
        if traffic.draining:
            raise ApiError(503, "the server is shutting down")
        return Response()

    app.add_middleware(Limits, settings=settings, traffic=traffic)
    app.add_middleware(Keys, settings=settings)
    app.add_middleware(CountErrors, metrics=observed.metrics)  # the last one added is the first one asked
    return app
