"""`lorary serve --engine ray` under load while a replica is killed: no request is lost, none is answered wrongly.

    python -m tests.clients.ray_replicas        in an environment with lorary and `ray[serve]`

Two replicas on this machine serve the built-in base and adapters of several methods. Clients, half of them streaming,
ask for greedy and for sampled text; every answer must be that of an engine that serves one request at a time.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

METHODS = ("lora", "rslora", "vera", "pissa", "dora", "melora")
REQUESTS, CLIENTS, TOKENS = 48, 16, 32


@dataclass
class Asked:
    """A request, and what came back.

    Args:
        model: the base or an adapter.
        prompt: the prompt.
        options: of the sampling.
        stream: whether the answer is streamed.
        text: what has come back so far.
        error: why it failed.
    """

    model: str
    prompt: str
    options: dict[str, Any]
    stream: bool
    text: str = ""
    pieces: int = 0
    error: str = ""
    want: str = field(default="", repr=False)


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folders = prepared(Path(temporary))
        asked = requests()
        answer_one_at_a_time(folders, asked)
        with serving(folders) as url:
            killed = ask(url, asked, kill_one=True)
            wrong = [one for one in asked if one.error or one.text != one.want]
            retries = metric(url, "lorary_retries_total")
            seconds = until_whole(url)
            again = requests()[: len(METHODS) + 1]
            ask(url, again, kill_one=False)
            wrong += [one for one, first in zip(again, asked, strict=False) if one.text != first.want]
    print(
        f"{len(asked)} requests, {len(wrong)} wrong or lost; replica {killed} killed, {retries:.0f} sent to the other"
    )
    print(f"two replicas again after {seconds:.0f} s")
    for one in wrong:
        print("WRONG", one, one.want)
    sys.exit(0 if not wrong and retries > 0 else 1)


def prepared(root: Path) -> dict[str, Path]:
    """Name -> folder of an adapter of each method."""
    import torch

    import lorary
    from lorary import builtin
    from tests import tiny

    for name in METHODS:
        model = builtin.load_model()
        lorary.attach(model, lorary.plan(model, lorary.method(name, r=4)))
        torch.manual_seed(0)
        tiny.shaken(model, 0.02)
        lorary.save(model, root / name)
    return {name: root / name for name in METHODS}


def requests() -> list[Asked]:
    found = []
    for i in range(REQUESTS):
        model = ("builtin:base", *METHODS)[i % (len(METHODS) + 1)]
        options = {"temperature": 0.0} if i % 3 else {"temperature": 0.8, "seed": i}
        found.append(Asked(model, f"def parse_{i}(", options, stream=i % 2 == 0))
    return found


def answer_one_at_a_time(folders: dict[str, Path], asked: list[Asked]) -> None:
    """Set what each request must get."""
    from lorary import builtin
    from lorary.serve.engine.one_at_a_time import OneAtATime
    from lorary.serve.request import Event, Finished, Request, Sampling

    engine = OneAtATime(builtin.load_model(), builtin.load_tokenizer(), "builtin:base")
    for name, folder in folders.items():
        engine.load(name, str(folder))
    engine.start()
    for one in asked:
        ended = threading.Event()

        def deliver(event: Event, one: Asked = one, ended: threading.Event = ended) -> None:
            one.want += event.text
            if isinstance(event, Finished):
                ended.set()

        adapters = {} if one.model == engine.name else {one.model: 1.0}
        ids = tuple(engine.tokenizer(one.prompt)["input_ids"])
        engine.submit(Request(ids, adapters, Sampling(TOKENS, **one.options)), deliver)
        ended.wait()
    engine.stop()


@contextmanager
def serving(folders: dict[str, Path]) -> Iterator[str]:
    """The address of a server with two replicas."""
    code = "from lorary.cli import main; main()"
    given = [f"{name}={folder}" for name, folder in folders.items()]
    options = ["--engine", "ray", "--replicas", "2", "--port", "0", "--dtype", "float32", "--budget", "64MiB"]
    command = [sys.executable, "-c", code, "serve", *given, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            line = server.stdout.readline()  # lorary serves builtin:base at http://...
            if " at " not in line:
                sys.exit(f"the server did not start: {line}{server.wait()}")
            yield line.split(" at ")[1].strip()
        finally:
            server.send_signal(signal.SIGTERM)
            if (code_of_server := server.wait(120)) != 0:
                print(f"the server ended with {code_of_server}")


def ask(url: str, asked: list[Asked], *, kill_one: bool) -> int:
    """Send all requests, and kill a replica in their middle; its process id."""
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
    killed = 0
    with ThreadPoolExecutor(CLIENTS) as pool:
        running = [pool.submit(_ask, client, one) for one in asked]
        if kill_one:
            while sum(one.pieces for one in asked) < REQUESTS and not all(f.done() for f in running):
                time.sleep(0.005)
            killed = replicas()[0]
            os.kill(killed, signal.SIGKILL)
        for future in running:
            future.result()
    return killed


def _ask(client: Any, one: Asked) -> None:
    import openai

    try:
        answer = client.completions.create(
            model=one.model, prompt=one.prompt, max_tokens=TOKENS, stream=one.stream, **one.options
        )
        for chunk in answer if one.stream else [answer]:
            one.pieces += 1
            one.text += "".join(choice.text for choice in chunk.choices)
    except openai.OpenAIError as error:
        one.error = str(error)


def replicas() -> list[int]:
    """The process ids of the replicas of the engine."""
    import psutil

    names = {process.pid: process.info["cmdline"] or [""] for process in psutil.process_iter(["cmdline"])}
    return [pid for pid, words in names.items() if words[0].startswith("ray::ServeReplica:lorary:Engine")]


def until_whole(url: str) -> float:
    """Seconds until two replicas answer again."""
    start = time.monotonic()
    while metric(url, "lorary_replicas") < 2 and time.monotonic() - start < 180:
        time.sleep(0.5)
    return time.monotonic() - start


def metric(url: str, name: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as reply:
        lines = reply.read().decode().splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{")), 0.0)


if __name__ == "__main__":
    main()
