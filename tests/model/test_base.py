"""The base of adapters, walked once: what it says of a model, and that readers use it as they use the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorary
from lorary.errors import FileError
from lorary.layers.adapted import unwrapped_modules
from lorary.model.base import Base
from tests import tiny


def qwen(**options: Any) -> Any:
    return tiny.seeded("Qwen2ForCausalLM", **options)


def test_an_adapted_model_has_the_base_of_the_plain_one() -> None:
    plain, model = Base(qwen()), qwen()
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2), "all-linear"))
    seen = Base(model)
    assert list(seen.modules) == list(plain.modules)
    assert seen.kinds == plain.kinds
    assert seen.tensors.keys() == plain.tensors.keys()
    assert {path: seen.site(path) for path in seen.kinds} == {path: plain.site(path) for path in plain.kinds}
    assert {seen.dtype(path) for path in seen.kinds} == {torch.float32}
    assert seen.fingerprint == plain.fingerprint


def test_a_tied_tensor_has_one_first_name() -> None:
    base = Base(qwen(tie_word_embeddings=True))
    assert base.tensors["lm_head.weight"] is base.tensors["model.embed_tokens.weight"]
    assert base.first_names["lm_head.weight"] == base.first_names["model.embed_tokens.weight"]
    assert base.first_names["model.norm.weight"] == "model.norm.weight"


def test_layers_that_are_quantised_or_without_values_are_known() -> None:
    model = qwen()
    lorary.attach(model, lorary.plan(model, lorary.method("qlora", r=2), ["q_proj"]))
    quantised = Base(lorary.detach(model))
    assert quantised.kinds.keys() - quantised.quantized == {"lm_head", "model.embed_tokens"}
    assert not quantised.empty
    with torch.device("meta"):
        assert Base(nn.Sequential(nn.Linear(2, 3), nn.ReLU())).empty == {"0"}


def test_what_is_known_is_kept_and_a_base_is_its_own() -> None:
    base = Base(model := qwen()).walk()
    path = next(path for path in base.kinds if path.endswith("q_proj"))
    assert Base.of(base) is base
    assert base.modules is base.modules
    assert base.site(path) is base.site(path)
    assert Base.of(model).model is model
    assert list(base.modules) == list(unwrapped_modules(model))
    known = lorary.Fingerprint(name="mine")
    assert Base(model, known).fingerprint is known


@pytest.mark.parametrize("peft", [True, False])
def test_readers_take_it_as_they_take_the_model(peft: bool, tmp_path: Path) -> None:
    model = qwen()
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2), ["q_proj", "v_proj"]))
    lorary.save(tiny.shaken(model), tmp_path / "a")
    if peft:
        (tmp_path / "a" / "lorary.json").unlink()
    base, other = Base(qwen()).walk(), Base(qwen(hidden_size=32)).walk()
    for _ in range(2):
        first, again = (lorary.load_adapter(tmp_path / "a", model=m) for m in (qwen(), base))
        assert first.sites == again.sites
        assert all(
            torch.equal(t, again.tensors[site][role]) for site, own in first.tensors.items() for role, t in own.items()
        )
        if peft:
            with pytest.raises(FileError) as told:
                lorary.load_adapter(tmp_path / "a", model=other)
            with pytest.raises(FileError) as expected:
                lorary.load_adapter(tmp_path / "a", model=qwen(hidden_size=32))
            assert told.value.problems == expected.value.problems
