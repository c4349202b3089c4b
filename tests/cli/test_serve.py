"""lorary serve: its start, its refusals, and its page's examples against a real process."""

from __future__ import annotations

import http.client
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

import lorary
from lorary.cli._serve import say, storage_of
from lorary.cli.serve import _with_tenant
from lorary.files.strict_json import show
from lorary.layers.nf4 import NF4
from tests import pages
from tests.cli.command import Command
from tests.serve.http.live import base, save_adapter
from tests.tiny import shaken

PAGE = pages.ROOT / "docs" / "how-to" / "serve.md"
BASE = "builtin:base"
GROUP = pytest.mark.xdist_group("serve")  # the tests of the one process, in their order


class Process:
    """`lorary serve` with these arguments, on a free port, ready to be asked."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        call = [sys.executable, "-m", "lorary", "serve", *arguments, "--port", "0", "--drain", "600"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(call, cwd=folder, stdout=pipe, stderr=pipe, text=True)
        assert self.process.stdout
        self.welcome = []
        for line in self.process.stdout:
            self.welcome.append(line.rstrip("\n"))
            if "Ctrl-C" in line:
                break
        found = re.search(r"http://127.0.0.1:(\d+)", " ".join(self.welcome))
        assert found, (self.welcome, self.process.communicate())
        self.port = int(found[1])

    def here(self, text: str) -> str:
        """The text of the page with this server's port."""
        return text.replace("127.0.0.1:8000", f"127.0.0.1:{self.port}")

    @contextmanager
    def answer(self, method: str, path: str, body: Any = None) -> Iterator[http.client.HTTPResponse]:
        """The answer to a request, while it comes."""
        headers = {"Content-Type": "application/json"} if body else {}
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request(method, path, json.dumps(body) if body else None, headers)
            yield connection.getresponse()

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, str | None, str]:
        """(status, Retry-After, body) of the answer."""
        with self.answer(method, path, body) as answer:
            return answer.status, answer.getheader("Retry-After"), answer.read().decode()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """The server of the page's second example."""
    folder = tmp_path_factory.mktemp("serve")
    for seed, name in enumerate(("docs", "second", "third"), start=1):
        save_adapter(folder / "adapters" / name, seed)
    (example,) = (line for line in PAGE.read_text().splitlines() if line.startswith("$ lorary serve adapters/docs"))
    process = Process(folder, *shlex.split(example)[3:-2])
    yield process
    if process.process.poll() is None:
        process.process.kill()
    process.process.communicate()


@pytest.mark.slow
@GROUP
def test_it_says_where_it_is_and_what_to_try(server: Process) -> None:
    url = f"http://127.0.0.1:{server.port}"
    first, facts, models, example, page, last = server.welcome
    assert first == f"lorary serves {BASE} at {url}"
    found = re.fullmatch(
        r"  (float32|bfloat16), not quantised, on cpu, in continuous batching; budget (\d+\.\d) MiB; 4 adapters found",
        facts,
    )
    assert found, facts
    assert float(found[2]) < 160  # what the small base needs, and not what the machine has
    assert models == f"  models: {BASE}, docs, parser, second, third"
    assert (page, last) == (f"  page: {url}/", "  Ctrl-C stops it.")
    assert server.ask("GET", "/")[0] == 200
    if shutil.which("curl"):
        ran = subprocess.run(shlex.split(example.partition("try: ")[2]), capture_output=True, check=True)
        assert json.loads(ran.stdout)["choices"][0]["finish_reason"]


