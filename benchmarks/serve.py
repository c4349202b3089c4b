"""Serving: throughput and latency by the number of adapters, beside the base alone, PEFT and vLLM, in one run.

    python benchmarks/serve.py --quick                                   # to check the script
    python benchmarks/serve.py --full --vllm-python ENVIRONMENT/bin/python
    python benchmarks/serve.py --full --base random --out serve-random.json   # a random Llama, where compute counts

Closed loop: as many requests as `--concurrency` are in flight, and the next one follows the first that ends. Every row
gets the same requests, other adapters; rows take turns, and ratios are within a turn. The requests of each turn are
new, so that adapters are loaded from disk as they are asked for. Then an open loop at 60, 75 and 90 % of what the
closed one has reached, and over HTTP our server beside vLLM's. PEFT's rows are batches of `generate`: one adapter at a
time (`set_adapter`), or mixed (`adapter_names`).

The figures are written after every turn of a row and every other part, so that a run that is cut off leaves what it has
measured, with the ratios of the turns so far; `complete` says whether it reached its end, `seconds` when each part was
written last. On a CPU with two cores --quick takes a minute. A run of 96 requests and 4 repeats took 13 minutes,
10 for the closed loop and 3 for the rest; the defaults make twice the requests and a turn more.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

import serve_peers as peers
from cases import MiB, machine, ratio
from lorary.analysis.svg import line, style, to_svg
from lorary.files.atomic import atomic_file
from serve_replay import Answer, closed_loop, figures, in_process, open_loop, over_http
from serve_workload import Call, Workload, calls, write
from switching import resident

Measured = tuple[list[Answer], float]
POPULARITIES = {"uniform": "uniform", "Zipf": "zipf:1.0"}
SLO = (0.5, 0.1)  # seconds to the first token, and for each other


@dataclasses.dataclass
class Row:
    """One way of serving.

    Args:
        name: of the row.
        adapters: their number, and their popularity.
        serve: serves calls.
        requests: of a turn.
        engine: if it is one of ours.
        turns: the figures of each turn.
    """

    name: str
    adapters: int
    popularity: str
    serve: Callable[[Sequence[Call]], Measured]
    requests: int
    engine: Any = None
    turns: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def key(self) -> str:
        popularity = next(name for name, value in POPULARITIES.items() if value == self.popularity)
        return f"{self.name}, n = {self.adapters}, {popularity}" if self.adapters > 1 else self.name

    def turn(self, arguments: argparse.Namespace, seed: int, *, counts: bool = True) -> list[Answer]:
        """Serve the requests of a turn; its figures are kept if it counts."""
        work = workload(arguments, self.adapters, self.popularity, self.requests, seed)
        before = self.engine.statistics() if self.engine else {}
        answers, seconds = self.serve(calls(work))
        found = figures(answers, seconds, SLO)
        if self.engine:
            after = self.engine.statistics()
            found |= {name: after[name] - before[name] for name in ("loads", "evictions")}
            asked = sum(bool(answer.call.adapter) for answer in answers)
            found["hit_rate"] = 1 - found["loads"] / asked if asked else None
            found |= {name: after[name] for name in ("adapter_bytes", "kv_bytes", "host_bytes")}
        if counts:
            self.turns.append(found | {"resident_bytes": resident()})
        return answers


class Results:
    """What has been measured so far, in a file that is whole at any time.

    Args:
        path: of the file, which is replaced.
        arguments: of the run.
    """

    def __init__(self, path: Path, arguments: argparse.Namespace) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._begun = path, time.perf_counter()
        self.parts: dict[str, Any] = {"machine": machine(arguments), "complete": False, "seconds": {}}
        self.keep()

    def keep(self, **parts: Any) -> None:
        """Write these parts beside those there are, and the seconds since the start."""
        seconds = round(time.perf_counter() - self._begun, 1)
        self.parts |= parts | {"seconds": self.parts["seconds"] | dict.fromkeys(parts, seconds)}
        with atomic_file(self.path) as file:
            file.write(json.dumps(self.parts, indent=2).encode() + b"\n")


def workload(arguments: argparse.Namespace, adapters: int, popularity: str, requests: int, seed: int) -> Workload:
    """The workload of a turn."""
    return Workload(
        requests,
        adapters=adapters,
        popularity=popularity,
        prompt=tuple(arguments.prompt),
        generated=tuple(arguments.generated),
        shared=arguments.shared,
        cv=arguments.cv,
        seed=seed,
    )


def timed(serve: Callable[..., list[Answer]], concurrency: int) -> Callable[[Sequence[Call]], Measured]:
    """PEFT's batches, with their time; its tokens have none."""

    def measured(found: Sequence[Call]) -> Measured:
        start = time.perf_counter()
        answers = serve(found, concurrency)
        return answers, time.perf_counter() - start

    return measured


