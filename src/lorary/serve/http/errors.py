"""Errors as OpenAI's interface shapes them, with the statuses of vLLM."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Coroutine, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from lorary.errors import LoraryError
from lorary.serve.interface import BusyError, UnknownAdapterError

log = logging.getLogger("lorary.serve")

# Names of OpenAI's and vLLM's error types; others are called after their status.
_KINDS = {400: "BadRequestError", 401: "AuthenticationError", 403: "PermissionDeniedError", 404: "NotFoundError"}
_KINDS |= {429: "RateLimitError", 500: "InternalServerError", 503: "ServiceUnavailableError"}
_PATH = re.compile(r"(?<![\w./:])/(?:[^\s/'\"`:,;]+/)+")  # the folders of an absolute path


class ApiError(LoraryError):
    """An answer with an error status.

    Args:
        status: the HTTP status.
        message: one sentence for the client; it holds nothing that the client may not know.
        kind: the `type`; else by the status.
        param: the field that is wrong.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "",
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.headers = status, message, param, dict(headers or {})
        self.kind = kind or _KINDS.get(status) or HTTPStatus(status).phrase.title().replace(" ", "") + "Error"

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's shape."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.status}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def one_line(error: LoraryError) -> str:
    """The error with all its reasons in one line, without the folders of absolute paths."""
    parts = [error.headline] if error.headline else []
    parts += [
        (f"{p.where}: {p.what}" if p.where else p.what) + (f" ({p.fix})" if p.fix else "") for p in error.problems
    ]
    return without_folders(re.sub(r"\s+", " ", "; ".join(parts).replace(":; ", ": ")).strip())


def printed_in_one_line(text: str) -> str:
    """The same of an error that has been printed.

    >>> printed_in_one_line("cannot serve:\\n  - rank: is 64\\n      hint: compress it\\n  - /srv/a/b.json: is missing")
    'cannot serve: rank: is 64 (compress it); b.json: is missing'
    """
    text = re.sub(r"\n\s*- ", "; ", re.sub(r"\n\s*hint: (.*)", r" (\1)", text)).replace(":; ", ": ")
    return without_folders(re.sub(r"\s+", " ", text).strip("; "))


def without_folders(text: str) -> str:
    """The text with absolute paths cut to their last part: clients need not know where files lie.

    >>> without_folders("/srv/adapters/a/adapter.safetensors: is missing")
    'adapter.safetensors: is missing'
    """
    return _PATH.sub("", text)


def api_error(error: Exception) -> ApiError:
    """The answer to a request that raised `error`."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BusyError):
        return ApiError(429, one_line(error), headers={"Retry-After": str(max(1, math.ceil(error.retry_after)))})
    if isinstance(error, LoraryError):
        return ApiError(404 if isinstance(error, UnknownAdapterError) else 400, one_line(error), param=_param(error))
    log.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed on this request; its log says why")


def _param(error: LoraryError) -> str | None:
    where = error.problems[0].where if error.problems else ""
    return where if where.isidentifier() else None


def shaped_errors(render: Callable[[ApiError], Response]) -> type[APIRoute]:
    """The class of routes whose errors have another shape than OpenAI's.

    Args:
        render: the answer to an error.
    """

    class Route(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handled(request: Request) -> Response:
                try:
                    return await handle(request)
                except Exception as error:
                    return render(api_error(error))

            return handled

    return Route


def handle_errors(app: FastAPI) -> None:
    """Answer every exception in the one shape."""

    async def known(_: Request, error: Exception) -> JSONResponse:
        return api_error(error).response()

    async def of_routing(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        what = {404: "there is no such path", 405: f"{request.method} is not for this path"}
        message = what.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, message, headers=error.headers).response()

    app.add_exception_handler(LoraryError, known)
    app.add_exception_handler(HTTPException, of_routing)
    app.add_exception_handler(Exception, known)
