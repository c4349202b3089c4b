"""The page at `/`, and the state of the server that it shows.

The page holds nothing of this server: what it shows, it asks for with the key that its reader enters. So it can be the
body of the answer 401 as well, and `/` is no exception to "keys guard every path". Script and style stand within it,
allowed by their hashes: a browser could not send the key for files of their own.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections import Counter
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from lorary.serve.http.models import shown_state
from lorary.serve.http.observed import Observed
from lorary.serve.interface import AdapterCard

STATIC = Path(__file__).parent / "static"
_ROWS, _NAMES = 100, 1000  # adapters in the table, and names to pick from, at most
_ORDER = ("resident", "loading", "draining", "failed", "ready", "on disk")


@cache
def _document() -> tuple[str, str]:
    """The page, and the content security policy that allows it nothing but itself."""
    html = (STATIC / "index.html").read_text("utf-8")
    style, script = ((STATIC / name).read_text("utf-8") for name in ("page.css", "page.js"))
    html = html.replace('<link rel="stylesheet" href="page.css">', f"<style>{style}</style>")
    html = html.replace('<script src="page.js"></script>', f"<script>{script}</script>")
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    policy = (
        f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, policy


def page(status_code: int = 200) -> HTMLResponse:
    """The page; with the code 401 for a reader without a key, whom its script asks for one."""
    html, policy = _document()
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    if status_code == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return HTMLResponse(html, status_code, headers)


def page_router(engine: Observed) -> APIRouter:
    """GET /, the page, and GET /ui/status, the figures that it shows."""
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    def show() -> HTMLResponse:
        return page()

    @router.get("/ui/status")
    def state(find: str = "", known: str = "") -> dict[str, Any]:
        return status(engine, find, known)

    return router


def status(engine: Observed, find: str = "", known: str = "") -> dict[str, Any]:
    """The state of a server.

    Args:
        engine: its engine.
        find: text in the names of the adapters to list; "" for all.
        known: `version` of the names that the reader has, which are then left out.
    """
    figures, cards = engine.statistics(), engine.adapters()
    found = sorted((card for card in cards if find.lower() in card.name.lower()), key=_liveliest)
    names = [card.name for card in cards[:_NAMES]]
    version = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
    first_tokens = list(engine.first_tokens)
    return {
        "model": engine.name,
        "chat": bool(getattr(engine.tokenizer, "chat_template", None)),
        "context": engine.max_context,
        "dead": engine.why_dead(),
        "time": time.monotonic(),  # the page counts tokens between two of them
        "tokens": engine.tokens,
        "first_token": median(first_tokens) if first_tokens else None,
        "running": figures["running"],
        "waiting": figures["waiting"],
        "bytes": {
            "budget": figures.get("budget_bytes", 0),
            "adapters": figures.get("adapter_bytes", 0),
            "kv": figures.get("kv_bytes", 0),
        },
        "states": dict(Counter(card.state for card in cards)),
        "matching": len(found),
        "adapters": [{"name": card.name} | shown_state(card) for card in found[:_ROWS]],
        "version": version,
        "names": None if known == version else names,
    }


def _liveliest(card: AdapterCard) -> tuple[int, int, str]:
    place = _ORDER.index(card.state) if card.state in _ORDER else len(_ORDER)
    return -(card.running + card.waiting), place, card.name
