"""Arguments of the wrong type: an error of the package that names the argument, and nothing changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorary
from lorary.adapters.peft.export import export_peft
from tests.tiny import shaken

METHOD = lorary.method("lora", r=2)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))


def attached() -> nn.Module:
    return lorary.attach(net(), lorary.plan(net(), METHOD))


def adapter() -> lorary.Adapter:
    return lorary.Adapter.of(attached())


def plan() -> lorary.Plan:
    return lorary.plan(net(), METHOD)


def disable(model: Any) -> None:
    with lorary.disabled(model):
        pass


MODELS: dict[str, Callable[[Any], Any]] = {
    "plan": lambda m: lorary.plan(m, METHOD),
    "attach": lambda m: lorary.attach(m, plan()),
    "detach": lorary.detach,
    "disabled": disable,
    "attached": lorary.attached,
    "merge": lorary.merge,
    "unmerge": lorary.unmerge,
    "quantize": lorary.quantize,
    "dequantize": lorary.dequantize,
    "switch": lambda m: lorary.switch(m, adapter()),
    "named_adapters": lorary.named_adapters,
    "load": lambda m: lorary.load(m, "."),
    "save": lambda m: lorary.save(m, "never"),
    "save_adapter": lambda m: lorary.save_adapter(adapter(), "never", model=m),
    "load_adapter": lambda m: lorary.load_adapter(".", model=m),
    "save_quantized": lambda m: lorary.save_quantized(m, "never"),
    "param_groups": lambda m: lorary.param_groups(m, 1e-3),
    "rules": lambda m: lorary.rules(m, 3),
    "layer_importance": lambda m: lorary.layer_importance(m, []),
    "ranks_from_gradients": lambda m: lorary.ranks_from_gradients(m, {}, plan()),
    "search_supernet": lambda m: lorary.search_supernet(m, lambda model: 1.0),
    "Adapter.of": lorary.Adapter.of,
    "Adapter.low_rank": lambda m: adapter().low_rank(m),
    "Fingerprint.of": lorary.Fingerprint.of,
    "MergeCheck.of": lorary.MergeCheck.of,
    "compress": lambda m: lorary.compress(adapter(), kl=0.1, model=m, rows=[[1], [2]]),
}


@pytest.mark.parametrize("wrong", [0, "model", [], nn.Linear, torch.ones(2)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_not_a_model(name: str, wrong: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(lorary.LoraryError):
        MODELS[name](wrong)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [None, 3, b"folder", ["folder"], "a\0b"], ids=repr)
@pytest.mark.parametrize(
    "call",
    [
        lambda path: lorary.save(attached(), path),
        lambda path: lorary.save_adapter(adapter(), path),
        lambda path: lorary.load(net(), path),
        lorary.load_adapter,
        lambda path: export_peft(adapter(), path),
        lorary.load_quantized,
        lambda path: lorary.save_quantized(net(), path),
        lambda path: lorary.extract(path, "tuned", rank=1),
    ],
)
def test_what_is_not_a_path(call: Callable[[Any], Any], wrong: Any) -> None:
    with pytest.raises(lorary.FileError, match=r"folder: is a \w+, not a (path|text)|it holds a null character"):
        call(wrong)


@pytest.mark.parametrize("batches", [torch.ones(3, 8), {"input": torch.ones(3, 8)}, "text", 3])
def test_a_batch_is_no_series_of_batches(batches: Any) -> None:
    with pytest.raises(lorary.DataError, match=r"batches: is (one|a) \w+"):
        lorary.layer_importance(attached(), batches)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: lorary.attach(net(), plan(), seed="0"), lorary.PlanError, "seed: is '0', not a whole number"),
        (lambda: lorary.attach(net(), plan(), seed=None), lorary.PlanError, "seed: is None, not a whole number"),
        (lambda: lorary.switch(net(), torch.ones(2)), lorary.FileError, "is not an adapter"),
        (lambda: lorary.rules(attached(), 3, "adamw"), lorary.ConfigError, "optimizer: is a str, not an optimizer"),
        (lambda: lorary.drop_layers(None, None), lorary.PlanError, "plan: is a NoneType, not a Plan"),
        (lambda: lorary.drop_layers(plan(), {}), lorary.PlanError, "importance: is a dict, not an Importance"),
        (lambda: lorary.layer_importance(attached(), [], over_ranks=3), lorary.DataError, "over_ranks: is a int"),
        (lambda: lorary.MergeCheck.of(attached(), {"input_ids": [1]}), lorary.DataError, "rows: is a dict"),
    ],
)
def test_what_else_is_wrong(call: Callable[[], Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        call()


def test_a_refused_seed_attaches_nothing() -> None:
    model = net()
    with pytest.raises(lorary.PlanError):
        lorary.attach(model, plan(), seed=1.5)  # type: ignore[arg-type]
    assert lorary.attached(model) is None


# --- models without values --------------------------------------------------------------------------------------------


def on_meta(method: str = "lora") -> nn.Module:
    model = net().to("meta")
    return lorary.attach(model, lorary.plan(model, lorary.method(method, r=2)))


@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_an_adapter_without_values_is_not_saved(method: str, tmp_path: Path) -> None:
    with pytest.raises(lorary.FileError, match="has no values: its model is on the meta device"):
        lorary.save(on_meta(method), tmp_path / "never")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_does_not_lose_its_values_on_a_base_that_has_none(tmp_path: Path) -> None:
    trained = adapter()
    lorary.save(shaken(attached()), tmp_path)
    said = "0 and 1 more: is on the meta device, where the adapter would lose its values"
    with pytest.raises(lorary.FileError, match=said):
        lorary.switch(net().to("meta"), trained)
    with pytest.raises(lorary.FileError, match=said):
        lorary.load(net().to("meta"), tmp_path)


@pytest.mark.parametrize(
    "measure", [lambda m: lorary.layer_importance(m, [torch.ones(2, 8)]), lambda m: lorary.MergeCheck.of(m)]
)
def test_nothing_is_measured_on_a_model_without_values(measure: Callable[[Any], Any]) -> None:
    with pytest.raises(lorary.StateError, match="is on the meta device and has no values"):
        measure(on_meta())
