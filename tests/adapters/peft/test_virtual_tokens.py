"""Prefix and prompt tuning between PEFT and here: one tensor without sites, in both directions, and bad files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorary
from lorary.adapters import export_peft
from lorary.adapters.export.engines import ENGINES, export_for_engine
from lorary.errors import FileError
from tests import tiny

L = 4
BASES = ["LlamaForCausalLM", "GPT2LMHeadModel", "Qwen3ForCausalLM", "GPTNeoXForCausalLM", "Phi3ForCausalLM"]
CONFIG, WEIGHTS, TENSOR = "adapter_config.json", "adapter_model.safetensors", "prompt_embeddings"


def trained(name: str, preset: str, **options: Any) -> Any:
    model = tiny.seeded(name)
    lorary.attach(model, lorary.plan(model, lorary.method(preset, tokens=L, **options)))
    return tiny.shaken(model, 0.1)


def peft_logits(model: Any) -> Tensor:
    """The logits of the text: PEFT's of a prompt begin with the prompt's."""
    return tiny.logits(model, input_ids=tiny.ids())[:, -5:]


def by_peft(name: str, folder: Path) -> Tensor:
    return peft_logits(PeftModel.from_pretrained(tiny.seeded(name), str(folder)).eval())


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"preset": "prefix"}, {"preset": "prefix", "mlp": 6}, {"preset": "prompt"}], ids=str
)
@pytest.mark.parametrize("name", BASES)
def test_exported_here_peft_computes_the_same(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = trained(name, **options)
    adapter, expected = lorary.Adapter.of(model), tiny.logits(model)
    export_peft(adapter, tmp_path / "peft")
    assert sorted(path.name for path in (tmp_path / "peft").iterdir()) == [CONFIG, WEIGHTS]
    close(by_peft(name, tmp_path / "peft"), expected)
    again = lorary.load(tiny.seeded(name), tmp_path / "peft")
    assert torch.equal(tiny.logits(again), expected)
    export_peft(lorary.Adapter.of(again), tmp_path / "again", model=again)
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "peft" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("name", BASES)
def test_a_prefix_saved_by_peft_loads_here(name: str, projection: bool, tmp_path: Path) -> None:
    words = {"prefix_projection": True, "encoder_hidden_size": 6} if projection else {}
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=L, **words)
    theirs = get_peft_model(tiny.seeded(name), config).eval()
    theirs.save_pretrained(str(tmp_path))
    model = lorary.load(tiny.seeded(name), tmp_path)
    close(tiny.logits(model), peft_logits(theirs))
    assert lorary.Adapter.of(model).method == lorary.method("prefix-tuning", tokens=L)


@pytest.mark.parametrize("name", BASES)
def test_a_prompt_saved_by_peft_loads_here(name: str, tmp_path: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=L)
    theirs = get_peft_model(tiny.seeded(name), config).eval()
    theirs.save_pretrained(str(tmp_path))
    model = lorary.load(tiny.seeded(name), tmp_path)
    close(tiny.logits(model), peft_logits(theirs))
    assert (tiny.logits(model) - tiny.logits(tiny.seeded(name))).abs().max() > 1e-3
    assert lorary.Adapter.of(model).method.join == lorary.method("prompt-tuning", tokens=L).join


def test_the_layout_is_peft_s(tmp_path: Path) -> None:
    """[l, 2 L d_kv]: the keys of the first layer, its values, the keys of the second one."""
    model = trained("LlamaForCausalLM", "prefix")
    export_peft(adapter := lorary.Adapter.of(model), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {TENSOR: (L, 2 * 2 * 8)}
    parts = [(layer, role) for layer in (0, 1) for role in "kv"]
    for found, (layer, role) in zip(tensors[TENSOR].split(8, 1), parts, strict=True):
        assert torch.equal(found, adapter.tensors[f"model.layers.{layer}.self_attn.{role}_proj"][f"P_{role}"])
    words = json.loads((tmp_path / CONFIG).read_text())
    assert (words["peft_type"], words["num_virtual_tokens"], words["task_type"]) == ("PREFIX_TUNING", L, "CAUSAL_LM")


def test_read_onto_a_model_that_has_one(tmp_path: Path) -> None:
    """The base is looked at beneath the adapter that it has."""
    model = trained("LlamaForCausalLM", "prefix")
    expected = tiny.logits(model)
    export_peft(lorary.Adapter.of(model), tmp_path)
    tiny.shaken(model)
    lorary.switch(model, lorary.load_adapter(tmp_path, model=model))
    assert torch.equal(tiny.logits(model), expected)


# --- files that are refused -------------------------------------------------------------------------------------------


def config(**changes: Any) -> Callable[[Path], None]:
    """A change of the configuration; None removes a field."""

    def change(folder: Path) -> None:
        words = json.loads((folder / CONFIG).read_text()) | changes
        (folder / CONFIG).write_text(json.dumps({k: v for k, v in words.items() if v is not ...}))

    return change


def tensors(change: Callable[[Tensor], dict[str, Tensor]]) -> Callable[[Path], None]:
    """Other tensors in the place of the one."""

    def write(folder: Path) -> None:
        save_file(change(load_file(folder / WEIGHTS)[TENSOR]), folder / WEIGHTS)

    return write


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-8])


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "no number": (config(num_virtual_tokens=...), f"{CONFIG}: num_virtual_tokens: is missing"),
    "none": (config(num_virtual_tokens=0), "num_virtual_tokens: is 0; it takes a whole number from 1 to 65,536"),
    "text": (config(num_virtual_tokens="4"), "num_virtual_tokens: is '4'; it takes a whole number"),
    "huge": (config(num_virtual_tokens=10**9), "num_virtual_tokens: is 1000000000; it takes a whole number"),
    "more": (config(num_virtual_tokens=5), f"{TENSOR}: has the shape [4, 32], expected [5, 32]"),
    "encoder": (config(num_transformer_submodules=2), "num_transformer_submodules: is 2; it takes 1"),
    "modules": (config(modules_to_save=["lm_head"]), "modules trained beside virtual tokens are not read"),
    "unknown": (config(virtual="yes"), f"{CONFIG}: virtual: is not a field that lorary knows"),
    "projection": (config(prefix_projection="no"), "prefix_projection: is 'no'; it takes true or false"),
    "other type": (config(peft_type="P_TUNING"), "is of type 'P_TUNING'"),
    "NaN": (tensors(lambda P: {TENSOR: P * torch.nan}), f"{TENSOR}: 128 of 128 values are NaN or infinite"),
    "values": (tensors(lambda P: {TENSOR: P * 1e9}), f"{TENSOR}: its largest value is"),
    "transposed": (tensors(lambda P: {TENSOR: P.T.contiguous()}), "has the shape [32, 4], expected [4, 32]"),
    "name": (tensors(lambda P: {"prompt": P}), f"{TENSOR}: is missing"),
    "beside": (
        tensors(lambda P: {TENSOR: P, "lm_head.weight": P.clone()}),
        "lm_head.weight: is not a tensor of virtual tokens",
    ),
    "cut": (cut, WEIGHTS),
    "pickle": (pickled, "adapter_model.bin: is a pickle, which can run code when it is read; it was not opened"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(case: str, tmp_path: Path) -> None:
    export_peft(lorary.Adapter.of(trained("LlamaForCausalLM", "prefix")), tmp_path)
    spoil, said = BAD[case]
    spoil(tmp_path)
    model = tiny.seeded("LlamaForCausalLM")
    before = tiny.everything(model)
    with pytest.raises(FileError) as refused:
        lorary.load(model, tmp_path)
    assert said in str(refused.value)
    assert tiny.everything(model) == before


@pytest.mark.parametrize("preset", ["prefix", "prompt"])
def test_without_a_model_nobody_knows_its_layers(preset: str, tmp_path: Path) -> None:
    export_peft(lorary.Adapter.of(trained("LlamaForCausalLM", preset)), tmp_path)
    with pytest.raises(FileError, match="adapter belongs to are known only to the model") as refused:
        lorary.load_adapter(tmp_path)
    assert "read it onto its base: lorary.load(model, folder)" in str(refused.value)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("GPT2LMHeadModel", f"{TENSOR}: has the shape [4, 32], expected [4, 64]"),
        ("BertForMaskedLM", "BertForMaskedLM is not a causal language model with a cache of keys and values"),
        ("T5ForConditionalGeneration", "has an encoder and a decoder; only causal language models are supported"),
    ],
)
def test_on_another_base(other: str, said: str, tmp_path: Path) -> None:
    export_peft(lorary.Adapter.of(trained("LlamaForCausalLM", "prefix")), tmp_path)
    with pytest.raises(FileError) as refused:
        lorary.load(tiny.seeded(other), tmp_path)
    assert said in str(refused.value)


# --- adapters that are not exported -----------------------------------------------------------------------------------


def test_not_beside_another_method(tmp_path: Path) -> None:
    model = tiny.seeded("LlamaForCausalLM")
    methods = {"attention-kv": lorary.method("prefix", tokens=L), "mlp": lorary.method("lora", r=2)}
    lorary.attach(model, lorary.plan(model, methods))
    with pytest.raises(FileError, match="PEFT's virtual tokens stand alone, and this adapter has Add, Prefix"):
        export_peft(lorary.Adapter.of(model), tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_not_beside_trained_parameters(tmp_path: Path) -> None:
    model = tiny.seeded("GPT2LMHeadModel")
    lorary.attach(model, lorary.plan(model, lorary.method("prompt", "bitfit", tokens=L)))
    with pytest.raises(FileError, match="train in full, and PEFT saves no base parameters beside a prompt"):
        export_peft(lorary.Adapter.of(model), tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_not_for_a_classifier_whose_head_is_not_saved(tmp_path: Path) -> None:
    model = tiny.seeded("GPT2ForSequenceClassification")
    lorary.attach(model, lorary.plan(model, lorary.method("prompt", tokens=L), head="frozen"))
    with pytest.raises(FileError, match="a task that it knows, and GPT2ForSequenceClassification is of none"):
        export_peft(lorary.Adapter.of(model), tmp_path / "peft")
    lorary.save(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.safetensors", "lorary.json"]


def test_not_over_an_adapter_of_lorary(tmp_path: Path) -> None:
    model = trained("LlamaForCausalLM", "prompt")
    lorary.save(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileError, match="the adapter there would be lost"):
        export_peft(lorary.Adapter.of(model), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_not_with_numbers_that_nobody_reads(tmp_path: Path) -> None:
    model = trained("LlamaForCausalLM", "prompt")
    with torch.no_grad():
        model.get_input_embeddings().params["P"][0, 0] = torch.inf
    with pytest.raises(FileError, match=f"{TENSOR}: 1 of 64 values are NaN or infinite"):
        export_peft(lorary.Adapter.of(model), tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("preset", ["prefix", "prompt"])
def test_no_engine_has_them(preset: str, engine: str, tmp_path: Path) -> None:
    model = trained("LlamaForCausalLM", preset)
    with pytest.raises(FileError, match="does more than add B A x"):
        export_for_engine(lorary.Adapter.of(model), tmp_path / "out", engine, model=model, base="org/model")
    assert not (tmp_path / "out").exists()


# --- the folder of lorary.save ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["prefix", "prompt"])
@pytest.mark.parametrize("name", BASES[:2])
def test_a_saved_folder_is_peft_s_too(name: str, preset: str, tmp_path: Path) -> None:
    model = trained(name, preset)
    lorary.save(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS, "lorary.json"]
    close(by_peft(name, tmp_path), tiny.logits(model))
    found, expected = (
        lorary.load_adapter(tmp_path),
        lorary.Adapter.of(model),
    )  # no model is needed: the record has sites
    assert (found.method, found.sites) == (expected.method, expected.sites)
    assert all(
        torch.equal(t, found.tensors[s][role]) for s, roles in expected.tensors.items() for role, t in roles.items()
    )


def test_with_its_network_it_is_saved_in_lorarys_own_form(tmp_path: Path) -> None:
    model = trained("LlamaForCausalLM", "prefix", mlp=6)
    lorary.save(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.safetensors", "lorary.json"]


def test_a_record_of_other_sites_is_refused(tmp_path: Path) -> None:
    lorary.save(trained("LlamaForCausalLM", "prefix"), tmp_path)
    record = json.loads((tmp_path / "lorary.json").read_text())
    for change, said in (
        ({"sites": record["sites"][:-1]}, f"{TENSOR}: has the shape [4, 32], expected [4, 24]"),
        ({"full": ["lm_head.weight"]}, "no PEFT adapter type has the tensors of this method"),
        ({"sites": []}, "no PEFT adapter type has the tensors of this method"),
    ):
        (tmp_path / "lorary.json").write_text(json.dumps(record | change))
        with pytest.raises(FileError) as refused:
            lorary.load_adapter(tmp_path)
        assert said in str(refused.value)


@pytest.mark.parametrize("preset", ["prefix", "prompt"])
def test_other_readers_are_told_of_and_no_export_is_advised(preset: str, tmp_path: Path) -> None:
    export_peft(lorary.Adapter.of(trained("LlamaForCausalLM", preset)), tmp_path)
    verdicts = {verdict.reader: verdict for verdict in lorary.check(tmp_path)}
    assert verdicts["peft"].accepted
    for reader in ("transformers", "vllm", "sglang", "llama.cpp"):
        (reason,) = verdicts[reader].reasons
        assert "refuses the PEFT type" in reason.what
        assert reason.fix == "no export helps: what stands before the text is neither a LoRA nor a change of weights"
