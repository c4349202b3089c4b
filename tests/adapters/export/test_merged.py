"""A merged model written file by file: the tensors of a merge in memory, in the base's files and under its names."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lorary
from lorary.adapters import AdapterWarning, export_merged
from lorary.model.loading.source import ModelSection
from tests import architectures
from tests.adapters.export.bases import merged, saved_adapter, saved_base, tensors
from tests.adapters.hub_server import hub
from tests.tiny import shaken

LLAMA, GPT2, BERT = "LlamaForCausalLM", "GPT2LMHeadModel", "BertForSequenceClassification"
GREEK = {"weight": "gamma", "bias": "beta"}
TIED: dict[str, Any] = {"tie_word_embeddings": True}

# class, presets, targets, settings of the base, dtype
CASES: dict[str, tuple[str, tuple[str, ...], Any, dict[str, Any], torch.dtype | None]] = {
    "llama": (LLAMA, ("lora",), "all-linear", {}, None),
    "bf16": (LLAMA, ("lora", "rslora"), "all-linear", {}, torch.bfloat16),
    "tied, untouched": (LLAMA, ("lora",), "all-linear", TIED, None),
    "tied embedding adapted": (LLAMA, ("lora",), ["embed_tokens", "q_proj"], TIED, None),
    "tied head adapted": (LLAMA, ("pissa",), ["lm_head", "q_proj"], TIED, None),
    "conv1d and residual": (GPT2, ("pissa",), ["wte", "c_attn"], {}, None),
    "qlora": (GPT2, ("qlora", "dora"), "all-linear", {}, torch.float16),
    "quantised residual": (LLAMA, ("qlora", "pissa"), "all-linear", {}, torch.bfloat16),
    "new head": (BERT, ("lora",), "all-linear", {}, None),
    "shared encoder and decoder": ("T5ForConditionalGeneration", ("lora",), ["shared"], {}, None),
    "tied in a part": ("BlipForConditionalGeneration", ("lora",), "all-linear", {}, None),
    "fused experts": ("Qwen3MoeForCausalLM", ("lora",), "all-linear", {}, None),
    "projections of an attention": ("SiglipVisionModel", ("lora",), "all-linear", {}, None),
    "converted names": ("Dinov2ForImageClassification", ("lora",), "all-linear", {"use_swiglu_ffn": True}, None),
    "convolutions": ("ConvNextForImageClassification", ("lora",), ["conv"], {}, torch.bfloat16),
    "multimodal": ("LlavaForConditionalGeneration", ("vera",), ["q_proj", "v_proj"], {}, None),
    "positions by themselves": ("MarianMTModel", ("lora",), ["q_proj"], {}, None),
    "state space": ("MambaForCausalLM", ("melora",), ["in_proj"], {}, None),
    "written base": (LLAMA, ("delta-lora",), "attention", {}, None),
}


@pytest.mark.parametrize(("name", "names", "targets", "settings", "dtype"), CASES.values(), ids=CASES)
def test_it_equals_the_model_merged_in_memory(
    name: str,
    names: tuple[str, ...],
    targets: Any,
    settings: dict[str, Any],
    dtype: torch.dtype | None,
    tmp_path: Path,
) -> None:
    cls: Any = saved_base(name, tmp_path / "base", **settings)
    adapted = saved_adapter(cls, tmp_path / "base", tmp_path / "adapter", *names, targets=targets)
    merged(cls, tmp_path / "base", tmp_path / "adapter", tmp_path / "expected", dtype)
    adapter = lorary.load_adapter(tmp_path / "adapter")
    written = export_merged(adapter, tmp_path / "base", tmp_path / "out", dtype=dtype)
    assert written == (dtype or torch.float32)
    expected, found = tensors(tmp_path / "expected"), tensors(tmp_path / "out")
    assert sorted(found) == sorted(expected)
    assert [n for n, t in expected.items() if found[n].dtype != t.dtype or not torch.equal(found[n], t)] == []
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in (tmp_path / "base").iterdir())
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("expected", "out")]
    assert configs[0] == configs[1]
    model, info = cls.from_pretrained(tmp_path / "out", output_loading_info=True, dtype=torch.float32)
    assert not any(info.values())
    inputs = architectures.inputs(model)
    with torch.no_grad():
        live, here = adapted(**inputs), model.eval()(**inputs)
    scores = [getattr(output, "logits", output[0]) for output in (live, here)]
    room = (0.1 if dtype else 1e-5) * float(scores[0].abs().max())
    torch.testing.assert_close(scores[1], scores[0], rtol=0, atol=room)


def test_full_training_and_a_longer_context_are_in_it(tmp_path: Path) -> None:
    cls: Any = saved_base(LLAMA, tmp_path / "base", **TIED)
    saved_adapter(cls, tmp_path / "base", tmp_path / "adapter", "longlora", targets="attention", length=128)
    merged(cls, tmp_path / "base", tmp_path / "adapter", tmp_path / "expected")
    export_merged(lorary.load_adapter(tmp_path / "adapter"), tmp_path / "base", tmp_path / "out")
    expected, found = tensors(tmp_path / "expected"), tensors(tmp_path / "out")
    assert all(torch.equal(found[name], t) for name, t in expected.items())
    assert found.keys() == expected.keys()
    assert not torch.equal(found["model.norm.weight"], tensors(tmp_path / "base")["model.norm.weight"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == json.loads((tmp_path / "expected" / "config.json").read_text())
    assert config["rope_parameters"]["factor"] == 2


def test_statistics_of_16_bits_and_norms_that_train(tmp_path: Path) -> None:
    """The labels of the new head are counted though the adapter holds buffers, which are no parameters."""
    resnet = "ResNetForImageClassification"
    cls: Any = saved_base(resnet, tmp_path / "base", dtype=torch.bfloat16)
    options: dict[str, Any] = {"targets": ["conv"], "full": ("norms",)}
    saved_adapter(cls, tmp_path / "base", tmp_path / "adapter", **options)
    merged(cls, tmp_path / "base", tmp_path / "adapter", tmp_path / "expected")
    assert (
        export_merged(lorary.load_adapter(tmp_path / "adapter"), tmp_path / "base", tmp_path / "out") == torch.bfloat16
    )
    expected, found = tensors(tmp_path / "expected"), tensors(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert [n for n, t in expected.items() if found[n].dtype != t.dtype or not torch.equal(found[n], t)] == []
    assert found["resnet.embedder.embedder.normalization.running_mean"].dtype == torch.bfloat16
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "pad_token_id" not in config  # of text models alone


def test_tensors_that_the_model_does_not_have_are_left_out_with_a_note(tmp_path: Path) -> None:
    """Such as the layers for several tokens at once in DeepSeek-V3's files, which Transformers does not load."""
    cls: Any = saved_base(LLAMA, tmp_path / "base", "1GB")
    saved_adapter(cls, tmp_path / "base", tmp_path / "adapter")
    export_merged(lorary.load_adapter(tmp_path / "adapter"), tmp_path / "base", tmp_path / "expected")
    file = tmp_path / "base" / "model.safetensors"
    extra = {f"model.layers.9.{name}.weight": torch.ones(2) for name in "abcd"}
    save_file(load_file(file) | extra | {"model.rotary_emb.inv_freq": torch.ones(2)}, file, metadata={"format": "pt"})
    first = ", ".join(sorted(extra)[:3])
    with pytest.warns(AdapterWarning, match=f"LlamaForCausalLM does not have are left out: {first} and 1"):
        export_merged(lorary.load_adapter(tmp_path / "adapter"), tmp_path / "base", tmp_path / "out")
    assert tensors(tmp_path / "out").keys() == tensors(tmp_path / "expected").keys()


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_base_with_its_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    saved_base(LLAMA, tmp_path / "base")
    (tmp_path / "base" / "modeling_own.py").write_text(CODE)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    auto = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": auto}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    options: dict[str, Any] = {"trust_remote_code": True}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options)
    shaken(lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2))), 0.05)
    section = ModelSection.of(str(tmp_path / "base"), **options)
    export_merged(lorary.Adapter.of(model), section, tmp_path / "out")
    lorary.merge(model)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options)
    assert type(found).__name__ == "OwnForCausalLM"
    assert all(torch.equal(t, found.state_dict()[name]) for name, t in model.state_dict().items())
    assert (tmp_path / "out" / "modeling_own.py").read_text() == CODE


