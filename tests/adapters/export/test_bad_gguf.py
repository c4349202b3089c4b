"""Adapters that llama.cpp cannot run, and bad arguments: the reason, and nothing written."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import pytest

import lorary
from lorary.adapters.export.gguf import export_gguf
from lorary.errors import FileError
from lorary.methods.token_rows import TokenRows
from lorary.model.fingerprint import Fingerprint
from tests import tiny
from tests.adapters import models
from tests.adapters.export.made import MERGED, longer, of, plain
from tests.adapters.models import BASES
from tests.files.test_atomic import largest_file

LLAMA, GPT2, BERT, CONV = BASES


def spoilt(adapter: lorary.Adapter, number: float) -> lorary.Adapter:
    tensors = {site: {role: t.clone() for role, t in roles.items()} for site, roles in adapter.tensors.items()}
    tensors["model.layers.0.self_attn.q_proj"]["A"][0, 0] = number
    return dataclasses.replace(adapter, tensors=tensors)


ADDED = lorary.method("rows", tokens=(3, 7)).replace(join=TokenRows((3, 7), ("<b>",)))
REFUSED: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "DoRA": (
        lambda: plain("dora"),
        LLAMA.model,
        {},
        "model.layers.0.self_attn.q_proj and 5 more: DoRA does more than add B A x, and an adapter for "
        f"llama.cpp does only that{MERGED}",
    ),
    "norms in full": (
        lambda: plain("lora", full=("*norm*",)),
        LLAMA.model,
        {},
        "model.layers.0.input_layernorm.weight and 4 more: is trained in full, and an adapter for llama.cpp holds "
        f"low-rank updates only{MERGED}",
    ),
    "an unknown architecture": (
        lambda: lorary.Adapter.of(models.adapted(BERT)),
        BERT.model,
        {},
        "base: llama.cpp's form of 'bert' is not known; lorary knows it of apertus, arcee, ",
    ),
    "a model that is none of Transformers'": (
        lambda: lorary.Adapter.of(models.adapted(CONV)),
        CONV.model,
        {},
        "base: llama.cpp's form of 'ConvNet' is not known",
    ),
    "NaN": (
        lambda: spoilt(plain(), float("nan")),
        LLAMA.model,
        {},
        "blk.0.attn_q.weight.lora_a: 1 of 64 values are NaN or infinite, the first at [0, 0]",
    ),
    "beyond float16": (
        lambda: spoilt(plain(), 1e5),
        LLAMA.model,
        {"dtype": "float16"},
        "blk.0.attn_q.weight.lora_a: holds numbers beyond the range of float16\n      hint: export in float32",
    ),
    "an unknown dtype": (
        plain,
        LLAMA.model,
        {"dtype": "int8"},
        "dtype: is 'int8'; GGUF's adapters take float32, float16, bfloat16",
    ),
    "tokens that the base's tokenizer does not have": (
        lambda: of(LLAMA.model(), ADDED, "vocabulary"),
        LLAMA.model,
        {},
        "tokens: '<b>' (7): added to the tokenizer, and llama.cpp reads texts with the base's own"
        f"{MERGED}, which holds the tokenizer as well",
    ),
    "another base": (
        plain,
        tiny.llama,
        {},
        "base: other layers or sizes: ",
    ),
    "another size, of an adapter that does not say its base": (
        lambda: dataclasses.replace(plain(), base=Fingerprint()),
        lambda: tiny.llama(intermediate_size=32),
        {},
        "model.layers.0.mlp.down_proj and 1 more: has 32 input features, expected 24",
    ),
    "a layer that the base lacks": (
        lambda: dataclasses.replace(plain(), base=Fingerprint()),
        lambda: tiny.llama(num_hidden_layers=1),
        {},
        "model.layers.1.self_attn.q_proj and 2 more: the model has no such module",
    ),
    "no adapter": (lambda: "out", LLAMA.model, {}, "adapter: is a str, not an Adapter"),
    "no model": (plain, lambda: "llama", {}, "model: is a str, not a torch.nn.Module"),
    "a tied embedding": (
        lambda: of(tiny.seeded("LlamaForCausalLM", tie_word_embeddings=True), targets=["embed_tokens"]),
        lambda: tiny.seeded("LlamaForCausalLM", tie_word_embeddings=True),
        {},
        f"model.embed_tokens: the embedding and the LM head are one weight, which an adapter elsewhere cannot change "
        f"in both{MERGED}",
    ),
    "YaRN": (
        lambda: longer(tiny.seeded("LlamaForCausalLM"), "yarn"),
        lambda: tiny.seeded("LlamaForCausalLM"),
        {},
        f"context: it needs RoPE scaling of type 'yarn'; llama.cpp's is known for `linear` alone{MERGED}",
    ),
    "a head that llama.cpp does not adapt": (
        lambda: of(tiny.seeded("CohereForCausalLM", tie_word_embeddings=False), targets=["embed_tokens"]),
        lambda: tiny.seeded("CohereForCausalLM", tie_word_embeddings=False),
        {},
        "model.embed_tokens: llama.cpp's command-r is not known to adapt its embedding and its LM head correctly"
        f"{MERGED}",
    ),
}


@pytest.mark.parametrize(("make", "base", "options", "sentence"), REFUSED.values(), ids=REFUSED)
def test_refused(make: Any, base: Any, options: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(FileError) as error:
        export_gguf(make(), tmp_path / "out", model=base(), **options)
    assert f"cannot export an adapter to '{tmp_path}/out' as GGUF\n" in str(error.value)
    assert f"  - {sentence}" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_folder_in_the_way_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(FileError, match="a file of this name is in the way"):
        export_gguf(plain(), tmp_path / "out", model=LLAMA.model())
    assert (tmp_path / "out").read_text() == "a file"


def test_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(
        FileError, match=r"the package `gguf` is not installed\n      hint: pip install 'lorary\[gguf\]'"
    ):
        export_gguf(plain(), tmp_path / "out", model=LLAMA.model())


def test_a_package_older_than_the_architecture_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(gguf.MODEL_ARCH_NAMES, gguf.MODEL_ARCH.LLAMA)
    with pytest.raises(FileError, match=r"package `gguf` does not know llama.cpp's llama\n      hint: pip "):
        export_gguf(plain(), tmp_path / "out", model=LLAMA.model())
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_is_said_and_nothing_is_left(tmp_path: Path) -> None:
    with largest_file(2048), pytest.raises(FileError) as caught:
        export_gguf(plain("lora"), tmp_path / "out", model=LLAMA.model())
    assert str(caught.value).startswith(f"cannot write '{tmp_path / 'out'}'; what was there before is unchanged")
    assert "hint: free some space" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
