"""Adapters by their id on the Hub: from a server on this machine, and from the cache alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lorary
from lorary.adapters.hub import is_hub_id
from lorary.adapters.resolve import find_adapter
from lorary.errors import FileError
from tests.adapters.hub_server import hub
from tests.train.runs import llama


def adapter(folder: Path) -> Path:
    """A saved adapter of a tiny Llama, and files beside it that must not be fetched."""
    model = llama()
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2)), seed=3)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.1)
    lorary.save(model, folder)
    (folder / "training_args.bin").write_bytes(b"a pickle")
    (folder / "adapter_model.bin").write_bytes(b"a pickle")
    (folder / "README.md").write_text("# card\n")
    return folder


# What a user's Python does with these ids; it answers with what came of each.
ASK = """
import json, sys
import lorary
from lorary.adapters.resolve import adapter_at

def said(function, name):
    try:
        found = function(name)
    except lorary.FileError as error:
        return str(error)
    return None if found is None else str(getattr(found, "size", found))

names = json.loads(sys.argv[1])
print(json.dumps([said(lorary.load_adapter, name) for name in names] + [said(adapter_at, "ann/model")]))
"""


def ask(names: list[str], where: Path, **environment: str) -> list[str]:
    """What a new Python answers to ids."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | environment
    env |= {"HF_HOME": str(where / "home"), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(names)], cwd=where, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_an_id_is_downloaded_without_pickles_and_refusals_say_why(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter")
    run = tmp_path / "run"
    shutil.copytree(folder, run / "adapter")
    (run / "metrics.jsonl").write_text("{}\n")
    base = tmp_path / "model"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"0" * 100)
    style = tmp_path / "style"
    style.mkdir()
    tensors = {"unet.x.lora_A.weight": torch.ones(2, 4), "unet.x.lora_B.weight": torch.ones(4, 2)}
    save_file(tensors, style / "pytorch_lora_weights.safetensors")
    size = str(lorary.load_adapter(folder).size)
    names = ["ann/adapter", "ann/run", "ann/style", "ann/model", "private/one", "gated/one", "missing/one", "ann/..x"]
    with hub({"ann/adapter": folder, "ann/run": run, "ann/style": style, "ann/model": base}) as (address, asked):
        plain, nested, single, model, private, gated, missing, odd, at = ask(names, tmp_path, HF_ENDPOINT=address)
    assert (plain, nested, single) == (size, size, "64")
    assert sorted({*asked}) == [
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/lorary.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "lorary.json",
        "pytorch_lora_weights.safetensors",
    ]
    neither = "holds neither lorary.json nor adapter_config.json\n"
    assert model.endswith(f"{neither}      hint: this looks like a whole model: load it as the base")
    assert at is None, "a whole model is no adapter"
    assert private == (
        "cannot load private/one:\n  - private/one: there is no such folder; the Hub has no such repository, or it is "
        "private\n      hint: check the name, and set HF_TOKEN if it is"
    )
    assert "the Hub gives it to approved users only\n      hint: accept its terms on its page, and set HF_" in gated
    assert "the Hub has no such repository, or it is private" in missing
    assert "there is no such folder" in odd
    # without a network, from the cache; and an id that was never downloaded
    cached, unknown, _ = ask(["ann/adapter", "ann/other"], tmp_path, HF_ENDPOINT=address, HF_HUB_OFFLINE="1")
    assert cached == size
    assert unknown == (
        "cannot load ann/other:\n  - ann/other: there is no such folder; HF_HUB_OFFLINE is set and the local cache has "
        "no copy\n      hint: download it first, or check the network"
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ann/adapter", True),
        ("runs/first", False),  # a folder `runs` is here: the path is mistyped
        ("./ann/adapter", False),
        ("ann", False),
        ("ann/a/b", False),
        ("~/adapter", False),
        ("/ann/adapter", False),
        ("../adapter", False),
    ],
)
def test_an_id_is_told_from_a_path(name: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    assert is_hub_id(name) is expected


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    adapter(Path("ann/adapter"))
    assert find_adapter("ann/adapter", "merge") == Path("ann/adapter")
    with pytest.raises(FileError, match="there is no such folder\n      hint: did you mean `adapter`"):
        lorary.load_adapter("ann/adaptor")


def test_a_downloaded_adapter_goes_onto_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the cache as the Hub's client lays it out: links into `blobs`, also of an adapter in a run's folder."""
    folder = adapter(tmp_path / "adapter")
    snapshot = tmp_path / "cache/models--ann--run/snapshots/0123/adapter"
    blobs = tmp_path / "cache/models--ann--run/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, blobs / str(i))
        (snapshot / file.name).symlink_to(Path("../../../blobs") / str(i))
    one, two = (lorary.load(llama(), path) for path in (folder, snapshot))
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(one(input_ids=ids).logits, two(input_ids=ids).logits)
