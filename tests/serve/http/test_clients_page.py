"""The examples of docs/how-to/serve-clients.md, run against a server."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorary.serve.interface import Engine
from tests import pages
from tests.serve.http.live import Live

PAGE = pages.ROOT / "docs" / "how-to" / "serve-clients.md"


@pytest.fixture
def documented(server: Live, engine: Engine, root: Path) -> Iterator[Live]:
    """A server with the adapters that the page names; `third` is below its root."""
    for name, folder in {"docs": "a", "parser": "b"}.items():
        engine.load(name, str(root / folder))
    shutil.copytree(root / "c", root / "third")
    yield server
    shutil.rmtree(root / "third")
    for name in ("docs", "parser"):
        engine.unload(name)


def here(server: Live, text: str) -> str:
    return text.replace("http://127.0.0.1:8000", server.url)


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_the_curl_examples(documented: Live) -> None:
    lines = [line for block in pages.blocks(PAGE) for line in block.code.replace("\\\n", " ").splitlines()]
    answers = []
    for line in (line for line in lines if line.startswith("$ curl ")):
        call = ["curl", "-sS", "--fail-with-body", *shlex.split(here(documented, line))[2:]]
        ran = subprocess.run(call, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, (line, ran.stdout, ran.stderr)
        answers.append(ran.stdout)
    generated, stream, batch, loaded, unloaded, metrics = answers
    assert json.loads(generated)["details"]["generated_tokens"] == 16
    assert json.loads(stream.split("\n\n")[-2].removeprefix("data: "))["generated_text"]
    assert len(json.loads(batch)) == 2
    assert "third" in json.loads(loaded)["loaded_adapters"]
    assert json.loads(unloaded)["success"]
    named = set(re.findall(r"`((?:vllm|lorary)[:_]\w+)`", PAGE.read_text()))
    optional = re.compile("_bytes|prefix|adapter_|queue|replicas|retries")  # engines leave out what they do not know
    told = {name for name in named if f"\n# TYPE {name} " in metrics}
    assert {name for name in named - told if not optional.search(name)} == set()
    assert len(told) > 8


def test_the_client_example(
    documented: Live, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)  # it asks nobody but the server
    (block,) = (block for block in pages.blocks(PAGE) if block.language == "python")
    exec(compile(here(documented, block.code), str(PAGE), "exec"), {})
    assert capsys.readouterr().out.strip()