def rows(arguments: argparse.Namespace, base: Path, adapters: Sequence[Path], stack: ExitStack) -> Iterator[Row]:
    """The rows of the closed loop, in process."""
    n, concurrency = arguments.requests, arguments.concurrency

    def ours(name: str, engine: Any, count: int, popularity: str = "uniform") -> Row:
        return Row(name, count, popularity, lambda c: closed_loop(in_process(engine), c, concurrency), n, engine)

    def started(engine: Any) -> Any:
        stack.callback(engine.stop)
        return engine

    yield ours("base", started(peers.engine(base, None, arguments)), 0)
    merged = peers.merged(base, adapters[0])
    yield ours("merged", started(peers.engine(base, None, arguments, merged)), 0)
    engine = started(peers.engine(base, adapters[0].parent, arguments))
    yield ours("no row with an adapter", engine, 0)
    mixed, (switched,) = arguments.mixed, arguments.switched
    for count in sorted({*arguments.counts, *mixed, switched} - {0}):
        for popularity in POPULARITIES.values() if count in arguments.counts and count > 1 else ["uniform"]:
            yield ours("lorary", engine, count, popularity)
    some = arguments.peft_requests
    for count in mixed:
        mixing = peers.InPEFT(base, adapters[:count]).mixed
        yield Row("PEFT, mixed", count, "uniform", timed(mixing, concurrency), some)
    switching = peers.InPEFT(base, adapters[:switched]).switching
    yield Row("PEFT, switching", switched, "uniform", timed(switching, concurrency), some)


def in_turns(found: Sequence[Row], arguments: argparse.Namespace, results: Results) -> None:
    """One turn to warm up, then the measured ones, in an order that turns."""
    count = len(found)
    order = [(turn, found[(turn + i) % count]) for turn in range(arguments.repeats + 1) for i in range(count)]
    for turn, row in track(order, "closed loop"):
        row.turn(arguments, arguments.seed + turn, counts=turn > 0)
        results.keep(closed_loop={row.key: row.turns for row in found}, ratios=compared(found))


def opened(row: Row, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Latency by load, as far as it is measured: shares of the requests a second that the closed loop has reached."""
    most = statistics.median(turn["requests_per_second"] for turn in row.turns)
    found = {}
    for share in (0.6, 0.75, 0.9):
        work = workload(arguments, row.adapters, row.popularity, row.requests, arguments.seed + 100)
        work = dataclasses.replace(work, rate=most * share)
        found[f"{share:.0%}"] = figures(*open_loop(in_process(row.engine), calls(work)), SLO)
        yield found


def by_server(
    arguments: argparse.Namespace, base: Path, adapters: Sequence[Path]
) -> Iterator[dict[str, list[dict[str, Any]]]]:
    """The turns so far of our server beside vLLM's, with the same eight adapters."""
    chosen = [adapter for i, adapter in enumerate(adapters) if arguments.ranks[i % len(arguments.ranks)] == 16][:8]
    if not chosen:
        raise SystemExit("--ranks: the servers are compared with adapters of rank 16, and there is none")
    with ExitStack() as stack:
        found = {"lorary": stack.enter_context(peers.our_server(base, adapters[0].parent, arguments))}
        if arguments.vllm_python:
            server = peers.vllm_server(arguments.vllm_python, base, chosen, 16, arguments)
            found["vLLM"] = stack.enter_context(server)
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in found}
        for turn in track(range(arguments.repeats + 1), "over HTTP"):
            work = workload(arguments, len(chosen), "uniform", arguments.requests, arguments.seed + turn)
            named = [call._replace(adapter=chosen[int(call.adapter[1:])].name) for call in calls(work)]
            for name, url in found.items():
                turns[name].append(figures(*closed_loop(over_http(url, "base"), named, arguments.concurrency), SLO))
                yield {name: steps[1:] for name, steps in turns.items()}