@pytest.mark.slow
@GROUP
@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_the_pages_curl_examples(server: Process) -> None:
    lines = [line for block in pages.blocks(PAGE) for line in block.code.replace("\\\n", " ").splitlines()]
    calls = [shlex.split(server.here(line))[1:] for line in lines if line.startswith("$ curl ")]
    answers = []
    for call in calls:
        quiet = [call[0], "-sS", "--fail-with-body", *call[1:]]
        ran = subprocess.run(quiet, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, (call, ran.stdout, ran.stderr)
        answers.append(ran.stdout)
    text, stream, models, several, loaded, unloaded = answers
    assert json.loads(text)["model"] == "docs"
    assert stream.endswith("data: [DONE]\n\n")
    assert [card["id"] for card in json.loads(models)["data"]] == [BASE, "docs", "parser", "second", "third"]
    assert json.loads(several)["usage"]["completion_tokens"] == 16
    assert loaded == "Success: LoRA adapter 'third' added successfully."
    assert unloaded == "Success: LoRA adapter 'third' removed successfully."


@pytest.mark.slow
@GROUP
def test_the_pages_client_example(server: Process, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = (block for block in pages.blocks(PAGE) if block.language == "python")
    exec(compile(server.here(block.code), str(PAGE), "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
@GROUP
def test_the_pages_error_is_what_the_server_says(server: Process) -> None:
    (block,) = (block for block in pages.blocks(PAGE) if block.language == "json")
    answer = server.ask("POST", "/v1/completions", {"model": "docs", "prompt": "x", "temperature": 9})
    assert json.loads(answer[2]) == json.loads(block.code)


@pytest.mark.slow
@GROUP
def test_a_signal_lets_running_requests_end(server: Process) -> None:
    body = {"model": "docs", "prompt": [5] * 9, "max_tokens": 120, "ignore_eos": True, "stream": True}
    with server.answer("POST", "/v1/completions", body) as running:
        running.readline()
        server.process.send_signal(signal.SIGTERM)
        status = 200
        while status == 200:
            status, retry, said = server.ask("GET", "/v1/models")
        events = running.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert json.loads(events[-3].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert (status, retry, json.loads(said)["error"]["message"]) == (503, "5", "the server is shutting down")
    assert server.process.wait(30) == 0
    out, err = server.process.communicate()
    assert (out, "Traceback" in err, err.splitlines()[-1]) == ("", False, "stopped")


# --- refusals ----------------------------------------------------------------------------------------------------


def refused(command: Command, *arguments: str) -> str:
    ran = command("serve", *arguments)
    assert (ran.code, ran.out) in ((2, ""), (4, ""), (1, ""))
    assert "Traceback" not in ran.err
    return ran.err


_SECRETS = "python -c 'import secrets; print(secrets.token_urlsafe(24))'"


@pytest.mark.parametrize(
    ("arguments", "problems"),
    [
        (
            ["--host", "0.0.0.0"],
            ["--host: 0.0.0.0 can be reached from other machines, and there is no key"],
        ),
        (["--host", "example.org"], ["--host: example.org can be reached from other machines, and there is no key"]),
        (["--key", "short"], ["--key: a key must have 8 to 512 printable ASCII characters without spaces"]),
        (["--key", "long enough"], ["--key: a key must have 8 to 512 printable ASCII characters without spaces"]),
        (["--key", "a=same-key-1", "--key", "b=same-key-1"], ["--key: two users have the same key"]),
        (["--key", "same-key-1", "--admin-key", "same-key-1"], ["--admin-key: an admin's key is a user's as well"]),
        (["--no-keys", "--key", "a-good-key"], ["--no-keys: keys are given"]),
        (["--root", "nowhere"], ["--root: there is no folder nowhere"]),
        (["--max-body", "big"], ["--max-body: 'big' is not a size of 1 KiB or more"]),
        (["--budget", "2 apples"], ["--budget: '2 apples' is not a size of 1 KiB or more"]),
        (["--max-adapter", "-1"], ["--max-adapter: '-1' is not a size of 1 KiB or more"]),
        (
            ["--host", "::", "--root", "nowhere", "--key", "x"],
            [
                "--key: a key must have 8 to 512 printable ASCII characters without spaces",
                "--root: there is no folder nowhere",
            ],
        ),
        (["builtin:base"], ["builtin:base: is a base"]),
        (["nowhere", "x=elsewhere"], ["elsewhere: there is no such folder", "nowhere: there is no such folder"]),
        (
            ["a=one", "a=two"],
            ["a: 2 adapters have this name", "one: there is no such folder", "two: there is no such folder"],
        ),
        (["--base", "nowhere/at/all"], ["nowhere/at/all: there is no such folder"]),
        (["--host", "203.0.113.7", "--no-keys"], ["203.0.113.7:8000: cannot assign requested address"]),
    ],
)
def test_a_wrong_command_line_lists_every_problem(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], problems: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    err = refused(command, *arguments)
    assert re.findall(r"^  - (.*)$", err, re.MULTILINE) == problems


def test_a_taken_port_is_found_before_the_base_is_loaded(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorary.serve.address import bind

    monkeypatch.setattr("lorary.cli._serve.opened", lambda *_: pytest.fail("the base was loaded"))
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}: address already in use" in refused(command, "--port", str(port))


def test_a_server_goes_on_where_nobody_reads_what_it_prints() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as broken:
        say("a line", broken)
        say("another", broken)
    with open("/dev/full", "w") as full:
        say("a line", full)


def test_names_that_no_adapter_can_have_are_found_before_the_base_is_loaded(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorary.cli._serve.opened", lambda *_: pytest.fail("the base was loaded"))
    folder = save_adapter(tmp_path / "été", 1)
    long, names = "x" * 201, ("llama", "two words", "a\nb", "..", ".hidden")
    given = [f"{name}={folder}" for name in (*names, long)]
    err = refused(command, str(folder), *given, "--base", BASE, "--name", "llama", "--port", "0")
    rule = "is not made of letters, digits, `.`, `_` and `-`, in at most 3 parts with `/`"
    assert re.findall(r"^  - (.*)\n      hint: name it: NAME=FOLDER$", err, re.MULTILINE) == [
        "'llama': is the base's",
        *(f"{shown}: {rule}" for shown in ("'two words'", r"'a\nb'", "'..'", "'.hidden'")),
        f"{show(long)}: has 201 characters; a name has 1 to 200",
        f"'été': {rule}",
    ]


def test_a_budget_without_memory_for_it_says_what_to_lower(command: Command) -> None:
    err = refused(command, "--budget", "900000GiB", "--port", "0")
    assert re.fullmatch(
        r"error: no memory for adapters, keys and values:\n"
        r"  - budget: Memory footprint \d+ is more than available memory \d+\n"
        r"      hint: 900000.0 GiB are reserved at the start; lower it: --budget, or budget=...\n",
        err,
    )


def test_every_adapter_that_cannot_be_served_is_listed(command: Command, tmp_path: Path) -> None:
    good, cut, other = (save_adapter(tmp_path / name, 1) for name in ("good", "cut", "other"))
    os.truncate(cut / "adapter_model.safetensors", 900)
    record = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(record | {"r": 7}))
    err = refused(command, str(good), str(cut), str(other), "--base", BASE, "--port", "0")
    assert err.startswith("error: cannot serve these adapters:\n")
    listed = {line.partition(":")[0] for line in re.findall(r"^  - (.*)$", err, re.MULTILINE)}
    assert listed == {"cut", "other"}


def test_adapters_of_several_bases_are_not_served_together(command: Command, tmp_path: Path) -> None:
    one, two = (save_adapter(tmp_path / name, 1) for name in ("one", "two"))
    (two / "lorary.json").unlink()  # as PEFT writes it
    config = json.loads((two / "adapter_config.json").read_text())
    (two / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "someone/else"}))
    err = refused(command, str(one), str(two))
    assert "several bases" in err
    assert "one: its base is builtin:base" in err
    assert "two: its base is someone/else" in err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("anna=secret-1", ("secret-1", "anna")),
        ("secret-1", ("secret-1", "key-3")),
        ("c2VjcmV0LTE=", ("c2VjcmV0LTE=", "key-3")),
        ("c2VjcmV0LTE==", ("c2VjcmV0LTE==", "key-3")),
        ("anna=c2VjcmV0LTE==", ("c2VjcmV0LTE==", "anna")),
        ("sk/x=secret-1", ("sk/x=secret-1", "key-3")),
    ],
)
def test_a_key_may_have_a_tenant(text: str, expected: tuple[str, str]) -> None:
    assert _with_tenant(text, 3) == expected


def test_keys_come_from_the_environment_too(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("lorary.cli._serve.run", lambda start, settings, host, port: seen.append(settings))
    monkeypatch.setenv("LORARY_KEYS", "anna=key-of-anna,key-of-bert")
    monkeypatch.setenv("LORARY_ADMIN_KEYS", "key-of-admin")
    assert command("serve", "--key", "key-of-carl", "--host", "0.0.0.0").code == 0
    (settings,) = seen
    assert settings.keys == {"key-of-carl": "key-1", "key-of-anna": "anna", "key-of-bert": "key-3"}
    assert settings.admin_keys == {"key-of-admin"}
    assert not settings.local
    monkeypatch.undo()


def test_the_base_is_quantised_as_its_adapters_were_trained(tmp_path: Path) -> None:
    plain, packed, also = tmp_path / "plain", tmp_path / "packed", tmp_path / "also"
    save_adapter(plain, 1)
    model = base()
    lorary.attach(model, lorary.plan(model, lorary.method("qlora", r=2), ["q_proj"]))
    lorary.save(shaken(model), packed)
    shutil.copytree(packed, also)
    assert storage_of("builtin:base", {"a": packed, "b": also}, "auto") == NF4()
    assert storage_of("builtin:base", {"a": packed, "b": plain}, "auto") is None
    assert storage_of("builtin:base", {"b": plain}, "auto") is storage_of("builtin:base", {}, "auto") is None
    assert storage_of("builtin:base", {"b": plain}, "nf4") == NF4()
    assert storage_of("builtin:base", {"a": packed}, "no") is None
