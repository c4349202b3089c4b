"""Host memory, time and error of extracting an adapter from two checkpoints of several files.

    python benchmarks/extract.py

A Llama with random weights in fp32 is written to a temporary folder, and again with a change of rank 8 and a small one
of full rank in every linear layer, as a fine-tune has. Linux only: the peak is the kernel's high-water mark of resident
memory.
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

RANK, VOCABULARY = 8, 16_000


def write(folder: Path, width: int, layers: int, shard: str) -> None:
    """A base and its fine-tune."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base", max_shard_size=shard)
    with torch.no_grad():
        for W in model.parameters():
            if W.dim() == 2:
                out, inp = W.shape
                W.add_(torch.randn(out, RANK) @ torch.randn(RANK, inp) * 1e-3 + torch.randn(out, inp) * 1e-4)
    model.save_pretrained(folder / "tuned", max_shard_size=shard)


def measure(small: str, large: str) -> dict[str, float]:
    """In this process: what extracting took, once a small model has loaded everything that loads once."""
    import lorary

    lorary.extract(Path(small, "base"), Path(small, "tuned"), rank=RANK)
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts again at what is resident now
    before, begun = resident("VmRSS"), time.perf_counter()
    found = lorary.extract(Path(large, "base"), Path(large, "tuned"), rank=RANK)
    seconds, peak = time.perf_counter() - begun, resident("VmHWM") - before
    inexact = sum(not s.exact for s in found.sites)
    adapter = found.adapter.size
    return {
        "seconds": seconds, "peak": peak, "adapter": adapter, "layers": len(found.sites), "randomised": inexact,
        "error": found.error,
    }  # fmt: skip


def apart(small: Path, large: Path) -> dict[str, float]:
    """`measure` in a new process."""
    code = f"import json, extract; print(json.dumps(extract.measure({str(small)!r}, {str(large)!r})))"
    env = os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "extract.json")
    arguments = parser.parse_args()
    table = new_table("extracting an adapter", "files", "MiB", "largest", "peak", "seconds", "error")
    with tempfile.TemporaryDirectory() as name:
        small, large = Path(name) / "small", Path(name) / "large"
        write(small, 64, 1, "1MB")
        write(large, arguments.width, arguments.layers, "60MB")
        sizes = [file.stat().st_size for file in (large / "base").glob("*.safetensors")]
        largest = 4 * max(VOCABULARY * arguments.width, 11 * arguments.width**2 // 4)
        found = apart(small, large)
        result = {"files": len(sizes), "checkpoint": sum(sizes), "largest parameter": largest} | found
        figures = (len(sizes), sum(sizes) / MiB, largest / MiB, found["peak"] / MiB, found["seconds"])
        table.add_row("two checkpoints", *(f"{n:.0f}" for n in figures), f"{found['error']:.2%}")
    Console().print(table)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"machine": machine(arguments), "extract": result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
