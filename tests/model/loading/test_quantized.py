"""Bases quantised while they are read: equal to quantising in memory, without ever holding the plain model."""

from __future__ import annotations

import ctypes
import gc
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification, modeling_utils

import lorary
from lorary.errors import ConfigError, FileError, LoraryError
from lorary.layers.bitsandbytes import BnbNF4
from lorary.layers.nf4 import NF4Embedding, NF4Linear
from lorary.model.fingerprint import Fingerprint
from lorary.model.loading import from_pretrained
from lorary.model.loading.quantized import QuantizationConfig
from tests import tiny
from tests.train.resume.processes import forked

linux = pytest.mark.skipif(sys.platform != "linux", reason="the peak of resident memory is asked of Linux's kernel")


def saved(folder: Path, name: str = "LlamaForCausalLM", dtype: str = "float32", **changes: Any) -> Path:
    """A tiny checkpoint in several shards."""
    tiny.seeded(name, **changes).to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="10KB")
    return folder


def in_memory(folder: Path, dtype: str = "float32", storage: lorary.NF4 | None = None) -> Any:
    """What it is compared with: loaded in full, then quantised."""
    return lorary.quantize(AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)), storage)


@pytest.mark.parametrize(
    ("name", "saved_in", "dtype", "changes"),
    [
        ("LlamaForCausalLM", "float32", "float32", {}),
        ("LlamaForCausalLM", "float32", "bfloat16", {}),
        ("LlamaForCausalLM", "float16", "float32", {}),
        ("Qwen2ForCausalLM", "bfloat16", "bfloat16", {"tie_word_embeddings": True}),  # biases
        ("GPT2LMHeadModel", "float32", "float32", {}),  # the transposed layers
        ("MixtralForCausalLM", "float32", "float32", {}),  # experts become one tensor on the way
    ],
)
def test_it_is_what_quantising_in_memory_gives(
    tmp_path: Path, name: str, saved_in: str, dtype: str, changes: dict[str, Any]
) -> None:
    folder = saved(tmp_path / "base", name, saved_in, **changes)
    straight, quantised = lorary.load_quantized(folder, dtype=dtype), in_memory(folder, dtype)
    assert tiny.same(straight.state_dict(), quantised.state_dict())
    assert torch.equal(tiny.logits(straight), tiny.logits(quantised))
    names = [n for n, m in quantised.named_modules() if isinstance(m, NF4Linear)]
    assert names == [n for n, m in straight.named_modules() if isinstance(m, NF4Linear)]
    assert not any("lm_head" in n for n in names)
    assert Fingerprint.of(straight) == Fingerprint.of(quantised)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    assert Fingerprint.of(straight) == Fingerprint.of(plain)


def test_nothing_of_the_loader_stays_on_the_model(tmp_path: Path) -> None:
    folder = saved(tmp_path / "base", "GPT2LMHeadModel")
    straight, quantised = lorary.load_quantized(folder), in_memory(folder)
    assert [sorted(vars(m)) for m in straight.modules()] == [sorted(vars(m)) for m in quantised.modules()]
    assert [m._non_persistent_buffers_set for m in straight.modules()] == [
        m._non_persistent_buffers_set for m in quantised.modules()
    ]
    assert straight.config.to_dict() == quantised.config.to_dict()
    assert not straight.training
    straight.half()  # which Transformers refuses of models that it takes for quantised


