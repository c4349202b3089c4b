"""vLLM's routes that load and unload adapters, with its bodies, statuses and texts; for admins, and below one root."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from fastapi import APIRouter, Depends, Request
from fastapi.responses import PlainTextResponse
from starlette.concurrency import run_in_threadpool

from lorary.errors import LoraryError
from lorary.files.strict_json import show
from lorary.serve.http.bodies import Body, read_body
from lorary.serve.http.errors import ApiError, one_line
from lorary.serve.http.security import require_admin
from lorary.serve.http.settings import Settings
from lorary.serve.interface import Engine, UnknownAdapterError
from lorary.serve.pool.adapter_root import invalid_name

_USER = "InvalidUserInput"


class _Load(Body):
    IGNORED: ClassVar[frozenset[str]] = frozenset({"is_3d_lora_weight"})

    lora_name: str = ""
    lora_path: str = ""
    load_inplace: bool = False


class _Unload(Body):
    IGNORED: ClassVar[frozenset[str]] = frozenset({"lora_int_id"})

    lora_name: str = ""


def adapters_router(engine: Engine, settings: Settings) -> APIRouter:
    """The routes /v1/load_lora_adapter and /v1/unload_lora_adapter."""
    router = APIRouter(dependencies=[Depends(require_admin)])

    @router.post("/v1/load_lora_adapter")
    async def load(request: Request) -> PlainTextResponse:
        body = await read_body(request, _Load)
        if not body.lora_name or not body.lora_path:
            raise ApiError(400, "Both 'lora_name' and 'lora_path' must be provided.", kind=_USER)
        await run_in_threadpool(
            load_adapter, engine, settings, body.lora_name, body.lora_path, replace=body.load_inplace
        )
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter")
    async def unload(request: Request) -> PlainTextResponse:
        body = await read_body(request, _Unload)
        if not body.lora_name:
            raise ApiError(400, "'lora_name' needs to be provided to unload a LoRA adapter.", kind=_USER)
        await run_in_threadpool(unload_adapter, engine, settings, body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return router


def load_adapter(
    engine: Engine, settings: Settings, name: str, path: str, *, replace: bool = False, pinned: bool = False
) -> None:
    """Load an adapter below the root; it blocks until the adapter is in memory.

    Raises:
        ApiError: loading is off (403), the name is taken or reserved or the folder cannot be served (400), the path
            leaves the root (403), or nothing is there (404).
    """
    folder = confined(settings, path)
    check_name(engine, name)
    if not replace and _is_taken(engine, name, folder):
        what = f"The lora adapter '{name}' has already been loaded. "
        raise ApiError(400, what + "If you want to load the adapter in place, set 'load_inplace' to True.", kind=_USER)
    try:
        engine.load(name, str(folder), replace=replace, pinned=pinned)
    except LoraryError as error:
        raise ApiError(400, one_line(error), kind=_USER) from None


def unload_adapter(engine: Engine, settings: Settings, name: str) -> None:
    """Unload an adapter.

    Raises:
        ApiError: loading is off (403), or no adapter has this name (404).
    """
    _require_root(settings)
    try:
        engine.unload(name)
    except UnknownAdapterError:
        raise ApiError(404, f"The lora adapter {show(name)} cannot be found.") from None


def confined(settings: Settings, path: str) -> Path:
    """The folder that a client's path names, symbolic links resolved: below the root.

    Raises:
        ApiError: there is no root, the path leaves it, or there is no such folder.
    """
    root = _require_root(settings).resolve()
    missing = ApiError(404, f"`lora_path`: there is no folder {show(path)} below the root", param="lora_path")
    try:
        folder = (root / path).resolve()
    except ValueError:  # a null character
        raise ApiError(400, f"`lora_path`: {show(path)} cannot be followed", param="lora_path") from None
    except (OSError, RuntimeError):  # a loop of links, a name that is too long
        raise missing from None
    if folder == root or not folder.is_relative_to(root):  # the same answer whether or not something is there
        raise ApiError(403, f"`lora_path`: {show(path)} is not below the root of the adapters", param="lora_path")
    if not folder.is_dir():
        raise missing
    return folder


def check_name(engine: Engine, name: str) -> None:
    """Refuse names that requests could not tell from others.

    Raises:
        ApiError: the name is the base's, or no adapter can have it.
    """
    if name == engine.name:
        raise ApiError(400, f"{show(name)} is the name of the base", kind=_USER, param="lora_name")
    if what := invalid_name(name):
        raise ApiError(400, f"`lora_name`: {what}", kind=_USER, param="lora_name")


def _require_root(settings: Settings) -> Path:
    if settings.root is None:
        raise ApiError(403, "adapters are not loaded at run time: start the server with --root DIR")
    if settings.keys and not settings.admin_keys:
        raise ApiError(403, "adapters are not loaded at run time: start the server with --admin-key KEY")
    return settings.root


def _is_taken(engine: Engine, name: str, folder: Path) -> bool:
    """Whether an adapter of this name is in memory, or is another one: below the root all are known before."""
    try:
        card = engine.adapter(name)
    except UnknownAdapterError:
        return False
    return card.state not in ("on disk", "failed") or Path(card.folder) != folder
