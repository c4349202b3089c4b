"""Base models by name: what is loaded, in which dtype, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lorary.errors import FileError
from lorary.layers.nf4 import NF4
from lorary.model.fingerprint import Fingerprint
from lorary.model.loading import dtype as dtype_of_model
from lorary.model.loading.dtype import load_dtype
from lorary.model.loading.from_pretrained import load_config, load_model, load_tokenizer, skeleton
from lorary.model.loading.source import ModelSection
from tests.train.small import tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    made = tokenizer()
    made.pad_token = None
    made.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def section(folder: Path, **words: str) -> ModelSection:
    return ModelSection(id=str(folder), **words)  # type: ignore[arg-type]


def test_a_skeleton_has_the_models_shapes_and_no_values(folder: Path) -> None:
    bare, loaded = skeleton(section(folder)), load_model(section(folder))
    assert {n: p.shape for n, p in bare.named_parameters()} == {n: p.shape for n, p in loaded.named_parameters()}
    assert all(p.is_meta for p in bare.parameters())
    assert not loaded.training


@pytest.mark.parametrize(
    ("asked", "quick", "expected"),
    [
        ("auto", True, torch.bfloat16),  # as saved
        ("auto", False, torch.float32),  # where 16-bit arithmetic is slow
        ("bfloat16", False, torch.bfloat16),  # asked for is asked for
        ("float32", True, torch.float32),
    ],
)
def test_the_dtype_is_the_saved_one_where_that_is_quick(
    folder: Path, monkeypatch: pytest.MonkeyPatch, asked: str, quick: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(dtype_of_model, "_cpu_is_quick", lambda _: quick)
    chosen = section(folder, dtype=asked)
    assert load_dtype(chosen, load_config(chosen)) is expected
    assert load_model(chosen).dtype is expected
    assert next(skeleton(chosen).parameters()).dtype is expected


def test_eos_pads_where_nothing_else_does(folder: Path) -> None:
    assert load_tokenizer(section(folder)).pad_token == "</s>"


def test_weights_that_are_not_all_there_are_refused_by_name(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    weights["model.norm.weight"] = torch.zeros(3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FileError) as refused:
        load_model(section(folder))
    lost = "model.layers.0.mlp.up_proj.weight, model.norm.weight"
    assert f"no weights of the right shape for {lost}\n" in str(refused.value)


def test_damaged_weights_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(FileError, match="cannot load the model"):
        load_model(section(folder))


def test_a_configuration_of_wrong_types_is_refused(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"num_hidden_layers": 1', '"num_hidden_layers": "one"'))
    with pytest.raises(FileError, match=r"cannot load the model .*\n.*num_hidden_layers"):
        load_config(ModelSection.of(str(folder)))


def test_a_folder_without_a_tokenizer_is_refused(folder: Path) -> None:
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(FileError, match=r"there is no tokenizer\.json in it"):
        load_tokenizer(section(folder))


def test_pickles_beside_safetensors_are_not_read(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert load_model(section(folder)).num_parameters() > 0


def test_the_built_in_base_says_what_it_is_and_not_where() -> None:
    assert Fingerprint.of(load_model(ModelSection(id="builtin:base"))).name == "builtin:base"


def test_so_does_a_base_that_was_quantised_as_it_was_read() -> None:
    plain, quantised = (load_model(ModelSection(id="builtin:base"), storage) for storage in (None, NF4()))
    assert Fingerprint.of(quantised) == Fingerprint.of(plain)
