"""llama.cpp as a client of `lorary export --to gguf`: greedy tokens equal to Transformers' with lorary, in fp32.

    python -m tests.clients.llama_cpp prepare FOLDER LLAMA_CPP [MODEL_TYPE ...]   in lorary's environment
    python -m tests.clients.llama_cpp run FOLDER                                  in one with llama-cpp-python

LLAMA_CPP is llama.cpp's source, whose own `convert_hf_to_gguf.py` makes the bases; the source distribution of
llama-cpp-python has it in vendor/llama.cpp. Every architecture that `lorary export --to gguf` accepts has a row here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.clients import cases

# Converts a base without its tokenizer, of which llama.cpp needs the size alone here.
_CONVERT = """
import pathlib, sys
source, model, out = sys.argv[1:]
sys.path[:0] = [source, source + "/gguf-py"]
import convert_hf_to_gguf
from conversion import get_model_class
from conversion.base import ModelBase, ModelType, get_model_architecture
settings = ModelBase.load_hparams(pathlib.Path(model), False)
cls = get_model_class(get_model_architecture(settings, ModelType.TEXT))
parameters = cls.set_gguf_parameters
def with_size(self):
    parameters(self)
    if not any(key.endswith(".vocab_size") for key in self.gguf_writer.kv_data[0]):
        self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])
cls.set_vocab = lambda self: self._set_vocab_none()
cls.set_gguf_parameters = with_size
sys.argv = ["convert", model, "--outfile", out, "--outtype", "f32"]
convert_hf_to_gguf.main()
"""

# model_type -> what its configuration needs at this size, and the targets of its adapter
_UNTIED = {"tie_word_embeddings": False}
_EXPERTS = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
BASES: dict[str, dict[str, Any]] = {
    "llama": _UNTIED,
    "mistral": _UNTIED | {"sliding_window": None},
    "qwen2": _UNTIED,
    "qwen3": _UNTIED | {"head_dim": 32},
    "qwen3_moe": _UNTIED
    | {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
    "cohere": {"logit_scale": 0.5},
    "gemma": {"head_dim": 16, "hidden_activation": "gelu_pytorch_tanh"},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_ctx": 128},
    "glm4": _UNTIED | {"head_dim": 16},
    "granite": _UNTIED | {"embedding_multiplier": 1.5, "residual_multiplier": 0.8, "logits_scaling": 1.3},
    "mixtral": _UNTIED | {"num_local_experts": 4, "sliding_window": None},
    "olmo": _UNTIED,
    "olmo2": _UNTIED,
    "phi3": _UNTIED,
    "smollm3": _UNTIED | {"no_rope_layers": [1, 1]},
    "starcoder2": {"use_bias": True},
    "apertus": _UNTIED,
    "arcee": _UNTIED,
    "ernie4_5": _UNTIED | {"head_dim": 16},
    "exaone4": _UNTIED | {"head_dim": 16},
    "gpt_bigcode": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "hunyuan_v1_dense": _UNTIED | {"head_dim": 16},
    "nemotron": _UNTIED,
    "olmo3": _UNTIED,
    "phi": _UNTIED | {"num_key_value_heads": 4, "intermediate_size": 256},
    "qwen2_moe": _UNTIED | {"num_experts": 4, "num_experts_per_tok": 2, **_EXPERTS, "norm_topk_prob": False},
    "seed_oss": _UNTIED | {"head_dim": 16},
    "stablelm": _UNTIED | {"use_qkv_bias": True},
}
METHODS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "LoRA": (("lora",), {"r": 4, "alpha": 12}),
    "rsLoRA": (("rslora",), {"r": 4, "alpha": 6}),
    "PiSSA": (("pissa",), {"r": 4}),
    "MELoRA": (("melora",), {"r": 4}),
    "VeRA": (("vera",), {"r": 8}),
    "MultiLoRA": (("multilora",), {"r": 4}),
    "unequal ranks": (("lora",), {"r": 4, "ranks": {"k_proj": 2, "down_proj": 6}}),
    "LongLoRA": (("longlora", "lora"), {"r": 4, "length": 512}),
}


def prepare(folder: Path, source: Path) -> None:
    """Write the bases, the exported adapters, and what each must compute."""
    found = []
    for model_type in sys.argv[4:] or BASES:
        found += list(_cases(folder, source, model_type))
    cases.write(folder, found)


def _cases(folder: Path, source: Path, model_type: str) -> Iterator[dict[str, Any]]:
    from lorary.adapters.export.gguf_architectures import ARCHITECTURES

    here = folder / model_type
    model = cases.base(model_type, here / "base", **BASES[model_type])
    vocabulary = {"model": {"vocab": {str(i): i for i in range(cases.SIZES["vocab_size"])}}, "added_tokens": []}
    (here / "base" / "tokenizer.json").write_text(json.dumps(vocabulary), encoding="utf-8")  # Gemma's converter counts
    file = here / "base.gguf"
    command = [sys.executable, "-c", _CONVERT, str(source), str(here / "base"), str(file)]
    converted = subprocess.run(command, capture_output=True, text=True, check=False)
    if converted.returncode:
        raise SystemExit(f"{model_type}: {converted.stderr[-2000:]}")
    name = str(file.relative_to(folder))
    yield {"case": f"{model_type}, base alone", "model": name, "base": True, **cases.expected(model)}
    for title, (methods, options) in METHODS.items():
        yield _adapted(folder, model_type, name, f"{title}", methods, options)
        if model_type != "llama":
            break
    if ARCHITECTURES[model_type].head:
        targets = {"targets": ["embed_tokens", "lm_head"]}
        yield _adapted(folder, model_type, name, "LoRA of embedding and head", ("lora",), {"r": 4} | targets)
    if model_type == "llama":
        yield _adapted(folder, model_type, name, "LoRA in bfloat16", ("lora",), {"r": 4}, dtype="bfloat16")
        yield _adapted(folder, model_type, name, "LoRA in float16", ("lora",), {"r": 4}, dtype="float16")


def _adapted(
    folder: Path,
    model_type: str,
    base: str,
    title: str,
    methods: tuple[str, ...],
    options: dict[str, Any],
    dtype: str = "float32",
) -> dict[str, Any]:
    from lorary.adapters.export.gguf import export_gguf, rope_arguments

    here = folder / model_type / title.replace(" ", "-")
    model, adapter, want = cases.prepared(folder / model_type / "base", methods, here / "adapter", **options)
    export_gguf(adapter, here / "gguf", model=model, dtype=dtype)
    path = str((here / "gguf" / "adapter.gguf").relative_to(folder))
    rope = rope_arguments(adapter)
    scale = {"rope_scale": float(rope[-1])} if rope else {}
    return {"case": f"{model_type}, {title}", "model": base, "adapter": path, **scale, **want}


def _rope(case: dict[str, Any]) -> dict[str, Any]:
    """The arguments of llama-cpp-python that are llama.cpp's `--rope-scaling linear --rope-scale N`."""
    from llama_cpp import LLAMA_ROPE_SCALING_TYPE_LINEAR

    if "rope_scale" not in case:
        return {}
    return {"rope_scaling_type": LLAMA_ROPE_SCALING_TYPE_LINEAR, "rope_freq_scale": 1 / case["rope_scale"]}


