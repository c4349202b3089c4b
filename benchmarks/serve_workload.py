"""The workload of the serving benchmark: requests with times, adapters and lengths, and their file of JSON lines.

S-LoRA's generator (arXiv:2311.03285, its benchmark's own code), with Zipf popularity beside its power law: Gamma
intervals of a coefficient of variation, adapters by popularity, uniform lengths, and a seed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple


class Call(NamedTuple):
    """A request: seconds after the start, the adapter's name or "" for the base, tokens, and how many to generate."""

    at: float
    adapter: str
    prompt: list[int]
    max_tokens: int


@dataclass(frozen=True)
class Workload:
    """What is asked for.

    Args:
        requests: their number.
        rate: requests in a second, for an open loop.
        cv: coefficient of variation of the intervals; 1 is a Poisson process.
        adapters: their number; 0 for the base alone.
        popularity: "uniform", "zipf:S", "power:ALPHA" (S-LoRA's: 1 is uniform), "identical" or "distinct".
        prompt, generated: the least and the most tokens, uniform in between.
        shared: the share of a prompt that all requests of an adapter begin with.
        vocabulary: tokens of the model; the first 16 are never used.
        seed: of everything but the adapters: two workloads that differ in these have equal times and lengths.
    """

    requests: int
    rate: float = 10.0
    cv: float = 1.0
    adapters: int = 0
    popularity: str = "uniform"
    prompt: tuple[int, int] = (8, 96)
    generated: tuple[int, int] = (32, 64)
    shared: float = 0.0
    vocabulary: int = 2048
    seed: int = 42


def names(workload: Workload) -> Iterator[str]:
    """The adapter of each request."""
    kind, _, number = workload.popularity.partition(":")
    n, drawn = workload.adapters, random.Random(f"{workload.seed} adapters {workload.popularity}")
    weights = list(accumulate((k + 1) ** -float(number or 1) for k in range(n)))
    for i in range(workload.requests):
        index = {
            "uniform": lambda: drawn.randrange(n),
            "zipf": lambda: drawn.choices(range(n), cum_weights=weights)[0],
            "power": lambda: int(n * drawn.random() ** (1 / float(number or 1))),
            "identical": lambda: 0,
            "distinct": lambda i=i: i % n,
        }
        if kind not in index:
            raise SystemExit(f"--popularity: {workload.popularity!r} is none of {', '.join(index)}")
        yield f"a{index[kind]()}" if n else ""


def calls(workload: Workload) -> list[Call]:
    """The requests, in order of time; equal workloads give equal ones."""
    drawn, now, found = random.Random(workload.seed), 0.0, []
    shape = 1 / workload.cv**2
    for name in names(workload):
        now += drawn.gammavariate(shape, 1 / (shape * workload.rate))
        length = drawn.randint(*workload.prompt)
        tokens = [drawn.randrange(16, workload.vocabulary) for _ in range(length)]
        common = int(length * workload.shared)
        own = random.Random(f"{workload.seed} {name}")
        tokens[:common] = [own.randrange(16, workload.vocabulary) for _ in range(common)]
        found.append(Call(now, name, tokens, drawn.randint(*workload.generated)))
    return found


def write(path: Path, workload: Workload, found: Iterable[Call]) -> None:
    """A trace: the workload in the first line, a request in each other one."""
    lines = [{"workload": asdict(workload)}, *(call._asdict() for call in found)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def read(path: Path) -> list[Call]:
    """The requests of a trace."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Call(**line) for line in lines if "workload" not in line]
