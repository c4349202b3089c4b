"""A server under everything that can happen to it at once, for half an hour: is every answer right, is memory flat?

    python benchmarks/serve_soak.py --minutes 30
    python benchmarks/serve_soak.py --minutes 1        # to check the script

Starts `lorary serve` on the built-in base with a budget that a third of the adapters fit in. At the same time clients
ask adapters of many methods and the base, streaming and not, leave in the middle of an answer, or read slowly; an
administrator loads, unloads and replaces adapters under the same names by others, and tries to load broken ones.
Every answer is compared with that of the model with that adapter alone: it must be wholly that of one version of the
adapter which had the name while the request was accepted. Ends with an error if an answer was wrong, a request stuck,
a broken adapter was loaded, or the server's memory grew.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import http.client
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import track

import lorary
from cases import MiB, machine
from lorary import builtin

ADMIN, USER = "soak-admin", "soak-user"
PROMPTS = (
    "def main():",
    "import os\nimport sys\n\n\ndef main():",
    "import os\nimport sys\n\n\ndef main(argv):\n    parser =",
    "class Stack:",
    "# The quick brown fox\n",
    "for i in range(",
)
METHODS: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    (("lora",), {"r": 8, "alpha": 16}),
    (("rslora",), {"r": 3, "alpha": 6}),
    (("dora",), {"r": 4, "alpha": 8}),
    (("vera",), {"r": 16}),
    (("glora",), {"r": 4}),
    (("pissa",), {"r": 5}),
    (("melora",), {"r": 4}),
    (("multilora",), {"r": 4}),
    (("adalora",), {}),
    (("longlora", "lora"), {"r": 4, "length": 512}),
    (("lora",), {"r": 33, "alpha": 33}),
    (("lora-fa",), {"r": 7, "alpha": 14}),
)
VERSIONS = 2  # of each name
LENGTH = 24  # tokens of an answer
STUCK = 120.0  # seconds


def moved(adapter: lorary.Adapter, seed: int) -> lorary.Adapter:
    """The adapter with noise on everything that trains, so that it answers differently from the base."""
    generator = torch.Generator().manual_seed(seed)

    def noisy(t: torch.Tensor, trained: bool) -> torch.Tensor:
        size = 0.3 * t.float().std().nan_to_num(0.0) + 0.05
        return t + size * torch.randn(t.shape, generator=generator) if trained else t

    tensors = {
        p.site.name: {role: noisy(t, role in p.method.trained) for role, t in adapter.tensors[p.site.name].items()}
        for p in adapter.sites
    }
    full = {name: noisy(t, True) for name, t in adapter.full.items()}
    return dataclasses.replace(adapter, tensors=tensors, full=full)


def write_adapters(folder: Path, tokenizer: Any) -> dict[str, list[dict[str, str]]]:
    """Write every version of every adapter; returns name -> version -> prompt -> the right answer."""
    found: dict[str, list[dict[str, str]]] = {"": [right_answers(builtin.load_model(), tokenizer)]}
    for i, (names, options) in enumerate(track(METHODS, "writing adapters", console=Console(stderr=True))):
        name = f"{names[0]}-{i}"
        found[name] = []
        for version in range(VERSIONS):
            model = builtin.load_model()
            lorary.attach(model, lorary.plan(model, lorary.method(*names, **options)))
            adapter = moved(lorary.Adapter.of(model), 100 * i + version)
            lorary.save_adapter(adapter, folder / f"v{version}" / name)
            lorary.switch(lorary.detach(model) or model, adapter)
            found[name].append(right_answers(model, tokenizer))
    return found


@torch.inference_mode()
def right_answers(model: Any, tokenizer: Any) -> dict[str, str]:
    """prompt -> the greedy continuation by Transformers."""
    answers = {}
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.eval().generate(**ids, max_new_tokens=LENGTH, do_sample=False)
        answers[prompt] = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def break_one(folder: Path, source: Path) -> list[Path]:
    """Folders that no server may load."""
    cut, empty, pickled = folder / "cut", folder / "empty", folder / "pickled"
    for path in (cut, pickled):
        shutil.copytree(source, path)
    for file in cut.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-100])
    for file in pickled.glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    empty.mkdir()
    return [cut, empty, pickled]


class Names:
    """Which versions a name has had, with the times: what a request may be answered with."""

    def __init__(self, names: list[str]) -> None:
        self._lock = threading.Lock()
        self._history: dict[str, list[tuple[float, float, int | None]]] = {
            name: [(0.0, float("inf"), 0)] for name in names
        }

    @contextlib.contextmanager
    def changing(self, name: str, version: int | None) -> Iterator[None]:
        """While the block runs, the old and the new version are both possible; None: the name is unknown."""
        with self._lock:
            self._history[name].append((time.monotonic(), float("inf"), version))
        yield
        with self._lock:
            old = self._history[name]
            now = time.monotonic()
            self._history[name] = [*[(a, min(b, now), v) for a, b, v in old[:-1]][-20:], old[-1]]

    def possible(self, name: str, since: float, until: float) -> set[int | None]:
        """The versions that the name had at some time between two."""
        with self._lock:
            return {v for a, b, v in self._history[name] if a <= until and b >= since}


class Soak:
    """The clients, and what they found."""

    def __init__(self, port: int, answers: dict[str, list[dict[str, str]]], folder: Path, broken: list[Path]) -> None:
        self.port, self.answers, self.folder, self.broken = port, answers, folder, broken
        self.names = Names([name for name in answers if name])
        self.locks = {name: threading.Lock() for name in answers}
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.over = threading.Event()

    def call(self, path: str, body: dict[str, Any], key: str) -> tuple[http.client.HTTPConnection, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=STUCK)
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        connection.request("POST", path, json.dumps(body), headers)
        return connection, connection.getresponse()

    def ask(self, draw: random.Random, kind: str) -> None:
        """One request of a kind: "whole", "stream", "leave" or "slow"."""
        name, prompt = draw.choice([*self.answers]), draw.choice(PROMPTS)
        body = {"model": name or "builtin:base", "prompt": prompt, "max_tokens": LENGTH, "temperature": 0}
        since = time.monotonic()
        connection, response = self.call("/v1/completions", body | {"stream": kind != "whole"}, USER)
        accepted = time.monotonic()
        with contextlib.closing(connection):
            if response.status == 429:
                self.counts["told to wait"] += 1
                time.sleep(float(response.getheader("Retry-After") or 1) * draw.random())
                return
            possible = self.names.possible(name, since, accepted) if name else {0}
            if response.status == 404 and None in possible:
                self.counts["unknown while unloaded"] += 1
                return
            if response.status != 200:
                self.fault(f"{name}: status {response.status}: {response.read()[:300]!r}")
                return
            if kind == "leave":
                for _ in range(draw.randrange(1, 8)):
                    response.readline()
                self.counts["left"] += 1
                return
            text = self.read(response, kind)
        right = {self.answers[name][v][prompt] for v in possible if v is not None}
        self.counts[kind] += 1
        if text not in right:
            self.fault(f"{name or 'the base'}, {kind}, {prompt!r}: {text!r}, not one of {sorted(right)}")

    def read(self, response: Any, kind: str) -> str:
        """The text of an answer."""
        if kind == "whole":
            return str(json.loads(response.read())["choices"][0]["text"])
        text, done = "", False
        for line in response:
            if not line.startswith(b"data: "):
                continue
            if line.strip() == b"data: [DONE]":
                done = True
                break
            chunk = json.loads(line[6:])
            if "error" in chunk:
                return f"error: {chunk['error']}"
            text += "".join(choice["text"] for choice in chunk["choices"])
            if kind == "slow":
                time.sleep(0.2)
        return text if done else f"{text} (without [DONE])"

    def administer(self, draw: random.Random) -> None:
        """Load, unload or replace an adapter, or try a broken one."""
        if draw.random() < 0.25:
            path = draw.choice(self.broken)
            connection, response = self.call("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": str(path)}, ADMIN)
            with contextlib.closing(connection):
                self.counts["broken refused"] += 1
                if response.status not in (400, 404):
                    self.fault(f"{path.name} was answered with {response.status}")
            return
        name = draw.choice([name for name in self.answers if name])
        with self.locks[name]:
            version = draw.randrange(VERSIONS)
            path = str(self.folder / f"v{version}" / name)
            if draw.random() < 0.3:
                with self.names.changing(name, None):
                    self.change("/v1/unload_lora_adapter", {"lora_name": name})
                time.sleep(draw.random())
            body = {"lora_name": name, "lora_path": path, "load_inplace": True}
            with self.names.changing(name, version):
                self.change("/v1/load_lora_adapter", body)

    def change(self, path: str, body: dict[str, Any]) -> None:
        connection, response = self.call(path, body, ADMIN)
        with contextlib.closing(connection):
            text = response.read()
            self.counts[path.split("/")[-1].split("_")[0] + "ed"] += 1
            if response.status != 200:
                self.fault(f"{path} {body}: {response.status} {text[:300]!r}")

    def fault(self, text: str) -> None:
        self.faults.append(text)
        print(f"fault: {text}", file=sys.stderr, flush=True)

    def worker(self, seed: int, act: Callable[[random.Random], None], pause: float) -> None:
        draw = random.Random(seed)
        while not self.over.is_set():
            try:
                act(draw)
            except TimeoutError:
                self.fault(f"stuck for {STUCK:g} s")
            except (OSError, http.client.HTTPException) as error:
                if not self.over.is_set():
                    self.fault(f"{type(error).__name__}: {error}")
                    time.sleep(1)
            time.sleep(pause * draw.random())

    def run(self, seconds: float, process: psutil.Process) -> list[tuple[float, int]]:
        """Let everybody act; returns the server's memory over time."""
        kinds = ("whole", "whole", "stream", "stream", "stream", "leave", "leave", "slow")
        acts = [(lambda draw, kind=kind: self.ask(draw, kind), 0.05) for kind in kinds]
        acts += [(self.administer, 1.0), (self.administer, 1.0)]
        threads = [
            threading.Thread(target=self.worker, args=(i, act, pause), daemon=True)
            for i, (act, pause) in enumerate(acts)
        ]
        for thread in threads:
            thread.start()
        start, memory = time.monotonic(), []
        while (at := time.monotonic() - start) < seconds and process.is_running():
            memory.append((at, process.memory_info().rss))
            time.sleep(min(5.0, seconds / 20))
        self.over.set()
        for thread in threads:
            thread.join(STUCK)
        return memory