def compared(found: Sequence[Row]) -> dict[str, list[float]]:
    """The ratios of throughput that are asked for: quartiles over the turns that both rows have had, if two or more."""
    by = {row.key: [turn["tokens_per_second"] for turn in row.turns] for row in found}

    def over(a: str, b: str) -> dict[str, list[float]]:
        both = min(len(by.get(a, ())), len(by.get(b, ())))
        return {f"{a} / {b}": ratio(by[a][:both], by[b][:both])} if both >= 2 else {}

    result = over("no row with an adapter", "base") | over("lorary", "base") | over("lorary", "merged")
    for name in by:
        if name.startswith("lorary, "):
            result |= over(name, "lorary") | over(name, name.replace("lorary,", "PEFT, mixed,"))
            result |= over(name, name.replace("lorary,", "PEFT, switching,"))
    return result


def picture(found: Sequence[Row]) -> str:
    """Throughput over the number of adapters."""
    title = "Throughput by the number of adapters"
    with style():
        figure = Figure(figsize=(7.2, 3.6))
        axes, words = figure.add_subplot(), []
        lines = [("lorary", name) for name in POPULARITIES] + [
            ("PEFT, mixed", "uniform"),
            ("PEFT, switching", "uniform"),
        ]
        for i, (name, popularity) in enumerate(lines):
            points = {
                row.adapters: statistics.median(turn["tokens_per_second"] for turn in row.turns)
                for row in found
                if row.name == name and (row.popularity == POPULARITIES[popularity] or row.adapters == 1)
            }
            label = f"{name}, {popularity}" if name == "lorary" else name
            axes.plot(list(points), list(points.values()), label=label, **line(i))
            words.append(f"{label}: " + ", ".join(f"{n} {rate:.0f}" for n, rate in points.items()))
        base = statistics.median(turn["tokens_per_second"] for turn in found[0].turns)
        axes.axhline(base, color="#808080", linewidth=0.9, linestyle=":", label="base alone")
        axes.set(title=title, xlabel="adapters", ylabel="tokens a second", xscale="log", ylim=(0, None))
        ticks = sorted({row.adapters for row in found} - {0})
        axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
        axes.minorticks_off()
        axes.legend()
        return to_svg(figure, title, f"base alone {base:.0f}; " + "; ".join(words))


def report(result: Mapping[str, Any], found: Sequence[Row]) -> None:
    """The tables."""
    columns = ("tokens/s", "TTFT ms, p50", "p99", "TPOT ms, p50", "loads", "failed")
    table = Table("row", *columns, title=f"closed loop, {result['machine']['settings']['concurrency']} at a time")

    def add(name: str, turns: Sequence[dict[str, Any]]) -> None:
        middle = lambda get: statistics.median(map(get, turns))  # noqa: E731
        cells = [middle(lambda t: t["tokens_per_second"]), middle(lambda t: t["ttft_ms"]["p50"])]
        cells += [middle(lambda t: t["ttft_ms"]["p99"]), middle(lambda t: t["tpot_ms"]["p50"])]
        counts = [sum(t.get(what, 0) for t in turns) for what in ("loads", "failed")]
        table.add_row(name, *(f"{cell:,.1f}" if cell else "-" for cell in cells), *map(str, counts))

    for row in found:
        add(row.key, row.turns)
    for name, turns in result["over_http"].items():
        add(f"{name}, over HTTP, n = 8", turns)
    Console().print(table)
    Console().print({name: [round(x, 3) for x in value] for name, value in result["ratios"].items()})
    table = Table("open loop", "load", "req/s", "TTFT ms, p50", "p99", "ITL ms, p50", "p99", "in time")
    for name, loads in result["open_loop"].items():
        for load, f in loads.items():
            times = [f[what][part] for what in ("ttft_ms", "itl_ms") for part in ("p50", "p99")]
            cells = (f"{f['requests_per_second']:.1f}", *(f"{ms:.1f}" for ms in times), f"{f['slo']:.0%}")
            table.add_row(name, load, *cells)
    Console().print(table)
    Console().print({key: result[key] for key in ("loading", "parity_with_peft", "adapter_mib")})


