"""Several methods in one run, each for its own layers: `method.also`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lorary
from lorary.adapters import load_adapter
from lorary.adapters.resolve import load_with_adapter
from lorary.errors import ConfigError, LoraryError
from lorary.model.loading.source import ModelSection
from lorary.spec.placement import by_method
from lorary.train import run
from lorary.train.config.load import from_dict
from lorary.train.runner.build import build_model
from lorary.train.runner.prepare import prepare
from tests.train.runs import base_folder, changed, configuration


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def words(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    return changed(configuration(base, Path("data.jsonl")), "training", max_steps=4, eval_steps=2, save_steps=2)


ADALORA = {"name": "adalora", "targets": "mlp", "r": 4, "options": {"target": 2, "start": 0, "final": 1}}
METHODS = {
    "lora and vera": {"name": "lora", "targets": "attention", "r": 4, "also": [{"name": "vera", "targets": "mlp"}]},
    "dora and adalora": {"name": "dora", "targets": "attention", "r": 4, "also": [ADALORA]},
    "pissa and lora-fa": {"name": "pissa", "targets": "attention", "also": [{"name": "lora-fa", "targets": "mlp"}]},
}


def equal(one: str, other: str) -> bool:
    a, b = load_adapter(one), load_adapter(other)
    return all(torch.equal(t, b.tensors[name][role]) for name, roles in a.tensors.items() for role, t in roles.items())


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_run_with_two_methods_is_saved_resumed_and_gone_on_from(
    words: dict[str, Any], method: dict[str, Any]
) -> None:
    words = words | {"method": method}
    done = run(from_dict(words), quiet=True)
    adapter = load_adapter(done.adapter)
    assert [len(group) for group in by_method(adapter.sites)] == [8, 6]
    resolved = yaml.safe_load(Path("out/config.resolved.yaml").read_text())["method"]
    assert resolved["also"][0]["r"] is not None
    card = Path("out/README.md").read_text()
    assert f"{method['name']} + {method['also'][0]['name']}" in card
    shutil.copytree("out", "again")
    for name in ("adapter", "checkpoints/checkpoint-4"):
        shutil.rmtree(Path("again") / name)
    run(from_dict(words | {"output": "again"}), resume=True, quiet=True)
    assert equal("out/adapter", "again/adapter")
    further = {k: v for k, v in words.items() if k != "method"} | {"model": {"id": words["model"], "adapter": "out"}}
    prepared = prepare(from_dict(further | {"output": "further"}))
    assert [len(group) for group in by_method(prepared.plan.sites)] == [8, 6]
    model = build_model(prepared)
    assert [s.method for s in lorary.attached(model).sites] == [s.method for s in adapter.sites]


def test_a_residual_start_beside_a_quantised_method_is_trained_merged_and_loaded(words: dict[str, Any]) -> None:
    """The base is then not quantised while it is read: the start of PiSSA needs its plain weights."""
    method = {"name": "qlora", "targets": "attention", "also": [{"name": "pissa", "targets": "mlp", "r": 4}]}
    done = run(from_dict(words | {"method": method}), quiet=True)
    adapter = load_adapter(done.adapter)
    assert {s.method.storage for s in adapter.sites} == {lorary.NF4()}
    assert [bool(group[0].starts) for group in by_method(adapter.sites)] == [False, True]
    model = load_with_adapter(ModelSection.of(words["model"]), done.adapter)
    assert len(lorary.attached(model).sites) == 14


BAD: list[tuple[dict[str, Any], str]] = [
    ({"name": "lora", "also": [{"name": "vera", "targets": "mlp"}]}, "`method.targets`: must be said beside"),
    ({"name": "lora", "targets": "mlp", "also": [{"targets": "mlp"}]}, "`method.also[0].name` is missing"),
    ({"name": "lora", "targets": "mlp", "also": [{"name": "vera"}]}, "`method.also[0].targets` is missing"),
    ({"name": "lora", "targets": "mlp", "also": [{"name": "vera", "target": "mlp"}]}, "did you mean `targets`?"),
    ({"name": "lora", "targets": "mlp", "also": [{"name": "vara", "targets": "q_proj"}]}, "`vara`"),
    ({"name": "lora", "targets": "mlp", "also": {"name": "vera"}}, "`also` must be a list"),
    ({"name": "lora", "targets": "mlp", "also": [{"name": "vera", "targets": "mlp"}]}, "names `mlp` again"),
    (
        {"name": "lora", "targets": "mlp", "also": [{"name": "vera", "targets": "q_proj", "options": {"ratio": 1}}]},
        "`ratio` is not an option of lora + vera",
    ),
]


@pytest.mark.parametrize(("method", "sentence"), BAD, ids=[sentence for _, sentence in BAD])
def test_mistakes_are_found_in_the_configuration(words: dict[str, Any], method: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(words | {"method": method})
    assert sentence in str(caught.value)


def test_layers_of_two_methods_are_refused(words: dict[str, Any]) -> None:
    method = {"name": "lora", "also": [{"name": "vera", "targets": "mlp"}], "targets": "all-linear"}
    with pytest.raises(LoraryError, match=r"LowRank \(`all-linear`\) and SharedProjectionDelta \(`mlp`\) both adapt"):
        prepare(from_dict(words | {"method": method}))
    with pytest.raises(ConfigError, match=r"all layers share \{A, B\} of SharedProjectionDelta already"):
        from_dict(words | {"method": METHODS["lora and vera"] | {"drop": {"threshold": 0.5}}})


def test_a_mistake_of_a_further_method_is_shown_where_it_is(words: dict[str, Any]) -> None:
    from lorary.train.config.load import load

    text = yaml.safe_dump({k: v for k, v in words.items() if k != "method"})
    Path("my.yaml").write_text(text + "method:\n  targets: attention\n  also:\n    - name: vara\n      targets: mlp\n")
    line = 1 + Path("my.yaml").read_text().splitlines().index("    - name: vara")
    with pytest.raises(ConfigError, match=rf"my\.yaml:{line}:\d+: `vara`"):
        load("my.yaml")