def test_a_bias_that_the_method_creates_is_in_the_files_and_the_configuration(tmp_path: Path) -> None:
    """Up to the last bit: the sum of a product with W depends on where W lies in memory."""
    cls: Any = saved_base(LLAMA, tmp_path / "base")
    saved_adapter(cls, tmp_path / "base", tmp_path / "adapter", "glora", targets=["q_proj"])
    merged(cls, tmp_path / "base", tmp_path / "adapter", tmp_path / "expected")
    export_merged(lorary.load_adapter(tmp_path / "adapter"), tmp_path / "base", tmp_path / "out")
    expected, found = tensors(tmp_path / "expected"), tensors(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-7 if name.endswith("bias") else 0)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["attention_bias"] is True
    assert not found["model.layers.0.self_attn.k_proj.bias"].any()  # the flag brings it along
    assert found["model.layers.0.self_attn.q_proj.bias"].any()


def test_the_original_weights_on_request(tmp_path: Path) -> None:
    cls: Any = saved_base(LLAMA, tmp_path / "base")
    saved_adapter(cls, tmp_path / "base", tmp_path / "adapter", "qlora")
    adapter = lorary.load_adapter(tmp_path / "adapter")
    model = lorary.merge(lorary.load(cls.from_pretrained(tmp_path / "base"), tmp_path / "adapter", quantize=False))
    export_merged(adapter, tmp_path / "base", tmp_path / "out", onto="original")
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in tensors(tmp_path / "out").items())
    export_merged(adapter, tmp_path / "base", tmp_path / "trained")
    assert not torch.equal(*(tensors(tmp_path / n)["model.layers.0.mlp.up_proj.weight"] for n in ("out", "trained")))


