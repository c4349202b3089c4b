"""bitsandbytes' 4-bit checkpoints: theirs are read here without bitsandbytes, ours there, with equal logits."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import lorary
from lorary.errors import FileError, StateError
from lorary.layers.nf4 import NF4Linear
from lorary.model.fingerprint import Fingerprint
from tests import tiny

# Widths of whole blocks: bitsandbytes' CPU kernels read others wrongly where a block goes over the end of a row.
_LLAMA = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 1, "num_key_value_heads": 1}
_GPT2 = {"n_embd": 64, "n_head": 4}
CASES = [
    ("LlamaForCausalLM", _LLAMA, True, "float32", "float32"),
    ("LlamaForCausalLM", _LLAMA, False, "bfloat16", "bfloat16"),
    ("LlamaForCausalLM", _LLAMA, True, "bfloat16", "float32"),
    ("GPT2LMHeadModel", _GPT2, True, "float32", "float32"),
]
SAID = "weight.quant_state.bitsandbytes__nf4"
UP = "model.layers.0.mlp.up_proj."


def theirs(folder: Path, double: bool = True, compute: str = "float32", **words: Any) -> Any:
    """A checkpoint of bitsandbytes' own."""
    pytest.importorskip("bitsandbytes")
    words = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} | words
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="auto",
        quantization_config=BitsAndBytesConfig(
            bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=getattr(torch, compute), **words
        ),
    )


def plain(folder: Path, name: str = "LlamaForCausalLM", dtype: str = "float32", **changes: Any) -> Path:
    tiny.seeded(name, **(changes or _LLAMA)).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def close(ours: torch.Tensor, bitsandbytes: torch.Tensor) -> None:
    """The weights are equal bit for bit; sums over them may be taken in another order."""
    eps = torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours, bitsandbytes, rtol=0, atol=4 * eps * bitsandbytes.abs().max().item())


@pytest.mark.parametrize(("name", "sizes", "double", "dtype", "compute"), CASES)
def test_theirs_here_and_ours_there(
    tmp_path: Path, name: str, sizes: dict[str, Any], double: bool, dtype: str, compute: str
) -> None:
    base = plain(tmp_path / "plain", name, dtype, **sizes)
    quantised = theirs(base, double, compute)
    quantised.save_pretrained(tmp_path / "theirs")
    expected = tiny.exact_logits(quantised)
    here = lorary.load_quantized(tmp_path / "theirs", dtype=dtype)
    layers = [module for module in here.modules() if isinstance(module, NF4Linear)]
    assert {(layer.nested_absmax is not None, layer.compute) for layer in layers} == {(double, compute)}
    close(tiny.logits(here), expected)

    lorary.save_quantized(here, tmp_path / "ours")
    there = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(tiny.exact_logits(there), expected)
    assert torch.equal(tiny.logits(lorary.load_quantized(tmp_path / "ours", dtype=dtype)), tiny.logits(here))
    same = [type(a).__name__ == "Linear4bit" for _, a in there.named_modules() if type(a).__name__.startswith("Linear")]
    assert sum(same) == len(layers)
    assert there.dtype == getattr(torch, dtype)


