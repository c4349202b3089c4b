"""`lorary check` and `lorary verify` against a real vLLM: run by hand, since it needs a server in its own environment.

    python -m tests.outside.vllm_verdicts base FOLDER          writes a base that vLLM's attention on a CPU takes
    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 python -m vllm.entrypoints.openai.api_server --model FOLDER \
        --served-model-name base --dtype float32 --max-model-len 64 --enable-lora --max-cpu-loras 40
    python -m tests.outside.vllm_verdicts run FOLDER http://localhost:8000

Every folder is checked, then loaded by the server, and its log-probabilities are compared with the adapter's own. Ends
with 1 if a verdict differs from what the server does.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tests.adapters.readers.cases import Case, edited, ours, theirs
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lorary
from lorary import builtin
from lorary.analysis.verify.observed import distance, our_values, probe_ids, their_values
from lorary.analysis.verify.server import Server

TOKENIZER = builtin.load_tokenizer()


def write_base(folder: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 4, "max_position_embeddings": 128}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.08, "bos_token_id": None}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENIZER), **sizes, **heads)).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)


def cases(model: Any) -> dict[str, Callable[[Path], Case]]:
    def base() -> Any:
        return copy.deepcopy(model)

    def made(**options: Any) -> Callable[[Path], Case]:
        return theirs(base=base, **options)

    return {
        "LoRA": ours("lora", base=base),
        "rsLoRA": ours("rslora", base=base),
        "DoRA": ours("dora", base=base),
        "ranks": ours("lora", base=base, ranks={"*down_proj": 3}),
        "alphas": ours("lora", base=base, alphas={"*down_proj": 3.0}),
        "PiSSA, exported": ours("pissa", base=base, how="export"),
        "MELoRA, exported": ours("melora", base=base, how="export", r=1, n=2),
        "VeRA": ours("vera", base=base, r=4),
        "AdaLoRA": ours("adalora", base=base, r=8),
        "embeddings": ours("lora", base=base, targets=["embedding", "attention-qv"]),
        "norms": ours("lora", base=base, full=("*norm*",)),
        "patterns": made(use_rslora=True, rank_pattern={"v_proj": 4}, alpha_pattern={"0.mlp.down_proj": 3}),
        "a pattern of targets": made(target_modules=r".*\.(q_proj|v_proj)"),
        "PiSSA of PEFT": made(init_lora_weights="pissa"),
        "biases beside B": made(lora_bias=True),
        "a head in full": made(modules_to_save=["lm_head"]),
        "an adapted head": made(target_modules=["q_proj", "v_proj", "lm_head"]),
        "trained tokens": made(trainable_token_indices=[5, 7]),
        "aLoRA": made(alora_invocation_tokens=[5]),
        "some layers": made(layers_to_transform=[1]),
        "q alone": made(target_modules=["q_proj"]),
        "k and up alone": made(target_modules=["k_proj", "up_proj"]),
        "LoHa": made(kind="LoHaConfig", r=2, target_modules=["q_proj"]),
        "rank 64": made(r=64, target_modules=["q_proj", "v_proj"]),
        "fewer targets": edited(made(), target_modules=["q_proj"]),
        "no alpha": edited(made(lora_alpha=8), lora_alpha=None),
        "no type": edited(made(), peft_type=None),
        "another rank": edited(made(), r=4),
    }


def served(url: str, name: str, folder: Path, adapted: Any) -> tuple[str, str]:
    """What the server does with a folder, and how far from the adapted model it is, or what it says."""
    try:
        post(url, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder.resolve())})
    except urllib.error.HTTPError as error:
        return "rejected", error.read().decode()[:120]
    server = Server(url, TOKENIZER, "base", name)
    several = [one for ids in probe_ids(TOKENIZER)[:3] for one in server.observe(ids, adapted=True)]
    post(url, "/v1/unload_lora_adapter", {"lora_name": name})
    far = distance(their_values(several), our_values(adapted, several))
    return "accepted" if far < 1e-4 else "miscomputed", f"{far:.2g} nats"


def post(url: str, path: str, body: dict[str, Any]) -> None:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url + path, data=json.dumps(body).encode(), headers=headers)
    urllib.request.urlopen(request, timeout=300).close()


def run(base: Path, url: str) -> int:
    model, wrong = AutoModelForCausalLM.from_pretrained(base), 0
    for name, make in cases(model).items():
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "adapter"
            case = make(folder)
            (verdict,) = lorary.check(folder, "vllm", model=model)
            ran, note = served(url, name, folder, case.model)
        wrong += ran != verdict.outcome
        print(f"{name:22} check: {verdict.outcome:12} vLLM: {ran:12} {note}", flush=True)
    print("no verdict differs" if not wrong else f"{wrong} verdicts differ")
    return int(bool(wrong))


if __name__ == "__main__":
    if sys.argv[1] == "base":
        write_base(Path(sys.argv[2]))
    else:
        sys.exit(run(Path(sys.argv[2]), sys.argv[3]))
