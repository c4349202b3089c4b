"""A server that another program is: started, waited for, verified, stopped, and the log of its failures."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from lorary import builtin
from lorary.analysis.verify.verify import CERTIFICATE
from lorary.errors import LoraryError
from lorary.model.loading.source import ModelSection
from lorary.serve.address import free_port
from lorary.serve.vllm.plan import VllmAdapter, VllmPlan, VllmSettings
from lorary.serve.vllm.process import ServerError, check_models, running
from lorary.serve.vllm.serve import serve_vllm, verify_plan
from tests.analysis.verify.http_server import Served, serving
from tests.cli.command import Command
from tests.pages import ROOT
from tests.serve.vllm.test_plan import saved

PROGRAM = f"{sys.executable} {Path(__file__).with_name('program.py')}"
SECTION = ModelSection.of("builtin:base", dtype="float32")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy, no keys; the tests' packages for the program."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), str(ROOT)]))
    for name in ("OPENAI_API_KEY", "LORARY_API_KEY", "LORARY_KEYS", "LORARY_ADMIN_KEYS"):
        monkeypatch.delenv(name, raising=False)


# --- the whole --------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # another program imports PEFT
def test_adapters_are_converted_served_verified_and_stopped(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("vera", "pissa")}
    for name, folder in folders.items():
        saved(folder, (name,), {"r": 4})
    said, converted = list[str](), list[Path]()

    def say(text: str) -> None:
        said.extend(text.splitlines())
        converted.extend(Path(json.loads(word)["path"]) for word in shlex.split(text) if word.startswith('{"name"'))
        if text.startswith("vLLM serves"):
            os.kill(os.getpid(), signal.SIGTERM)  # it goes on to the server, and ends it alone

    settings = VllmSettings(PROGRAM, port=0, key="a-secret-key", options="--wrong ends")
    assert serve_vllm(folders, SECTION, settings, say=say) == 7
    assert said[1:-1] == [
        "vera: converted to plain LoRA, rank 4",
        "pissa: converted to plain LoRA, rank 8",
        "vera: right, it computes the adapter",
        "pissa: right, it computes the adapter",
    ]
    assert said[-1].startswith("vLLM serves builtin:base and 2 adapters at http://127.0.0.1:")
    assert "a-secret-key" not in " ".join(said)
    assert all((folder / CERTIFICATE).is_file() for folder in folders.values())
    assert len(converted) == 2
    assert not any(folder.exists() for folder in converted)  # the converted forms go with the server


def test_a_server_that_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "a", ("lora",), {"r": 4, "targets": ["q_proj"]})
    given = ("--vllm", PROGRAM, "--vllm-options", "--wrong start", "--port", "0")
    ran = Command(monkeypatch, capsys)("serve", str(tmp_path / "a"), "--engine", "vllm", *given)
    said = "error: vLLM failed: it ended with the exit code 1 before it answered\n  | loading "
    assert said in ran.err
    assert ran.err.endswith("  | no memory left  [31m for the weights\n")  # it does not control the terminal
    assert (ran.code, ran.out) == (1, "")


# --- the process ------------------------------------------------------------------------------------------------------

ANSWERING = """
import http.server, signal, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_): pass
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
SLEEPING = [sys.executable, "-c", "import time; time.sleep(600)"]
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def test_a_server_is_waited_for_and_ends_with_its_own_code() -> None:
    port = free_port("127.0.0.1", 0)
    with running([sys.executable, "-c", ANSWERING, str(port)], {}, "vLLM") as server:
        server.wait_until_healthy(f"http://127.0.0.1:{port}", 60)
        server.ready = True
        os.kill(os.getpid(), signal.SIGTERM)  # it goes on to the server, and ends it alone
        assert server.wait() == 7