def test_what_is_quantised_here_is_theirs_bit_for_bit(tmp_path: Path) -> None:
    base = plain(tmp_path / "plain")
    theirs(base, double=False).save_pretrained(tmp_path / "theirs")
    lorary.save_quantized(lorary.load_quantized(base, lorary.NF4(double=False)), tmp_path / "ours")
    files = [load_file(tmp_path / of / "model.safetensors") for of in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys()
    for key, value in files[0].items():
        if key.endswith(SAID):
            assert json.loads(bytes(value.tolist())) == json.loads(bytes(files[1][key].tolist()))
        else:
            assert torch.equal(value, files[1][key])


def test_bitsandbytes_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lorary.save_quantized(lorary.load_quantized(plain(tmp_path / "plain")), tmp_path / "ours")
    for name in [n for n in sys.modules if n.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    again, base = lorary.load_quantized(tmp_path / "ours"), lorary.load_quantized(tmp_path / "plain")
    assert torch.equal(tiny.logits(again), tiny.logits(base))


def test_adapters_fit_a_base_that_was_quantised_and_saved(tmp_path: Path) -> None:
    base = lorary.load_quantized(plain(tmp_path / "plain"))
    lorary.save_quantized(base, tmp_path / "ours")
    again = lorary.load_quantized(tmp_path / "ours")
    assert Fingerprint.of(again) == Fingerprint.of(base)
    assert again.config.to_dict() == base.config.to_dict() | {"_name_or_path": again.config._name_or_path}
    tiny.trained(base, lorary.method("qlora", r=2))
    lorary.save(base, tmp_path / "adapter")
    assert torch.equal(tiny.logits(lorary.load(again, tmp_path / "adapter")), tiny.logits(base))


def test_adapters_of_a_base_of_theirs_fit_however_it_is_loaded(tmp_path: Path) -> None:
    live = theirs(plain(tmp_path / "plain"))
    live.save_pretrained(tmp_path / "theirs")
    here = lorary.load_quantized(tmp_path / "theirs")
    mine, its = Fingerprint.of(here), Fingerprint.of(AutoModelForCausalLM.from_pretrained(tmp_path / "theirs"))
    assert mine.disagreements(its) == its.disagreements(mine) == []
    other = plain(tmp_path / "other", vocab_size=41, **_LLAMA)
    assert mine.disagreements(Fingerprint.of(AutoModelForCausalLM.from_pretrained(other)))


def test_a_model_that_transformers_cast_is_read_in_the_precision_that_is_asked(tmp_path: Path) -> None:
    theirs(plain(tmp_path / "plain", dtype="bfloat16", **_LLAMA)).save_pretrained(tmp_path / "theirs")
    here = lorary.load_quantized(tmp_path / "theirs", dtype="float32")
    assert {p.dtype for p in here.parameters()} == {torch.float32, torch.uint8}
    assert here.model.layers[0].mlp.up_proj.dtype is torch.float32


def test_codes_in_the_bytes_of_floats(tmp_path: Path) -> None:
    """As FSDP wants them."""
    live = theirs(plain(tmp_path / "plain"), bnb_4bit_quant_storage=torch.bfloat16)
    live.save_pretrained(tmp_path / "theirs")
    assert load_file(tmp_path / "theirs/model.safetensors")[UP + "weight"].dtype is torch.bfloat16
    close(tiny.logits(lorary.load_quantized(tmp_path / "theirs")), tiny.exact_logits(live))


# --- damage -----------------------------------------------------------------------------------------------------------


def _without(tensors: dict[str, Any], key: str) -> None:
    del tensors[UP + key]


def _said(tensors: dict[str, Any], **changes: Any) -> None:
    said = json.loads(bytes(tensors[UP + SAID].tolist())) | changes
    tensors[UP + SAID] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


def _put(tensors: dict[str, Any], key: str, value: torch.Tensor) -> None:
    tensors[UP + key] = value


DAMAGE: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (lambda t: _without(t, "weight.absmax"), "absmax is missing"),
    (lambda t: _without(t, "weight.nested_absmax"), "nested_absmax is missing"),
    (lambda t: _without(t, SAID), "quant_state.bitsandbytes__nf4 is missing"),
    (lambda t: _without(t, "weight"), "the codes are missing"),
    (lambda t: _put(t, SAID, torch.zeros(3, dtype=torch.uint8)), "is not valid JSON: Expecting"),
    (
        lambda t: _put(t, SAID, torch.full((100_000,), ord("["), dtype=torch.uint8)),
        "is not valid JSON: maximum recursion",
    ),
    (lambda t: _put(t, "weight.absmax", torch.zeros(3, dtype=torch.uint8)), r"absmax is torch.uint8 \(3,\), expected"),
    (lambda t: _put(t, "weight", torch.zeros(5, 1, dtype=torch.uint8)), "expected 4096 bytes for a weight of"),
    (lambda t: _put(t, "weight.quant_map", torch.zeros(16)), "quant_map differs from the values of NF4"),
    (lambda t: _said(t, blocksize=63), "blocksize is 63"),
    (lambda t: _said(t, shape=[64, 128]), r"holds a weight of \(64, 128\), but the model has one of \(128, 64\)"),
    (lambda t: _said(t, shape="everything"), "shape is 'everything'"),
    (lambda t: _said(t, dtype="int8"), "dtype is 'int8'"),
    (lambda t: _said(t, nested_offset="x"), "invalid double quantisation"),
    (lambda t: _said(t, nested_offset=True), "invalid double quantisation"),
    (lambda t: _said(t, nested_offset=10**400), "invalid double quantisation"),
    (lambda t: _said(t, nested_offset=1e39), "invalid double quantisation"),
    (lambda t: t[UP + "weight.nested_absmax"].fill_(float("nan")), "nested_absmax holds NaN or inf"),
]


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantised")
    lorary.save_quantized(lorary.load_quantized(plain(folder / "plain")), folder / "ours")
    return folder / "ours"


def _damaged(quantised: Path, folder: Path, *damage: Callable[[dict[str, Any]], None]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_bytes((quantised / "config.json").read_bytes())
    tensors = load_file(quantised / "model.safetensors")
    for harm in damage:
        harm(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("damage", "said"), DAMAGE, ids=[said for _, said in DAMAGE])
def test_a_damaged_weight_is_told(quantised: Path, tmp_path: Path, damage: Any, said: str) -> None:
    with pytest.raises(FileError, match=said) as refused:
        lorary.load_quantized(_damaged(quantised, tmp_path / "damaged", damage))
    assert {problem.where for problem in refused.value.problems} == {UP + "weight"}


def test_every_damaged_weight_is_told_at_once(quantised: Path, tmp_path: Path) -> None:
    def another(tensors: dict[str, Any]) -> None:
        del tensors["model.layers.1.self_attn.q_proj.weight.quant_map"]
        del tensors["model.layers.1.self_attn.q_proj.weight.absmax"]

    with pytest.raises(FileError) as refused:
        lorary.load_quantized(_damaged(quantised, tmp_path / "damaged", DAMAGE[0][0], another))
    assert str(refused.value).splitlines()[1:] == [
        "  - model.layers.0.mlp.up_proj.weight: absmax is missing",
        "  - model.layers.1.self_attn.q_proj.weight: absmax is missing",
    ]


def _config(quantised: Path, folder: Path, **changes: Any) -> Path:
    _damaged(quantised, folder)
    words = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        target = words["quantization_config"] if key in words["quantization_config"] else words
        target[key] = value
    (folder / "config.json").write_text(json.dumps(words))
    return folder


FIX = "\n      hint: load it with Transformers and the library that wrote it; lorary adapts those layers"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type is 'fp4', but only 'nf4' is read here" + FIX),
        (
            {"load_in_4bit": False, "load_in_8bit": True},
            "quantised by bitsandbytes to 8 bits, but only its NF4 is read here" + FIX,
        ),
        (
            {"quant_method": "gptq", "load_in_4bit": False},
            "quantised with gptq, but only bitsandbytes' NF4 is read here" + FIX,
        ),
        (
            {"bnb_4bit_compute_dtype": "int7"},
            "bnb_4bit_compute_dtype is 'int7', expected one of float32, bfloat16, float16",
        ),
    ],
)
def test_what_is_not_nf4_is_told(quantised: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    folder = _config(quantised, tmp_path / "other", **changes)
    with pytest.raises(FileError) as refused:
        lorary.load_quantized(folder)
    expected = f"cannot load the model {folder}:\n  - config.json: quantization_config: {said}"
    assert str(refused.value) == expected


def test_a_damaged_fingerprint_is_told(quantised: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="lorary_base: expected architecture, name, structure, weights, each a string"):
        lorary.load_quantized(_config(quantised, tmp_path / "other", lorary_base={"name": 3}))


# --- what cannot be saved ---------------------------------------------------------------------------------------------


def test_what_such_files_do_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="is a Linear, not a Transformers model"):
        lorary.save_quantized(torch.nn.Linear(2, 2), tmp_path / "x")
    with pytest.raises(StateError, match="has no layer in NF4"):
        lorary.save_quantized(tiny.llama(), tmp_path / "x")
    model = lorary.quantize(tiny.llama(), lorary.NF4(embeddings=True))
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2), "attention-qv"))
    with pytest.raises(StateError) as refused:
        lorary.save_quantized(model, tmp_path / "x")
    assert str(refused.value) == (
        "cannot save the base:\n"
        "  - model: has adapters attached\n      hint: save these with lorary.save, then detach them\n"
        "  - model.embed_tokens: is a quantised embedding, which the format does not support\n"
        "      hint: leave it plain"
    )
    lorary.detach(model)
    mixed = lorary.quantize(tiny.llama())
    mixed.model.layers[0].mlp.up_proj.compute = "bfloat16"
    with pytest.raises(StateError, match="layers compute in bfloat16 and float32, but the format has one precision"):
        lorary.save_quantized(mixed, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_model_without_values_is_not_written(tmp_path: Path) -> None:
    model = lorary.quantize(tiny.model("LlamaForCausalLM", "meta"))
    with pytest.raises(StateError, match="model: has parameters without values, on the meta device"):
        lorary.save_quantized(model, tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_layers_that_are_not_quantised_are_named(tmp_path: Path) -> None:
    base = plain(tmp_path / "plain")
    some = lorary.load_quantized(base, layers=["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"])
    lorary.save_quantized(some, tmp_path / "ours")
    words = json.loads((tmp_path / "ours/config.json").read_text())["quantization_config"]
    assert "model.layers.0.mlp.down_proj" in words["llm_int8_skip_modules"]
    assert torch.equal(tiny.logits(lorary.load_quantized(tmp_path / "ours")), tiny.logits(some))
    pytest.importorskip("bitsandbytes")
    close(tiny.exact_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "ours")), tiny.logits(some))
