"""Keys on every path, loading below the root only, and nothing leaked by an answer."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from lorary.serve.http.app import create_app
from lorary.serve.http.settings import Settings
from lorary.serve.interface import Engine
from lorary.serve.request import Deliver, Request
from tests.serve.http.live import ADMIN_KEY, BASE, KEY, OTHER_KEY, Live, live

pytestmark = pytest.mark.xdist_group("http")  # one server for all

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
LISTED = [BASE, "a", "b", "c"]  # `c` is found below the root
COMPLETION = {"model": BASE, "prompt": "x", "max_tokens": 1, "temperature": 0}


@pytest.fixture(scope="module")
def keyed(engine: Engine, root: Path) -> Iterator[Live]:
    """A server with the keys of two users and an admin."""
    settings = Settings(keys={KEY: "anna", OTHER_KEY: "bert"}, admin_keys=frozenset({ADMIN_KEY}), root=root)
    with live(engine, settings, KEY) as running:
        yield running


def names(server: Live, key: str = ADMIN_KEY) -> list[str]:
    return [card["id"] for card in server.ask("GET", "/v1/models", key=key).json["data"]]


def routes(app: FastAPI) -> list[tuple[str, str]]:
    """(method, path) of every route, with a value for each parameter."""
    found: list[APIRoute] = []
    routers: list[Any] = [app]
    while routers:
        for route in routers.pop().routes:
            if isinstance(route, APIRoute):
                found.append(route)
            elif hasattr(route, "original_router"):  # newer releases of FastAPI keep routers as they are
                routers.append(route.original_router)
    return [(method, route.path.replace("{id:path}", BASE)) for route in found for method in sorted(route.methods)]


WRONG = {
    "none": {},
    "wrong": {"Authorization": "Bearer the-key-of-annA"},
    "longer": {"Authorization": f"Bearer {KEY}x"},
    "shorter": {"Authorization": f"Bearer {KEY[:-1]}"},
    "empty": {"Authorization": "Bearer "},
    "without a scheme": {"Authorization": KEY},
    "another scheme": {"Authorization": f"Basic {KEY}"},
    "another header": {"X-Api-Key": KEY},
    "no ASCII": {"Authorization": "Bearer \xe9\xe9\xe9"},
}


def test_every_path_needs_a_key(keyed: Live, engine: Engine) -> None:
    known = routes(create_app(engine))
    assert len(known) >= 8
    assert {path for _, path in known} >= {"/v1/completions", "/v1/models", LOAD, "/metrics", "/", "/generate"}
    unknown = [("GET", "/docs"), ("GET", "/openapi.json"), ("POST", "/v2/x"), ("GET", "//health"), ("GET", "/health/")]
    unknown += [("GET", "/%68ealth/../v1/models"), ("OPTIONS", "/v1/models"), ("GET", "/HEALTH")]
    for method, path in [*known, *unknown]:
        if path == "/health":
            continue
        for headers in WRONG.values() if (method, path) == ("POST", "/v1/completions") else [{}, WRONG["wrong"]]:
            body = COMPLETION if method == "POST" else None
            answer = keyed.ask(method, path, body, headers, key="")
            assert answer.status == 401, (method, path, headers)
            assert answer.headers["www-authenticate"] == "Bearer"
            if answer.headers["content-type"] == "application/json":  # the page at / asks for the key itself
                assert answer.message == "a valid key is needed: Authorization: Bearer KEY"
            assert "anna" not in answer.body.decode()
    assert keyed.ask("GET", "/health", key="").status == 200
    assert keyed.ask("GET", "/health", key="").body == b""


def test_two_authorizations_are_none(keyed: Live) -> None:
    lines = "GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + f"Authorization: Bearer {KEY}\r\n" * 2
    with keyed.raw(f"{lines}\r\n".encode()) as connection:
        assert b" 401 " in connection.recv(1000)


@pytest.mark.parametrize("key", [KEY, OTHER_KEY, ADMIN_KEY])
def test_a_key_opens(keyed: Live, key: str) -> None:
    assert keyed.post("/v1/completions", COMPLETION, key=key).status == 200
    assert names(keyed, key) == LISTED


def test_requests_belong_to_the_tenant_of_their_key(keyed: Live, engine: Engine) -> None:
    tenants, real = [], engine.submit

    def submit(request: Request, deliver: Deliver) -> None:
        tenants.append(request.tenant)
        real(request, deliver)

    engine.submit = submit  # type: ignore[method-assign]
    try:
        for key in (KEY, OTHER_KEY, ADMIN_KEY):
            assert keyed.post("/v1/completions", COMPLETION, key=key).status == 200
    finally:
        engine.submit = real  # type: ignore[method-assign]
    assert tenants == ["anna", "bert", "admin"]


@pytest.mark.parametrize(("path", "body"), [(LOAD, {"lora_name": "c", "lora_path": "c"}), (UNLOAD, {"lora_name": "a"})])
def test_users_do_not_load(keyed: Live, path: str, body: Any) -> None:
    answer = keyed.post(path, body)
    assert (answer.status, answer.message) == (403, "this needs an admin's key")
    assert names(keyed) == LISTED


def test_an_admin_loads_and_unloads(keyed: Live, root: Path) -> None:
    body = {"model": "spare", "prompt": "def f(", "max_tokens": 8, "temperature": 0}
    assert keyed.post("/v1/completions", body).status == 404
    answer = keyed.post(LOAD, {"lora_name": "spare", "lora_path": "c"}, key=ADMIN_KEY)
    assert (answer.status, answer.body) == (200, b"Success: LoRA adapter 'spare' added successfully.")
    assert answer.headers["content-type"].startswith("text/plain")
    assert names(keyed) == [*LISTED, "spare"]
    text = keyed.post("/v1/completions", body).json["choices"][0]["text"]
    again = {
        "lora_name": "spare",
        "lora_path": str(root / "a"),
        "load_inplace": True,
    }  # an absolute path below the root
    assert keyed.post(LOAD, again, key=ADMIN_KEY).status == 200
    other = keyed.post("/v1/completions", body).json["choices"][0]["text"]
    assert other == keyed.post("/v1/completions", body | {"model": "a"}).json["choices"][0]["text"] != text
    answer = keyed.post(UNLOAD, {"lora_name": "spare"}, key=ADMIN_KEY)
    assert (answer.status, answer.body) == (200, b"Success: LoRA adapter 'spare' removed successfully.")
    assert keyed.post("/v1/completions", body).status == 404
    assert names(keyed) == LISTED


@pytest.fixture
def traps(root: Path, tmp_path: Path) -> Iterator[Path]:
    """A folder below the root with what must not be loaded."""
    folder = root / "traps"
    folder.mkdir()
    outside = tmp_path / "secret"
    shutil.copytree(root / "c", outside)
    (folder / "link").symlink_to(outside)
    (folder / "relative").symlink_to(os.path.relpath(outside, folder))
    (folder / "loop").symlink_to("loop")
    (folder / "file").write_text("no folder")
    (folder / "empty").mkdir()
    spoilt = ("linked file", "truncated", "pickle", "hostile config", "pipe")
    tensors = {name: shutil.copytree(root / "c", folder / name) / "adapter_model.safetensors" for name in spoilt}
    tensors["pickle"].rename(tensors["pickle"].with_suffix(".bin"))
    os.truncate(tensors["truncated"], 900)
    for name in ("linked file", "pipe"):
        tensors[name].unlink()
    tensors["linked file"].symlink_to(outside / "adapter_model.safetensors")
    os.mkfifo(tensors["pipe"])
    for file in (folder / "hostile config").glob("*.json"):
        file.write_text('{"r": ' + "[" * 9000)
    yield folder
    shutil.rmtree(folder)


def test_nothing_outside_of_the_root_is_loaded(keyed: Live, root: Path, traps: Path, tmp_path: Path) -> None:
    outside = tmp_path / "secret"
    paths = ["/", "/etc/passwd", "..", "../..", f"../{root.name}-other", str(outside), f"{root}/../secret"]
    paths += [f"{root}{outside}", "a/../../secret", "traps/link", "traps/relative", "traps/link/../../c", "//etc"]
    paths += [os.path.relpath(outside, root), "~", "~root", "file:///etc", "%2e%2e/secret"]
    for path in paths:
        answer = keyed.post(LOAD, {"lora_name": "z", "lora_path": path}, key=ADMIN_KEY)
        assert answer.status in (403, 404), (path, answer)
        assert path.startswith(str(tmp_path)) or str(tmp_path) not in answer.message.replace(path, ""), path
    missing = keyed.post(LOAD, {"lora_name": "z", "lora_path": f"{outside}-not"}, key=ADMIN_KEY)
    there = keyed.post(LOAD, {"lora_name": "z", "lora_path": str(outside)}, key=ADMIN_KEY)
    assert missing.status == there.status == 403
    assert missing.message == there.message.replace("secret", "secret-not")  # nobody learns what is there
    assert names(keyed) == LISTED


def test_what_cannot_be_served_is_refused_with_its_reason(keyed: Live, root: Path, traps: Path) -> None:
    found = {}
    for folder in sorted(traps.iterdir()):
        answer = keyed.post(LOAD, {"lora_name": "z", "lora_path": f"traps/{folder.name}"}, key=ADMIN_KEY)
        found[folder.name] = (answer.status, answer.message)
        for leak in ("Traceback", str(root.parent), "secret"):
            assert leak not in answer.message.replace(f"traps/{folder.name}", ""), answer.message
    assert {name: status for name, (status, _) in found.items()} == {
        "empty": 400, "file": 404, "hostile config": 400, "link": 403, "linked file": 400, "loop": 404, "pickle": 400,
        "pipe": 400, "relative": 403, "truncated": 400,
    }  # fmt: skip
    assert "is a link that leaves" in found["linked file"][1]
    assert "is a named pipe, not a plain file" in found["pipe"][1]
    assert names(keyed) == LISTED
    keyed.alive()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(admin_keys=frozenset({ADMIN_KEY})), "start the server with --root DIR"),
        (Settings(), "start the server with --root DIR"),
    ],
)
def test_loading_is_off_by_default(engine: Engine, settings: Settings, message: str) -> None:
    with live(engine, settings, ADMIN_KEY) as server:
        for path, body in {LOAD: {"lora_name": "c", "lora_path": "c"}, UNLOAD: {"lora_name": "a"}}.items():
            answer = server.post(path, body)
            assert (answer.status, answer.message) == (403, f"adapters are not loaded at run time: {message}")


def test_without_an_admins_key_nobody_loads(engine: Engine, root: Path) -> None:
    with live(engine, Settings(keys={KEY: "anna"}, root=root), KEY) as server:
        answer = server.post(LOAD, {"lora_name": "c", "lora_path": "c"})
        assert (answer.status, answer.message) == (403, "this needs an admin's key")


def test_a_local_server_answers_to_its_own_name_only(engine: Engine) -> None:
    with live(engine, Settings(local=True)) as server:
        for host in ("localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:1", "[::1]:8000", "192.168.0.2"):
            assert server.ask("GET", "/v1/models", headers={"Host": host}).status == 200, host
        for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "", "127.0.0.1.evil.example"):
            answer = server.ask("GET", "/v1/models", headers={"Host": host})
            assert answer.status == 403, host
            assert answer.message == "without keys, this server answers requests to localhost only"


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""]
)
def test_a_form_of_another_site_is_refused(server: Live, kind: str) -> None:
    origin = {"Origin": "https://evil.example"}
    answer = server.post("/v1/completions", COMPLETION, headers={"Content-Type": kind} | origin)
    shown = f"'{kind.partition(';')[0]}'" if kind else "of no type"
    assert (answer.status, answer.message) == (415, f"the body must be application/json, not {shown}")
    answer = server.ask("OPTIONS", "/v1/completions", headers=origin)
    assert answer.status == 405
    assert not any(name.startswith("access-control") for name in answer.headers)
