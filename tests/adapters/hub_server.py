"""The Hub's API for a few repositories, on this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"
# As the Hub answers: (status, X-Error-Code)
REFUSALS = {"private": (401, "RepoNotFound"), "gated": (403, "GatedRepo"), "missing": (404, "RepoNotFound")}


@contextmanager
def hub(repositories: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """A running server: its address, and the paths of the files that were asked for.

    Args:
        repositories: `owner/name` -> a folder. Owners named in REFUSALS are refused so.
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, body: bool) -> None:
            parts = urlsplit(self.path).path.strip("/").split("/")
            api = parts[:2] == ["api", "models"]
            owner, name, *rest = parts[2:] if api else parts
            if owner in REFUSALS or f"{owner}/{name}" not in repositories:
                status, code = REFUSALS.get(owner, REFUSALS["missing"])
                self._send(status, b"{}", {"X-Error-Code": code}, body)
                return
            folder = repositories[f"{owner}/{name}"]
            if api and rest[0] == "revision":
                self._send(200, json.dumps({"id": f"{owner}/{name}", "sha": SHA, "siblings": []}).encode(), {}, body)
            elif api:
                files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
                tree = [
                    {"type": "file", "path": str(f.relative_to(folder)), "size": f.stat().st_size, "oid": _digest(f)}
                    for f in files
                ]
                self._send(200, json.dumps(tree).encode(), {}, body)
            else:
                file = folder.joinpath(*rest[2:])
                asked.append(str(file.relative_to(folder)))
                self._send(200, file.read_bytes(), {"X-Repo-Commit": SHA, "ETag": f'"{_digest(file)}"'}, body)

        def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def _digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
