"""Keys: every path but /health needs one, once there are any. Comparisons take constant time."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from lorary.serve.http.errors import ApiError
from lorary.serve.http.page import page
from lorary.serve.http.settings import Settings

OPEN = "/health"


@dataclass(frozen=True)
class Caller:
    """Who asks.

    Args:
        tenant: whose key it was; empty without keys.
        admin: whether adapters may be loaded and unloaded.
    """

    tenant: str = ""
    admin: bool = False


class Keys:
    """Middleware that refuses requests without a valid key, whatever their path, and says who asks."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.guarded = app, settings.guarded
        callers = {key: Caller(tenant) for key, tenant in settings.keys.items()}
        callers |= {key: Caller("admin", admin=True) for key in settings.admin_keys}
        self.callers = [(_digest(key.encode()), caller) for key, caller in callers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != OPEN:
            caller = self._caller(scope) if self.guarded else Caller(admin=True)
            if caller is None:
                headers = {"WWW-Authenticate": "Bearer"}
                error = ApiError(401, "a valid key is needed: Authorization: Bearer KEY", headers=headers)
                asks_for_page = (scope["method"], scope["path"]) == ("GET", "/")
                answer = page(401) if asks_for_page else error.response()
                await answer(scope, receive, send)
                return
            scope.setdefault("state", {})["caller"] = caller
        await self.app(scope, receive, send)

    def _caller(self, scope: Scope) -> Caller | None:
        """The owner of the key of a request; all keys are compared, so that time says nothing."""
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
        given, found = _digest(key.strip()), None
        for digest, caller in self.callers:
            if hmac.compare_digest(digest, given):
                found = caller
        return found if scheme.lower() == b"bearer" else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def caller(request: Request) -> Caller:
    """Who sent a request."""
    found: Caller = request.state.caller
    return found


def require_admin(request: Request) -> None:
    """Refuse a request without an admin's key; a dependency of routes.

    Raises:
        ApiError: 403.
    """
    if not caller(request).admin:
        raise ApiError(403, "this needs an admin's key")
