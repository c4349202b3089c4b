"""Keys: every path but /health needs one, once there are any. Comparisons take constant time."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from dataclasses import dataclass

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from lorary.serve.http.errors import ApiError
from lorary.serve.http.page import page
from lorary.serve.http.settings import Settings

OPEN = "/health"


@dataclass(frozen=True)
class Caller:
    """The sender of a request.

    Args:
        tenant: whose key it was; empty without keys.
        admin: whether adapters may be loaded and unloaded.
    """

    tenant: str = ""
    admin: bool = False


class Keys:
    """Middleware that refuses requests without a valid key, whatever their path, and says who asks.

    Args:
        app: the application.
        settings: with the keys.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.guarded, self.local = app, settings.guarded, settings.local
        callers = {key: Caller(tenant) for key, tenant in settings.keys.items()}
        callers |= {key: Caller("admin", admin=True) for key in settings.admin_keys}
        self.callers = [(_digest(key.encode()), caller) for key, caller in callers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != OPEN:
            try:
                scope.setdefault("state", {})["caller"] = self._caller(scope)
            except ApiError as error:
                asks_for_page = (error.status, scope["method"], scope["path"]) == (401, "GET", "/")
                answer = page(401) if asks_for_page else error.response()
                await answer(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _caller(self, scope: Scope) -> Caller:
        """The owner of the key of a request; all keys are compared, so that time says nothing."""
        if self.local and not _names_this_machine(scope):
            raise ApiError(403, "without keys, this server answers requests to localhost only")
        if not self.guarded:
            return Caller(admin=True)
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
        given, found = _digest(key.strip()), None
        for digest, caller in self.callers:
            if hmac.compare_digest(digest, given):
                found = caller
        if found is None or scheme.lower() != b"bearer":
            what = "a valid key is needed: Authorization: Bearer KEY"
            raise ApiError(401, what, headers={"WWW-Authenticate": "Bearer"})
        return found


def _names_this_machine(scope: Scope) -> bool:
    """Whether a request is to localhost or to an address, and not to some name that resolves to this machine."""
    host = b"".join(value for name, value in scope["headers"] if name == b"host").decode("latin-1")
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return name.lower() == "localhost"
    return True


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def caller(request: Request) -> Caller:
    """The sender of a request."""
    found: Caller = request.state.caller
    return found


def require_admin(request: Request) -> None:
    """Refuse a request without an admin's key; a dependency of routes.

    Raises:
        ApiError: 403.
    """
    if not caller(request).admin:
        raise ApiError(403, "this needs an admin's key")