def test_a_signal_before_it_is_ready_ends_both() -> None:
    def interrupted() -> None:
        with running(SLEEPING, {}, "vLLM"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    with pytest.raises(SystemExit) as ended:
        interrupted()
    assert ended.value.code == 143


def test_nothing_that_it_started_outlives_it() -> None:
    with running([sys.executable, "-c", STUBBORN], {}, "vLLM") as server:
        while not server.lines:
            time.sleep(0.01)
        server.stop(patience=0.1)
        child = Path(f"/proc/{server.lines[0]}")
    assert server.wait() == 137
    if child.parent.is_dir():  # Linux
        deadline = time.monotonic() + 30
        while child.exists() and "zombie" not in (child / "status").read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not child.exists() or "zombie" in (child / "status").read_text()


def test_one_that_never_answers_is_given_up() -> None:
    with (
        running(SLEEPING, {}, "vLLM") as server,
        pytest.raises(ServerError, match=r"^vLLM failed: it did not answer at http://127.0.0.1:9 within 0.2 s$"),
    ):
        server.wait_until_healthy("http://127.0.0.1:9", 0.2)
    assert server.process.returncode is not None


def test_an_address_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(LoraryError, match=f"127.0.0.1:{port}: address already in use"):
            free_port("127.0.0.1", port)


# --- what it serves ---------------------------------------------------------------------------------------------------


def plan_of(url: str, folders: dict[str, Path], key: str = "") -> VllmPlan:
    adapters = tuple(VllmAdapter(name, folder, folder, 4) for name, folder in folders.items())
    return VllmPlan((), {}, adapters, "base", url, key)


def test_every_adapter_is_compared_with_its_own(tmp_path: Path) -> None:
    models = {name: saved(tmp_path / name, (name,), {"r": 4}).eval() for name in ("lora", "dora")}
    folders = {name: tmp_path / name for name in models}
    base, tokenizer, said = builtin.load_model(), builtin.load_tokenizer(), list[str]()
    with serving(Served({"base": base, **models}, tokenizer, key="secret")) as url:
        plan = plan_of(url, folders, "secret")
        check_models(url, "secret", ["base", *models], "vLLM")
        verify_plan(plan, SECTION, said.append, lambda text: None)
    assert said == [f"{name}: right, it computes the adapter" for name in models]
    with serving(Served({"base": base, "lora": models["dora"], "dora": base}, tokenizer)) as url:
        with pytest.raises(ServerError) as raised:
            verify_plan(plan_of(url, folders), SECTION, said.append, lambda text: None)
        with pytest.raises(ServerError) as lacking:
            check_models(url, "", ["base", "lora", "x", "y"], "vLLM")
    assert "vLLM computes something else:\n  - lora: " in str(raised.value)
    assert "  - dora: no-op: its adapter is its base: the adapter is ignored" in str(raised.value)
    assert str(lacking.value) == (
        "vLLM does not serve every model:\n  - x: is not in its list of models\n  - y: is not in its list of models"
    )


# --- the command line -------------------------------------------------------------------------------------------------


def test_options_of_another_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lorary = Command(monkeypatch, capsys)
    others = ("--root", str(tmp_path), "--budget", "1GiB", "--admin-key", "an-admin-key", "--replicas", "2")
    ran = lorary("serve", "--engine", "vllm", *others, "--max-rank", "8")
    assert (ran.code, ran.err) == (
        2,
        "error: cannot serve:\n"
        "  - --replicas: is not for --engine vllm\n      hint: leave it out; it is an option of --engine ray\n"
        "  - --root: is not for --engine vllm\n      hint: name the adapters on the command line\n"
        "  - --budget: is not for --engine vllm\n"
        "      hint: --vllm-options has vLLM's own, such as --gpu-memory-utilization 0.8\n"
        "  - --admin-key: is not for --engine vllm\n"
        "      hint: adapters are not loaded at run time: leave it out\n"
        "  - --max-rank: is not for --engine vllm\n      hint: leave it out; it is an option of --engine own and ray\n",
    )
    ran = lorary("serve", "--no-verify", "--replicas", "2")
    assert (ran.code, ran.err) == (
        2,
        "error: cannot serve:\n"
        "  - --verify: is not for --engine own\n      hint: leave it out; it is an option of --engine vllm\n"
        "  - --replicas: is not for --engine own\n      hint: leave it out; it is an option of --engine ray\n",
    )


def test_a_vllm_that_is_not_there_and_one_key_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "a", ("lora",), {"r": 4, "targets": ["q_proj"]})
    lorary = Command(monkeypatch, capsys)
    asked = ("serve", str(tmp_path / "a"), "--engine", "vllm", "--port", "0")
    ran = lorary(*asked, "--vllm", str(tmp_path / "none"))
    assert ran.code == 2
    assert "error: cannot start vLLM:\n  - " in ran.err
    assert "there is no such program\n      hint: install vLLM, or name its command" in ran.err
    ran = lorary(*asked, "--key", "the-first-key", "--key", "the-second-key")
    said = "  - --key: 2 keys are given, and vLLM takes one from us\n      hint: give one\n"
    assert (ran.code, ran.err) == (2, f"error: cannot serve with vLLM:\n{said}")
