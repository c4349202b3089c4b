"""The models of the server, as OpenAI's and vLLM's interfaces list them: the base, and every adapter."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from lorary.files.strict_json import show
from lorary.serve.http.errors import ApiError, printed_in_one_line
from lorary.serve.http.settings import Settings
from lorary.serve.interface import AdapterCard, Engine


def models_router(engine: Engine, settings: Settings) -> APIRouter:
    """The routes /v1/models and /v1/models/{id}."""
    router, started = APIRouter(), int(time.time())
    below = resolved_root(settings)

    def of_base() -> dict[str, Any]:
        return _card(engine.name, started, engine.name, None, engine.max_context)

    def of_adapter(card: AdapterCard) -> dict[str, Any]:
        root = shown_folder(card.folder, below)
        found = _card(card.name, int(card.created), root, engine.name, card.max_context or engine.max_context)
        return found | {"lorary": shown_state(card)}

    @router.get("/v1/models")
    def models() -> JSONResponse:  # FastAPI would walk through thousands of cards once more
        return JSONResponse({"object": "list", "data": [of_base(), *map(of_adapter, engine.adapters())]})

    @router.get("/v1/models/{id:path}")
    def model(id: str) -> dict[str, Any]:
        return of_base() if id == engine.name else of_adapter(engine.adapter(adapter_name(engine, id)))

    return router


def adapter_name(engine: Engine, model: str) -> str:
    """The name of the adapter that `model` names, as `NAME` or `BASE:NAME`."""
    return model.removeprefix(f"{engine.name}:")


def adapters_of(
    engine: Engine, settings: Settings, model: str, adapters: dict[str, float], lora_path: str
) -> dict[str, float]:
    """The adapters of a request with their weights; empty for the base alone.

    Args:
        engine: the engine.
        settings: of the server.
        model: the base, an adapter, or `BASE:ADAPTER`.
        adapters: name -> weight, on the base.
        lora_path: SGLang's name for the field of an adapter's name; "" for none.

    Raises:
        ApiError: they contradict each other, or an adapter is unknown.
    """
    ways = [
        ("model", {} if model == engine.name else {adapter_name(engine, model): 1.0}),
        ("adapters", adapters),
        ("lora_path", {lora_path: 1.0} if lora_path else {}),
    ]
    named = {way: names for way, names in ways if names}
    if len(named) > 1 and len(set(map(str, named.values()))) > 1:
        fix = f"set `model` to the base, {show(engine.name)}" if "model" in named else "keep one of them"
        raise ApiError(400, f"{' and '.join(f'`{way}`' for way in named)} name different adapters: {fix}")
    found = next(iter(named.values()), {})
    if len(found) > settings.adapters:
        raise ApiError(400, f"`adapters`: {len(found)} adapters, more than the {settings.adapters} of one request")
    return found


def shown_state(card: AdapterCard) -> dict[str, Any]:
    """An adapter's state as clients see it."""
    keys = ("state", "form", "rank", "bytes", "method", "notes", "running", "waiting")
    return {key: getattr(card, key) for key in keys} | {"error": card.error and printed_in_one_line(card.error)}


def resolved_root(settings: Settings) -> Path | None:
    """The root with its links resolved, as adapters' folders begin. Resolve it once, not for each adapter."""
    return None if settings.root is None else settings.root.resolve()


def shown_folder(folder: str, root: Path | None) -> str:
    """A folder as clients see it: below the resolved root, or its name alone.

    >>> shown_folder("/srv/adapters/team/french", Path("/srv/adapters")), shown_folder("/data/ann/out", None)
    ('team/french', 'out')
    """
    prefix = "" if root is None else f"{str(root).rstrip('/')}/"
    return folder[len(prefix) :] if prefix and folder.startswith(prefix) else Path(folder).name


def _card(id: str, created: int, root: str, parent: str | None, length: int | None) -> dict[str, Any]:
    allow = dict.fromkeys(("create_engine", "fine_tuning", "search_indices"), False)
    allow |= dict.fromkeys(("sampling", "logprobs", "view"), True)
    permission = {"id": f"modelperm-{id}", "object": "model_permission", "created": created}
    permission |= {f"allow_{key}": value for key, value in allow.items()}
    permission |= {"organization": "*", "group": None, "is_blocking": False}
    return {
        "id": id,
        "object": "model",
        "created": created,
        "owned_by": "lorary",
        "root": root,
        "parent": parent,
        "max_model_len": length,
        "permission": [permission],
    }