def options() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--quick", action="store_true", help="few adapters, few requests: to check the script")
    made.add_argument("--full", action="store_true", help="everything: the default")
    made.add_argument("--base", default="builtin:base", choices=["builtin:base", "random"])
    made.add_argument("--hidden", type=int, default=1024, help="of the random Llama")
    made.add_argument("--layers", type=int, default=10, help="of the random Llama")
    made.add_argument("--counts", type=int, nargs="+", help="default: to 2,000, or 256 of the random Llama")
    made.add_argument("--ranks", type=int, nargs="+", default=[16, 8, 4], help="in turn")
    made.add_argument("--mixed", type=int, nargs="*", default=[4, 8, 32], help="adapters of PEFT's mixed batches")
    made.add_argument("--switched", type=int, nargs=1, default=[64], help="adapters that PEFT switches between")
    made.add_argument("--requests", type=int, help="of a turn: 192, or 64 of the random Llama")
    made.add_argument("--peft-requests", type=int, help="of a turn of PEFT: a third")
    made.add_argument("--concurrency", type=int, default=32)
    made.add_argument("--repeats", type=int, default=5)
    made.add_argument("--prompt", type=int, nargs=2, default=[8, 96], help="tokens, least and most")
    made.add_argument("--generated", type=int, nargs=2, default=[32, 64], help="tokens, least and most")
    made.add_argument("--shared", type=float, default=0.0, help="share of a prompt common to an adapter's requests")
    made.add_argument("--cv", type=float, default=1.0, help="of the intervals of the open loop")
    made.add_argument("--budget", type=int, default=1024, help="MiB of adapters, keys and values")
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    made.add_argument("--seed", type=int, default=42)
    made.add_argument("--vllm-python", help="the Python of an environment with vLLM, to compare with")
    made.add_argument("--no-http", action="store_true", help="leave the servers out")
    made.add_argument("--trace", type=Path, help="write the open loop's requests at n = 64 as JSON lines, and stop")
    made.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "serve.json")
    found = made.parse_args()
    if found.repeats < 2:
        made.error("--repeats must be at least 2: ratios have an interval")
    small = found.base == "builtin:base"
    found.counts = found.counts or [0, 1, 8, 64, 256, *([1000, 2000] if small else [])]
    found.requests = found.requests or (192 if small else 64)
    found.peft_requests = found.peft_requests or found.requests // 3
    if found.quick:
        quick = {"counts": [0, 1, 8, 24], "mixed": [4], "switched": [8], "requests": 24, "peft_requests": 12}
        vars(found).update(quick, repeats=2, concurrency=8, generated=[8, 16], budget=256)
    found.device, found.dtype = torch.device("cpu"), "float32"
    torch.set_num_threads(found.threads)
    return found


def measure_beside(
    found: Sequence[Row], arguments: argparse.Namespace, base: Path, adapters: Sequence[Path], results: Results
) -> None:
    """What is measured in process after the closed loop."""
    ours = [row for row in found if row.name == "lorary"]
    few = min(ours, key=lambda row: abs(row.adapters - 8))
    loads: dict[str, Any] = {}
    for row in (found[0], few, ours[-2]):
        for shares in opened(row, arguments):
            loads[row.key] = shares
            results.keep(open_loop=loads)
    answers = few.turn(arguments, arguments.seed + 200, counts=False)[: arguments.peft_requests]
    results.keep(parity_with_peft=peers.parity(base, adapters[: few.adapters], answers))
    results.keep(loading=peers.loading_over_reading(few.engine, adapters[:21]))
    results.keep(adapter_mib=(adapters[0] / "adapter_model.safetensors").stat().st_size / MiB)


def main() -> None:
    arguments = options()
    if arguments.trace:
        work = workload(arguments, 64, "uniform", arguments.requests, arguments.seed)
        write(arguments.trace, work, calls(work))
        return
    results = Results(arguments.out, arguments)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        base = peers.base_folder(arguments.base, Path(folder) / "base", arguments)
        most = max([*arguments.counts, *arguments.mixed, *arguments.switched, 24])
        adapters = peers.make_adapters(base, Path(folder), most, arguments.ranks)
        found = list(rows(arguments, base, adapters, stack))
        in_turns(found, arguments, results)
        measure_beside(found, arguments, base, adapters, results)
        stack.close()
        results.keep(over_http={})
        for turns in [] if arguments.no_http else by_server(arguments, base, adapters):
            results.keep(over_http=turns)
    results.keep(complete=True)
    report(results.parts, found)
    arguments.out.with_suffix(".svg").write_text(picture(found), encoding="utf-8")


if __name__ == "__main__":
    main()