@pytest.mark.parametrize(
    ("name", "old"),
    [
        (GPT2, lambda key: key.removeprefix("transformer.")),  # as on the Hub: a base model without the head's prefix
        (
            BERT,
            lambda key: key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"),
        ),
    ],
    ids=["no prefix", "names of 2018"],
)
def test_a_checkpoint_of_other_names_keeps_them(name: str, old: Any, tmp_path: Path) -> None:
    cls: Any = saved_base(name, tmp_path / "base", "1GB")
    file = tmp_path / "base" / "model.safetensors"
    save_file({old(key): t for key, t in load_file(file).items()}, file, metadata={"format": "pt"})
    adapted = saved_adapter(cls, tmp_path / "base", tmp_path / "adapter")
    export_merged(lorary.load_adapter(tmp_path / "adapter"), tmp_path / "base", tmp_path / "out")
    assert tensors(tmp_path / "out").keys() == tensors(tmp_path / "base").keys()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            cls.from_pretrained(tmp_path / "out").eval()(input_ids=ids).logits,
            adapted(input_ids=ids).logits,
            rtol=0,
            atol=1e-6,
        )


def test_what_belongs_to_the_model_is_carried_along(tmp_path: Path) -> None:
    cls: Any = saved_base(LLAMA, tmp_path / "base", "1GB")
    saved_adapter(cls, tmp_path / "base", tmp_path / "adapter")
    carried = {
        **{"tokenizer.json": "{}", "tokenizer_config.json": "{}", "special_tokens_map.json": "{}", "vocab.json": "{}"},
        **{"merges.txt": "a b", "spiece.model": "x", "chat_template.jinja": "base", "preprocessor_config.json": "{}"},
        **{"modeling_own.py": "pass", "LICENSE": "free", "generation_config.json": '{"top_k": 3}'},
        "additional_chat_templates/tools.jinja": "tools",
    }
    left = {
        "pytorch_model.bin": "x",
        "training_args.bin": "x",
        "README.md": "the base",
        "optimizer.pt": "x",
        "log.csv": "1",
    }
    (tmp_path / "base" / "additional_chat_templates").mkdir()
    for name, text in (carried | left).items():
        (tmp_path / "base" / name).write_text(text)
    template = tmp_path / "own.jinja"
    template.write_text("own")
    adapter = lorary.load_adapter(tmp_path / "adapter")
    export_merged(adapter, tmp_path / "base", tmp_path / "out")
    export_merged(adapter, tmp_path / "base", tmp_path / "own", chat_template=template)
    for name, text in carried.items():
        assert (tmp_path / "out" / name).read_text() == text
    files = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert files == {*carried, "config.json", "model.safetensors"}
    assert (tmp_path / "own" / "chat_template.jinja").read_text() == "own"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the process that is killed is a copy of this one")
