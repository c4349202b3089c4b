"""Host memory and time of merging an adapter into a checkpoint of several files: file by file, and in memory.

    python benchmarks/merge_shards.py

A Llama of 0.7 billion parameters with random weights in bf16 is written to a temporary folder as 12 files, and a LoRA
on all of its linear layers is merged into it, each way in a process of its own. Linux only: the peak is the kernel's
high-water mark of resident memory, pages of mapped files included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

from cases import MiB, machine, new_table
from loading import resident
from loading import write as write_base

WAYS = ("file by file", "in memory")


def write(folder: Path, width: int, layers: int, shard: str) -> None:
    """A base with files of at most this size, and an adapter on it with random values."""
    from transformers import LlamaForCausalLM

    import lorary

    write_base(folder / "base", "bfloat16", width, layers, shard)
    model = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=8)))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.02, generator=generator)
    lorary.save(model, folder / "adapter")


def merge(way: str, folder: Path, out: str) -> None:
    """Merge in one of the ways."""
    from transformers import LlamaForCausalLM

    import lorary
    from lorary.adapters import export_merged

    if way == "file by file":
        export_merged(lorary.load_adapter(folder / "adapter"), folder / "base", folder / out)
        return
    model = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    lorary.load(model, folder / "adapter")
    lorary.merge(model)
    model.save_pretrained(folder / out, max_shard_size="115MB")


def measure(way: str, small: str, large: str) -> dict[str, float]:
    """In this process: what merging took, once a small model has loaded everything that loads once."""
    merge(way, Path(small), f"{way} once")
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts again at what is resident now
    before, begun = resident("VmRSS"), time.perf_counter()
    merge(way, Path(large), way)
    return {"seconds": time.perf_counter() - begun, "peak": resident("VmHWM") - before}


def apart(way: str, small: Path, large: Path) -> dict[str, float]:
    """`measure` in a new process."""
    code = (
        f"import json, merge_shards; print(json.dumps(merge_shards.measure({way!r}, {str(small)!r}, {str(large)!r})))"
    )
    env = os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{way}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def different(large: Path) -> int:
    """The number of tensors in which the two results differ."""
    from safetensors.torch import load_file

    found = [
        {n: t for f in sorted((large / way).glob("*.safetensors")) for n, t in load_file(f).items()} for way in WAYS
    ]
    both = found[0].keys() & found[1].keys()
    return len(found[0].keys() ^ found[1].keys()) + sum(not torch.equal(found[0][n], found[1][n]) for n in both)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "merge_shards.json")
    arguments = parser.parse_args()
    table = new_table("merging into a checkpoint", "seconds", "peak, MiB", "files", "largest, MiB", "checkpoint, MiB")
    with tempfile.TemporaryDirectory() as name:
        small, large = Path(name) / "small", Path(name) / "large"
        write(small, 64, 1, "1MB")
        write(large, arguments.width, arguments.layers, "120MB")
        sizes = [file.stat().st_size for file in (large / "base").glob("*.safetensors")]
        layer = 4 * max(32_000 * arguments.width, 11 * arguments.width**2 // 4)
        result: dict[str, object] = {"files": len(sizes), "largest file": max(sizes), "checkpoint": sum(sizes)}
        result["largest layer in fp32"] = layer
        for way in WAYS:
            found = apart(way, small, large)
            result[way] = found
            figures = (found["peak"] / MiB, len(sizes), max(sizes) / MiB, sum(sizes) / MiB)
            table.add_row(way, f"{found['seconds']:.1f}", *(f"{n:.0f}" for n in figures))
        result["tensors that differ"] = different(large)
    Console().print(table)
    print(f"tensors that differ: {result['tensors that differ']}; the largest layer in fp32 has {layer / MiB:.0f} MiB")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"machine": machine(arguments), "merge": result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
