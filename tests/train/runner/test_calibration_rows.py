"""Starts that read the training rows, from a configuration: they begin, go on after a kill, and end in plain files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lorary
from lorary.errors import ConfigError
from lorary.train import run
from lorary.train.config.load import from_dict
from lorary.train.config.yaml_source import dump
from tests.train.runs import base_folder, changed, configuration

OPTIONS: dict[str, dict[str, Any]] = {"lora-ga": {"gamma": 256.0}, "corda": {}, "eva": {"samples": 8, "rho": 3.0}}


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    return configuration(base_folder(tmp_path / "base"), tmp_path / "data.jsonl")


def with_method(words: dict[str, Any], *names: str) -> dict[str, Any]:
    options = {k: v for name in names for k, v in OPTIONS[name].items()}
    return words | {"method": {"name": list(names), "r": 3, "options": options}}


@pytest.mark.parametrize("name", OPTIONS)
def test_trained_and_resumed(words: dict[str, Any], name: str, tmp_path: Path) -> None:
    tree = with_method(words, name)
    assert run(from_dict(tree), quiet=True).steps == 6
    adapter = tmp_path / "out" / "adapter"
    files = {path.name: path.read_bytes() for path in adapter.glob("*.safetensors")}
    shutil.rmtree(adapter)
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "checkpoint-6")  # as a kill after step 4 leaves it
    run(from_dict(tree), quiet=True, resume=True)
    assert {path.name: path.read_bytes() for path in adapter.glob("*.safetensors")} == files
    saved = lorary.load_adapter(adapter)
    ranks = {p.r for p in saved.sites}
    assert (ranks == {3}) == (name != "eva")
    assert sum(p.r for p in saved.sites) == 42
    assert f"{sum(p.trainable for p in saved.sites):,}" in (tmp_path / "out" / "README.md").read_text()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = lorary.load(base, adapter)
    ids = torch.randint(5, 200, (1, 9))
    live = model(ids).logits.detach().float()
    merged = lorary.merge(model)(ids).logits.detach().float()
    assert (live - merged).abs().max() < 0.05 * live.abs().max()  # in bfloat16


def test_the_seed_draws_the_rows(words: dict[str, Any], tmp_path: Path) -> None:
    starts = {}
    for label, seed, output in (("one", 1, "a"), ("same", 1, "b"), ("other", 2, "c")):
        tree = changed(with_method(words, "lora-ga") | {"output": output}, "training", seed=seed, max_steps=2)
        tree = changed(tree, "training", save_steps=None, eval_steps=None)
        run(from_dict(tree), quiet=True)
        adapter = lorary.load_adapter(tmp_path / output / "adapter")
        starts[label] = torch.cat([roles["A0"].flatten() for roles in adapter.tensors.values()])
    assert torch.equal(starts["one"], starts["same"])
    assert not torch.equal(starts["one"], starts["other"])


def test_tasks_whose_rows_have_no_labels_are_refused(words: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"prompt": "hello", "chosen": " the answer", "rejected": " is"}] * 6
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = changed(with_method(words, "eva") | {"task": "dpo"}, "data", train=str(tmp_path / "pairs.jsonl"))
    with pytest.raises(ConfigError, match="InputDirectionsInit reads rows that have labels, and preference pairs have"):
        run(from_dict(tree), quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_labelled_text_is_read_with_its_label(words: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"text": f"hello {w}", "label": w} for w in ("the", "answer") * 8]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = with_method(words, "lora-ga") | {"task": "classification"}
    tree = changed(tree, "data", train=str(tmp_path / "texts.jsonl"))
    assert run(from_dict(changed(tree, "training", max_steps=2)), quiet=True).steps == 2
    adapter = lorary.load_adapter(tmp_path / "out" / "adapter")
    assert all(roles["A0"].any() for roles in adapter.tensors.values())


def test_lora_drop_is_refused(words: dict[str, Any]) -> None:
    tree = with_method(words, "eva")
    tree["method"] |= {"drop": {"threshold": 0.9}}
    with pytest.raises(ConfigError, match="InputDirectionsInit starts each layer from its own inputs"):
        run(from_dict(tree), quiet=True)


@pytest.mark.slow
def test_two_processes_start_as_one_does(words: dict[str, Any], tmp_path: Path) -> None:
    tree = changed(with_method(words, "lora-ga"), "training", max_steps=2, save_steps=None, eval_steps=None)
    run(from_dict(tree | {"output": str(tmp_path / "one")}), quiet=True)
    (tmp_path / "my.yaml").write_text(dump(changed(tree | {"output": str(tmp_path / "two")}, "training", batch_size=2)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, "-m", "lorary", "train", str(tmp_path / "my.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    one, two = (lorary.load_adapter(tmp_path / name / "adapter").tensors for name in ("one", "two"))
    assert len(one) == 14
    for name in one:
        starts = [roles["B0"] @ roles["A0"] for roles in (one[name], two[name])]
        torch.testing.assert_close(*starts, rtol=1e-3, atol=1e-5)
