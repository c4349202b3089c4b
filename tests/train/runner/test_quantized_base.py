"""A run reads its base straight into 4 bits, but where the method needs the plain weights first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lorary
from lorary.layers.nf4 import NF4Linear
from lorary.model.loading import quantized
from lorary.model.loading.from_pretrained import load_model
from lorary.train.config.load import from_dict
from lorary.train.runner.build import build_model
from lorary.train.runner.prepare import prepare
from tests import tiny
from tests.train.runs import base_folder, changed, configuration


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("run")
    return configuration(base_folder(folder / "base"), folder / "data.jsonl")


@pytest.mark.parametrize(
    ("names", "straight"),
    [(["qlora"], True), (["qlora", "dora"], True), (["qlora", "pissa"], False), (["lora"], False)],
)
def test_a_run_holds_no_plain_base(
    words: dict[str, Any], names: list[str], straight: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(from_dict(changed(words, "method", name=names)))
    read: list[Any] = []
    load = quantized.load
    monkeypatch.setattr(quantized, "load", lambda *given, **more: read.append(given) or load(*given, **more))
    model = build_model(prepared)
    assert bool(read) == straight
    plain = lorary.attach(load_model(prepared.config.model), prepared.plan, seed=prepared.config.training.seed)
    assert tiny.same(model.state_dict(), plain.state_dict())
    assert any(isinstance(module, NF4Linear) for module in model.modules()) == ("qlora" in names)


def test_a_base_that_was_packed_and_saved_is_taken_as_it_is(words: dict[str, Any], tmp_path: Path) -> None:
    base = words["model"]
    # said, for a CPU with 16-bit arithmetic would take bfloat16, and the files say in which the layers compute
    lorary.save_quantized(lorary.load_quantized(base, lorary.NF4(double=False), dtype="float32"), tmp_path / "packed")
    for file in Path(base).glob("token*"):
        (tmp_path / "packed" / file.name).write_bytes(file.read_bytes())
    for names in (["qlora"], ["lora"]):
        model = build_model(
            prepare(from_dict(changed(words, "method", name=names) | {"model": str(tmp_path / "packed")}))
        )
        layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
        assert len(layers) == 14
        assert all(layer.nested_absmax is None for layer in layers)
        expected = tiny.logits(lorary.load_quantized(base, lorary.NF4(double=False), dtype="float32"))
        torch.testing.assert_close(tiny.logits(model.float()), expected, rtol=0, atol=1e-6)
