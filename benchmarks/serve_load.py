"""Loading adapters for serving: from disk to the host and beside the base, over the time to read the bytes; and names.

    python benchmarks/serve_load.py
    python benchmarks/serve_load.py --hidden 256 --layers 2 --ranks 4 --folders 100     # to check the script

A Llama of the 1B's shapes, whose weights are never touched, and plain LoRA on all linear layers, saved by lorary (with
its digests, which are compared) and as PEFT alone has it. Reading is `Path.read_bytes`, from the page cache and from
the disk. Then a root with many small adapters: listing them, listing them again, finding and leasing one. Linux only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from rich.console import Console
from rich.progress import track
from transformers import LlamaConfig, LlamaForCausalLM

import lorary
from cases import MiB, machine, new_table
from lorary.adapters.save_load import load_adapter, save_adapter
from lorary.serve.pool.adapter_root import AdapterRoot
from lorary.serve.pool.arena import PlainArena
from lorary.serve.pool.loader import Loader
from lorary.serve.pool.pool import Pool
from lorary.serve.pool.registry import Registry


def untouched(hidden: int, layers: int) -> Any:
    """A base in bfloat16 of zeros, whose memory the system has not given yet."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=max(hidden // 256, 1),
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    tensors = {
        name: torch.from_numpy(numpy.zeros(t.shape, numpy.int16)).view(torch.bfloat16)
        for name, t in model.state_dict().items()
    }
    model.load_state_dict(tensors, assign=True)
    model.model.rotary_emb.inv_freq = torch.ones(hidden // 64 // 2)
    return model.requires_grad_(False).eval()


def write(base: Any, folder: Path, rank: int) -> None:
    """An adapter with random factors in bfloat16."""
    lorary.attach(base, lorary.plan(base, lorary.method("lora", r=rank, alpha=2 * rank)))
    adapter = lorary.Adapter.of(base)
    lorary.detach(base)
    tensors = {
        site: {role: (torch.randn(t.shape) * 0.02).bfloat16() for role, t in roles.items()}
        for site, roles in adapter.tensors.items()
    }
    save_adapter(dataclasses.replace(adapter, tensors=tensors), folder, model=base)


def read(folder: Path) -> bytes:
    """The bytes of the tensors' file."""
    return (folder / "adapter_model.safetensors").read_bytes()


def forget(folder: Path) -> None:
    """Let the system drop a folder's files from its page cache. Linux only."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of a call, and those in which this thread computed."""
    start, computed = time.perf_counter(), time.thread_time()
    kept = call()
    seconds = time.perf_counter() - start, time.thread_time() - computed
    del kept  # not within the time
    return seconds


def loads(base: Any, folder: Path, repeats: int) -> dict[str, Any]:
    """Milliseconds of each step, the least of all repeats: the machine's own noise only adds."""
    loader, seconds = Loader(base), dict[str, list[tuple[float, float]]]()
    flat = loader.load(folder, "a").flat
    pool = Pool(PlainArena(2 * flat.bytes + 2**20), host_bytes=4 * flat.bytes + 2**20)
    steps: dict[str, Callable[[], Any]] = {
        "read": lambda: read(folder),
        "load_adapter": lambda: load_adapter(folder, model=base),
        "to the host": lambda: loader.load(folder, "a"),
        "beside the base": lambda: pool.bring("a"),
    }
    for _ in range(repeats):
        pool.put("a", flat)
        for what, call in steps.items():
            seconds.setdefault(what, []).append(timed(call))
        for what in ("read", "to the host"):
            forget(folder)
            seconds.setdefault(f"{what}, from the disk", []).append(timed(steps[what]))
        pool.release("a")
        pool.unhold("a")
        pool.drop("a")
        pool.make_room(1)
    least = {what: 1e3 * min(wall for wall, _ in s) for what, s in seconds.items()}
    computed = {what: 1e3 * min(cpu for _, cpu in s) for what, s in seconds.items()}
    over = {what: ms / least["read, from the disk" if "disk" in what else "read"] for what, ms in least.items()}
    return {"bytes": flat.bytes, "ms": least, "ms_computed": computed, "over_reading": over}


def names(base: Any, root: Path, count: int) -> dict[str, float]:
    """Milliseconds to list and to find adapters among so many folders."""
    write(base, root / "a0", 1)
    for i in range(1, count):
        (root / f"a{i}").mkdir()
        for file in (root / "a0").iterdir():
            (root / f"a{i}" / file.name).hardlink_to(file)
    time.sleep(2.1)  # a root that has just changed is looked through again
    registry = Registry(Pool(PlainArena(2**24), host_bytes=2**24), Loader(base), root=AdapterRoot(root), recheck=0.0)
    first, again = timed(registry.cards)[0], timed(registry.cards)[0]
    lease = registry.lease("a1")
    lease.future.result()
    found = [timed(lambda i=i: registry.root.find(f"a{i}"))[0] for i in range(count)]  # type: ignore[misc, union-attr]
    leased = [timed(lambda: registry.lease("a1").release())[0] for _ in range(1000)]
    return {
        "listed": 1e3 * first,
        "listed again": 1e3 * again,
        "found": 1e3 * sum(found) / len(found),
        "leased, in memory": 1e3 * sorted(leased)[500],
    }


def main() -> None:
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--hidden", type=int, default=2048)
    made.add_argument("--layers", type=int, default=16)
    made.add_argument("--ranks", default="8,32,128")
    made.add_argument("--repeats", type=int, default=9)
    made.add_argument("--folders", type=int, default=10_000)
    made.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "serve_load.json")
    arguments = made.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base, found = untouched(arguments.hidden, arguments.layers), {}
    with tempfile.TemporaryDirectory() as temporary:
        for rank in track([int(r) for r in arguments.ranks.split(",")], "loading"):
            ours, theirs = Path(temporary, f"lorary-{rank}"), Path(temporary, f"peft-{rank}")
            write(base, ours, rank)
            shutil.copytree(ours, theirs, ignore=shutil.ignore_patterns("lorary.json"))
            for form, folder in (("lorary", ours), ("PEFT", theirs)):
                found[f"{form}, rank {rank}"] = loads(base, folder, arguments.repeats)
        root = Path(temporary, "root")
        root.mkdir()
        listed = names(base, root, arguments.folders)
    table = new_table("milliseconds (over reading the bytes)", "MiB", *next(iter(found.values()))["ms"])
    for name, row in found.items():
        cells = [f"{ms:.1f} ({row['over_reading'][what]:.2f})" for what, ms in row["ms"].items()]
        table.add_row(name, f"{row['bytes'] / MiB:.1f}", *cells)
    Console().print(table)
    Console().print({what: round(ms, 4) for what, ms in listed.items()})
    result = {"machine": machine(arguments), "loads": found, "names_ms": listed}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
