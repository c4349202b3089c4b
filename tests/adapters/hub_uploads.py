"""The Hub's API for uploads, on this machine: repositories are made, files arrive as regular ones or by Git LFS."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

TOKEN = "hf_of_the_tests"
OID = "89abcdef0123456789abcdef0123456789abcdef"


@dataclass
class Received:
    """What has arrived.

    Args:
        private: repository -> whether it is; those that are there before the test included.
        commits: (repository, summary, path -> bytes) in order.
        modes: path -> how it arrived, "regular" or "lfs".
        stored: SHA-256 -> the bytes that Git LFS holds.
        refuses: the status with which a commit is refused, if it is.
        refuses_lfs: the same of a file for Git LFS.
    """

    private: dict[str, bool] = field(default_factory=dict)
    commits: list[tuple[str, str, dict[str, bytes]]] = field(default_factory=list)
    modes: dict[str, str] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    refuses: int = 0
    refuses_lfs: int = 0


@contextmanager
def receiving(received: Received) -> Iterator[str]:
    """A running server: its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            repo = "/".join(self._path()[2:4])
            if repo not in received.private:
                self._send(404, {"error": "no such repository"}, {"X-Error-Code": "RepoNotFound"})
            else:
                self._send(200, {"id": repo, "sha": OID, "private": received.private[repo], "siblings": []})

        def do_PUT(self) -> None:
            data = self._body()
            if received.refuses_lfs:
                self._send(received.refuses_lfs, {"error": "the store is full"})
                return
            received.stored[hashlib.sha256(data).hexdigest()] = data
            self._send(200, {})

        def do_POST(self) -> None:
            parts, body = self._path(), self._body()
            if self.headers.get("Authorization") not in (f"Bearer {TOKEN}", None) or (
                self.headers.get("Authorization") is None and parts[:2] == ["api", "repos"]
            ):
                self._send(401, {"error": "Invalid username or password."})
            elif parts == ["api", "repos", "create"]:
                self._create(json.loads(body))
            elif parts[-4:] == ["info", "lfs", "objects", "batch"]:
                self._batch(json.loads(body))
            elif parts[-2:] == ["preupload", "main"]:
                files = [self._mode(file["path"]) for file in json.loads(body)["files"]]
                self._send(200, {"files": files})
            elif parts[-2:] == ["commit", "main"]:
                self._commit("/".join(parts[2:4]), [json.loads(line) for line in body.splitlines() if line])
            elif parts[-1] == "validate-yaml":
                self._send(200, {"errors": [], "warnings": []})
            else:
                self._send(404, {"error": f"no such endpoint: {self.path}"})

        def _create(self, asked: dict[str, Any]) -> None:
            owner = asked.get("organization") or "ann"
            repo = f"{owner}/{asked['name']}"
            if repo in received.private:
                self._send(409, {"error": "You already created this model repo", "url": f"{address}/{repo}"})
                return
            received.private[repo] = asked.get("private") or asked.get("visibility") == "private"
            self._send(200, {"url": f"{address}/{repo}", "name": repo, "id": repo})

        def _mode(self, path: str) -> dict[str, Any]:
            """As a new repository's .gitattributes say: safetensors go to Git LFS, of any size."""
            received.modes[path] = "lfs" if PurePosixPath(path).suffix == ".safetensors" else "regular"
            return {"path": path, "uploadMode": received.modes[path], "shouldIgnore": False, "oid": None}

        def _batch(self, asked: dict[str, Any]) -> None:
            objects = [
                {
                    "oid": o["oid"],
                    "size": o["size"],
                    "authenticated": True,
                    "actions": {"upload": {"href": f"{address}/lfs/{o['oid']}", "header": {}}},
                }
                for o in asked["objects"]
            ]
            self._send(200, {"transfer": "basic", "objects": objects})

        def _commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
            if received.refuses:
                self._send(received.refuses, {"error": "the Hub is in a mood"})
                return
            (head,) = (line["value"] for line in lines if line["key"] == "header")
            files = {}
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = received.stored[value["oid"]]
                    assert len(files[value["path"]]) == value["size"]
            received.commits.append((repo, head["summary"], files))
            url = f"{address}/{repo}/commit/{OID}"
            self._send(200, {"success": True, "commitUrl": url, "commitOid": OID, "hookOutput": ""})

        def _path(self) -> list[str]:
            return urlsplit(self.path).path.strip("/").split("/")

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data

        def _send(self, status: int, answer: dict[str, Any], headers: dict[str, str] | None = None) -> None:
            data = json.dumps(answer).encode()
            self.send_response(status)
            for key, value in {"Content-Length": str(len(data)), "Content-Type": "application/json"}.items():
                self.send_header(key, value)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield address
    finally:
        server.shutdown()
        server.server_close()