def test_a_kill_in_the_middle_leaves_nothing_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cls: Any = saved_base(LLAMA, tmp_path / "base")
    saved_adapter(cls, tmp_path / "base", tmp_path / "adapter")
    adapter = lorary.load_adapter(tmp_path / "adapter")
    monkeypatch.setenv("LORARY_FAULT", "merged.file:3:kill")
    if not (child := os.fork()):
        export_merged(adapter, tmp_path / "base", tmp_path / "out" / "model")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (tmp_path / "out" / "model").exists()
    assert not list((tmp_path / "out").rglob("config.json"))  # what is left has a temporary name and is no model
    assert len(list((tmp_path / "out").rglob("*.safetensors"))) == 3
    monkeypatch.setenv("LORARY_FAULT", "merged.file:2:enospc")
    with pytest.raises(lorary.FileError, match=r"no space left on device: [\d,]+ bytes are free, [\d,]+ are needed"):
        export_merged(adapter, tmp_path / "base", tmp_path / "full")
    assert not (tmp_path / "full").exists()
    monkeypatch.delenv("LORARY_FAULT")
    export_merged(adapter, tmp_path / "base", tmp_path / "out" / "model")
    cls.from_pretrained(tmp_path / "out" / "model")


MEASURED = """
import resource, sys, lorary
from lorary.adapters import export_merged
export_merged(lorary.load_adapter(sys.argv[1]), "ann/llama", sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
export_merged(lorary.load_adapter(sys.argv[3]), sys.argv[4], sys.argv[5])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


class Outside(NamedTuple):
    """What another process did.

    Args:
        small: its folder with a base, an adapter and, from the base on the Hub, the merged model.
        asked: the files that it asked the Hub for.
        big: the same from a base of 14 files on the disk.
        peak: the memory that the second one took beyond the first, which brings in all that is loaded once.
    """

    small: Path
    asked: list[str]
    big: Path
    peak: int


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Outside:
    small, big = (tmp_path_factory.mktemp(name) for name in ("small", "big"))
    settings = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 12, "vocab_size": 2000}
    for folder, changes in ((small, {}), (big, settings)):
        cls: Any = saved_base(LLAMA, folder / "base", "6MB", **changes)
        saved_adapter(cls, folder / "base", folder / "adapter", targets="attention")
    (small / "base" / "original.pth").write_text("a pickle")
    (small / "base" / "chat_template.jinja").write_text("base")
    with hub({"ann/llama": small / "base"}) as (address, asked):
        env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        env |= {"HF_ENDPOINT": address, "HF_HOME": str(small / "cache"), "HF_HUB_DISABLE_XET": "1"}
        paths = [small / "adapter", small / "out", big / "adapter", big / "base", big / "out"]
        command = [sys.executable, "-c", MEASURED, *map(str, paths)]
        ran = subprocess.run(command, env=env, cwd=small, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return Outside(small, asked, big, int(ran.stdout.splitlines()[-1]))


def test_a_base_from_the_hub(outside: Outside, tmp_path: Path) -> None:
    export_merged(lorary.load_adapter(outside.small / "adapter"), outside.small / "base", tmp_path / "out")
    assert "original.pth" not in outside.asked
    for file in (tmp_path / "out").iterdir():
        assert (outside.small / "out" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts kibibytes on Linux alone")
def test_memory_holds_one_file_and_copies_of_one_layer(outside: Outside) -> None:
    sizes = [file.stat().st_size for file in (outside.big / "base").glob("*.safetensors")]
    assert len(sizes) >= 12
    layer = 4 * 2000 * 384  # the largest one in fp32
    assert outside.peak < max(sizes) + 4 * layer + 8 * 2**20 < sum(sizes) / 2