@contextlib.contextmanager
def server(folder: Path, budget: str) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A server of the first versions, and its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = sorted((folder / "v0").iterdir())
    command = [sys.executable, "-m", "lorary", "serve", *map(str, folders), "--root", str(folder)]
    command += ["--port", str(port), "--budget", budget, "--dtype", "float32", "--key", USER, "--admin-key", ADMIN]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    break
            if process.poll() is not None:
                raise SystemExit(f"the server ended with {process.returncode}: {' '.join(command)}")
            time.sleep(0.2)
        yield port, process
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()


def growth(memory: list[tuple[float, int]]) -> float:
    """By what share memory grew from the second fifth of the time to the last: the first fifth warms up."""
    n = len(memory) // 5
    early, late = [m for _, m in memory[n : 2 * n]], [m for _, m in memory[-n:]]
    return statistics.median(late) / statistics.median(early) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--budget", default="24MiB")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "serve_soak.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        answers = write_adapters(folder, builtin.load_tokenizer())
        broken = break_one(folder, folder / "v0" / "lora-0")
        with server(folder, arguments.budget) as (port, process):
            soak = Soak(port, answers, folder, broken)
            memory = soak.run(arguments.minutes * 60, psutil.Process(process.pid))
            alive = process.poll() is None
        exit_code = process.returncode
    grown = growth(memory)
    result = {
        "machine": machine(arguments),
        "minutes": arguments.minutes,
        "counts": dict(sorted(soak.counts.items())),
        "faults": soak.faults,
        "memory_mib": [[round(at), round(rss / MiB)] for at, rss in memory],
        "growth": round(grown, 4),
        "exit_code": exit_code,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "memory_mib"}, indent=1))
    if soak.faults or not alive or exit_code or grown > 0.02:
        raise SystemExit(1)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
