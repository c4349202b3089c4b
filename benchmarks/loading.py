"""Host memory and time of loading a base in 4 bits: straight, in full and then quantised, and with bitsandbytes.

    python benchmarks/loading.py

A Llama of 130 million parameters with random weights is written to a temporary folder, and each way loads it in a
process of its own. Linux only: the peak is the kernel's high-water mark of resident memory.
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
from typing import Any

import torch
from rich.console import Console

from cases import MiB, machine, new_table

WAYS = ("straight", "in full, then packed", "bitsandbytes", "as bitsandbytes saved it")


def write(folder: Path, dtype: str, width: int, layers: int, shard: str = "100MB") -> None:
    """A checkpoint of random values in files of at most this size."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32_000, hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02, generator=generator)
    model.save_pretrained(folder, max_shard_size=shard)


def load(way: str, folder: str, dtype: str) -> Any:
    """The model, in one of the ways."""
    import transformers

    import lorary

    if way in ("straight", "as bitsandbytes saved it"):
        return lorary.load_quantized(folder, dtype=dtype)
    kind, words = transformers.AutoModelForCausalLM, {"dtype": getattr(torch, dtype)}
    if way == "in full, then packed":
        return lorary.quantize(kind.from_pretrained(folder, **words))
    packed = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )  # fmt: skip
    return kind.from_pretrained(folder, quantization_config=packed, **words)


def resident(field: str) -> int:
    """Bytes: VmRSS for now, VmHWM for the most since the mark was reset."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.partition(f"{field}:")[2].split()[0])


def measure(way: str, small: str, large: str, dtype: str) -> dict[str, float]:
    """In this process: what loading took, once a small model has loaded everything that loads once."""
    from safetensors import safe_open

    load(way, small, dtype)
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts again at what is resident now
    before, begun = resident("VmRSS"), time.perf_counter()
    model = load(way, large, dtype)
    seconds, peak = time.perf_counter() - begun, resident("VmHWM") - before
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for module in model.modules():  # bitsandbytes keeps its scales beside the module
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            tensors |= {id(t): t for t in (state.absmax, getattr(state.state2, "absmax", None)) if t is not None}
    sizes = []
    for file in Path(large).glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            sizes += [opened.get_tensor(key).nbytes for key in opened.keys()]  # noqa: SIM118 (no mapping)
    return {
        "peak": peak,
        "model": sum(t.nbytes for t in tensors.values()),
        "largest": max(sizes),
        "checkpoint": sum(sizes),
        "seconds": seconds,
    }


def apart(way: str, small: Path, large: Path, dtype: str) -> dict[str, float]:
    """`measure` in a new process, whose allocator gives every large block back at once."""
    code = (
        f"import json, loading; print(json.dumps(loading.measure({way!r}, {str(small)!r}, {str(large)!r}, {dtype!r})))"
    )
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{way}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "loading.json")
    arguments = parser.parse_args()
    columns = ("seconds", "model, MiB", "peak, MiB", "beyond it, MiB", "largest tensor, MiB", "file, MiB")
    table, result = new_table("loading a base in 4 bits", *columns), {}
    for saved, dtype in (("bfloat16", "bfloat16"), ("float32", "bfloat16")):
        with tempfile.TemporaryDirectory() as name:
            small, large = Path(name) / "small", Path(name) / "large"
            write(small, saved, 64, 1)
            write(large, saved, arguments.width, arguments.layers)
            packed = [Path(name) / "small-packed", Path(name) / "large-packed"]
            for way in WAYS:
                if way == WAYS[-1]:
                    for whole, folder in zip((small, large), packed, strict=True):
                        load("bitsandbytes", str(whole), dtype).save_pretrained(folder)
                    small, large = packed
                found = apart(way, small, large, dtype)
                result[f"{saved} as {dtype}, {way}"] = found
                over = found["peak"] - found["model"]
                row = (found["model"], found["peak"], over, found["largest"], found["checkpoint"])
                figures = (f"{n / MiB:.1f}" for n in row)
                table.add_row(f"{saved} as {dtype}, {way}", f"{found['seconds']:.2f}", *figures)
    Console().print(table)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"machine": machine(arguments), "loading": result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