def test_a_model_is_saved_under_the_names_of_its_checkpoint(tmp_path: Path) -> None:
    """Transformers keeps a checkpoint's conversions in a private attribute, and 5.24 drops it with the quantiser."""
    folder = tmp_path / "base"
    tiny.seeded("BertForMaskedLM").save_pretrained(folder)
    file = folder / "model.safetensors"
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}  # in BERT's first checkpoints
    weights = {re.sub(r"LayerNorm\.\w+$", lambda end: old[end[0]], name): W for name, W in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    AutoModelForMaskedLM.from_pretrained(folder).save_pretrained(tmp_path / "plain")
    lorary.dequantize(lorary.load_quantized(folder, kind=AutoModelForMaskedLM)).save_pretrained(
        tmp_path / "dequantised"
    )
    plain, dequantised = (load_file(tmp_path / which / "model.safetensors") for which in ("plain", "dequantised"))
    assert any("gamma" in name for name in plain)
    assert dequantised.keys() == plain.keys()


@pytest.mark.parametrize(
    "storage",
    [lorary.NF4(block=128, double=False), lorary.NF4(compute="bfloat16"), lorary.NF4(embeddings=True)],
    ids=str,
)
def test_the_word_says_how(tmp_path: Path, storage: lorary.NF4) -> None:
    folder = saved(tmp_path / "base")
    straight, quantised = lorary.load_quantized(folder, storage), in_memory(folder, storage=storage)
    assert tiny.same(straight.state_dict(), quantised.state_dict())
    assert torch.equal(tiny.logits(straight), tiny.logits(quantised))
    assert isinstance(straight.get_input_embeddings(), NF4Embedding) == storage.embeddings


def test_a_tied_embedding_is_not_quantised(tmp_path: Path) -> None:
    folder = saved(tmp_path / "base", tie_word_embeddings=True)
    model = lorary.load_quantized(folder, lorary.NF4(embeddings=True))
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_only_the_layers_that_are_named(tmp_path: Path) -> None:
    model = lorary.load_quantized(saved(tmp_path / "base"), layers=["model.layers.1.mlp.up_proj"])
    assert [n for n, m in model.named_modules() if isinstance(m, NF4Linear)] == ["model.layers.1.mlp.up_proj"]


def test_transformers_own_classes_load_it_too(tmp_path: Path) -> None:
    folder = saved(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=QuantizationConfig(lorary.NF4()))
    assert torch.equal(tiny.logits(model), tiny.logits(in_memory(folder)))
    headed = lorary.load_quantized(folder, kind=AutoModelForSequenceClassification)  # its new head starts at random
    assert type(headed.score) is nn.Linear
    assert isinstance(headed.model.layers[0].mlp.up_proj, NF4Linear)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_adapters_of_either_fit_the_other(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path / "base", name)
    plan = lorary.plan(tiny.model(name, device="meta"), lorary.method("qlora", "dora", r=2))
    straight = lorary.attach(lorary.load_quantized(folder, layers=plan.quantized), plan, seed=3)
    other = lorary.attach(AutoModelForCausalLM.from_pretrained(folder), plan, seed=3)
    assert tiny.same(straight.state_dict(), other.state_dict())
    lorary.save(tiny.shaken(straight), tmp_path / "straight")
    lorary.save(tiny.shaken(other), tmp_path / "other")
    expected = tiny.logits(straight)
    for adapter in ("straight", "other"):
        for base in (lorary.load_quantized(folder), AutoModelForCausalLM.from_pretrained(folder), in_memory(folder)):
            assert torch.equal(tiny.logits(lorary.load(base, tmp_path / adapter)), expected)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"storage": "nf4"}, "storage: 'nf4' does not quantise\n      hint: pass NF4()"),
        ({"storage": lorary.NF4}, "does not quantise\n      hint: pass NF4()"),
        ({"storage": lorary.NF4(block=63)}, "storage: NF4 has block = 63; it takes a power of two from 32 to 4096"),
        ({"storage": BnbNF4()}, "storage: BnbNF4 quantises models in memory, not checkpoints that are being read"),
        ({"layers": "lm_head"}, "layers: is the string 'lm_head', not a list\n      hint: pass ['lm_head']"),
        (
            {"layers": ["nope", "model.norm"]},
            "model.norm: NF4(block=64, double=True, compute=None, embeddings=False, experts=True) cannot quantise this",
        ),
        ({"layers": 5}, "'int' object is not iterable"),
        ({"kind": "AutoModel"}, "'str' object has no attribute 'from_pretrained'"),
    ],
)
def test_words_that_say_nothing_are_refused(tmp_path: Path, words: dict[str, Any], said: str) -> None:
    tiny.seeded("LlamaForCausalLM").save_pretrained(tmp_path / "base")
    with pytest.raises(LoraryError) as refused:
        lorary.load_quantized(tmp_path / "base", **words)
    assert said in str(refused.value)


