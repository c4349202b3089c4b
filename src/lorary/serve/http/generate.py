"""The route /generate, which LoRAX and TGI have, and SGLang too: the name of the prompt tells them apart."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from lorary.serve.http import lorax, sglang
from lorary.serve.http.bodies import read_json
from lorary.serve.http.errors import ApiError, api_error
from lorary.serve.http.settings import Settings
from lorary.serve.interface import Engine


def generate_router(engine: Engine, settings: Settings) -> APIRouter:
    """POST /generate."""
    router = APIRouter()

    @router.post("/generate")
    async def generate(http: Request) -> Response:
        values = await read_json(http)
        if values.get("inputs") is not None:
            try:
                return await lorax.respond(engine, settings, http, stream=False)
            except Exception as error:
                return lorax.error_response(api_error(error))
        if values.get("text") is not None or values.get("input_ids") is not None:
            return await sglang.respond(engine, settings, http)
        raise ApiError(400, "a prompt is missing: `inputs` as LoRAX and TGI call it, `text` or `input_ids` as SGLang")

    return router