def run(folder: Path) -> None:
    """Generate with llama.cpp, and compare."""
    import numpy as np
    from llama_cpp import GGML_TYPE_F32, Llama

    rights, bare = [], {}  # base -> its first logits; it comes before its adapters
    for case in cases.read(folder):
        adapter = str(folder / case["adapter"]) if "adapter" in case else None
        llama = Llama(
            str(folder / case["model"]),
            lora_path=adapter,
            n_ctx=64,
            n_threads=1,
            logits_all=True,
            type_k=GGML_TYPE_F32,  # fp16 by default
            type_v=GGML_TYPE_F32,
            verbose=False,
            **_rope(case),
        )
        llama.eval(cases.PROMPT)
        first = llama.scores[len(cases.PROMPT) - 1].copy()
        want = np.array(case["logits"])
        tokens = [int(first.argmax())]
        while len(tokens) < cases.STEPS:
            llama.eval(tokens[-1:])
            tokens.append(int(llama.scores[llama.n_tokens - 1].argmax()))
        llama.close()
        error, moved = (
            float(np.abs(x - want).max() / np.abs(want).max()) for x in (first, bare.setdefault(case["model"], first))
        )
        rights.append(cases.report(case, tokens, error, moved))
    cases.finish(rights)


if __name__ == "__main__":
    {"prepare": prepare, "run": run}[sys.argv[1]](*map(Path, sys.argv[2:4]))