@pytest.mark.parametrize("quantised", ["x", [], 5, True])
def test_a_config_that_makes_no_sense_to_transformers_is_told(tmp_path: Path, quantised: Any) -> None:
    tiny.seeded("LlamaForCausalLM").save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantised}))
    with pytest.raises(FileError, match="cannot load the model"):
        lorary.load_quantized(tmp_path / "base")


def test_a_dtype_of_torch_is_a_dtype(tmp_path: Path) -> None:
    tiny.seeded("LlamaForCausalLM").save_pretrained(tmp_path / "base")
    assert lorary.load_quantized(tmp_path / "base", dtype=torch.bfloat16).dtype is torch.bfloat16


def test_what_is_wrong_with_the_weights_is_told_at_once(tmp_path: Path) -> None:
    tiny.seeded("LlamaForCausalLM").save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.0.mlp.up_proj.weight"][1, 2] = float("nan")
    weights["model.layers.1.self_attn.q_proj.weight"][0, 0] = float("inf")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(FileError) as refused:
        lorary.load_quantized(tmp_path / "base")
    assert [p.where for p in refused.value.problems] == [
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
    ]
    assert "NaN, infinite" in str(refused.value)
    del weights["model.layers.0.mlp.up_proj.weight"]
    weights["model.layers.1.self_attn.q_proj.weight"] = torch.zeros(3, 4)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(FileError) as refused:
        lorary.load_quantized(tmp_path / "base")
    lost = "model.layers.0.mlp.up_proj.weight, model.layers.1.self_attn.q_proj.weight"
    assert f"no weights of the right shape for {lost}\n" in str(refused.value)


def test_the_loader_is_put_back_also_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_DEACTIVATE_ASYNC_LOAD", raising=False)
    opened = modeling_utils.safe_open
    with pytest.raises(FileError, match="there is no such folder"):
        lorary.load_quantized(tmp_path / "nothing")
    folder = saved(tmp_path / "base")
    shard = next(iter(folder.glob("*.safetensors")))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(FileError, match="cannot load the model"):
        lorary.load_quantized(folder)
    assert modeling_utils.safe_open is opened
    assert "HF_DEACTIVATE_ASYNC_LOAD" not in from_pretrained.os.environ
    with pytest.raises(ConfigError, match="dtpye"):
        lorary.load_quantized(folder, dtpye="bfloat16")


def test_a_pickle_or_code_is_refused_as_everywhere(tmp_path: Path) -> None:
    folder = saved(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "theirs.Model"}}))
    with pytest.raises(FileError, match="its own Python code"):
        lorary.load_quantized(folder)


# --- memory -----------------------------------------------------------------------------------------------------------


def _resident(field: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0])


def _peak(load: Any, small: Path, folder: Path) -> tuple[int, int]:
    """(bytes of the model, the most bytes that were resident at once while it was loaded)."""

    def work() -> tuple[int, int]:
        ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: what is freed goes back at once
        load(small)  # what is made at first use
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        model = load(folder)
        size = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        return size, _resident("VmHWM") - before

    status, found = forked(work)
    assert status == 0
    size, peak = found
    return size, peak


@linux
def test_the_host_never_holds_more_than_the_quantised_model_and_one_tensor(tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 2, "vocab_size": 256}
    wide, MiB = tiny.model("LlamaForCausalLM", device="meta", **sizes).to_empty(device="cpu"), 2**20
    with torch.no_grad():
        for parameter in wide.parameters():
            parameter.uniform_(-0.1, 0.1)
    wide.save_pretrained(tmp_path / "base", max_shard_size="20MB")
    del wide
    folder, small = tmp_path / "base", saved(tmp_path / "small")
    size, straight = _peak(lorary.load_quantized, small, folder)
    _, in_full = _peak(lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float16), small, folder)
    largest, slack = 8 * MiB, 16 * MiB  # quantising works on 2^20 numbers at a time
    assert size < 12 * MiB
    assert straight < size + largest + slack
    assert in_full > 2 * (size + largest + slack)  # the test would see it
