"""Adapters written by every release so far still load, and today's writer still gives the same bytes.

The folders under `tests/golden` are never written anew: a release that changes the format adds folders of its own,
and reads these. Their numbers come from arithmetic alone, so that they are the same on every machine.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lorary
from lorary import Adapter, Fingerprint, Placed, Site
from lorary.sites import Part

GOLDEN = Path(__file__).parent.parent / "golden"
FILES = {
    "lora-0.1.0/adapter_config.json": "851023a13e7b57d963ec182e33e731b592a778da852bde453286b080a5794427",
    "lora-0.1.0/adapter_model.safetensors": "5628e1335a848212dc0965faf637cad1a631b2d9d5c0da6c531569f75fde66a1",
    "lora-0.1.0/lorary.json": "eb129f67d5c9ea58c68be35ad0f93987af619e8f1e8fbb3e13702643b19d7d5c",
    "grouped-0.1.0/adapter.safetensors": "d6a91fc931fc5f19e49770779e83fa644cb1fdad83a290f6ac2f443e56aa49b6",
    "grouped-0.1.0/lorary.json": "fc0d9c43744d7a53b4d56c4227a250e5e7f752e5eda5e8a8f038e12206cbbb67",
}


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sevenths and their like, exact in 16 bits."""
    count = int(torch.Size(shape).numel())
    return ((torch.arange(count) * 37 % 64 - 31) / 64).reshape(shape).to(dtype)


def lora() -> Adapter:
    """Every kind of site that PEFT has, two ranks, a fused weight, biases and several dtypes."""
    method = lorary.method("rslora", "lora+", r=2, alpha=3, dropout=0.125, full=("bias",))
    small = lorary.method("rslora", "lora+", r=1, alpha=0.3, dropout=0.125, full=("bias",))
    sites = (
        Site("wte", "embedding", 4, 9, bias=False),
        Site("h.0.attn.c_attn", "transposed", 12, 4, bias=True, parts=(Part("q", 0, 4), Part("v", 8, 4))),
        Site("h.0.mlp.c_fc", "transposed", 8, 4, bias=True),
        Site("h.1.mlp.c_fc", "transposed", 8, 4, bias=True),
        Site("conv", "conv2d", 3, 12, bias=False, window=(3, 2)),
        Site("head.1", "linear", 5, 4, bias=False),
    )
    placed = tuple(Placed(site, small if site.name == "h.1.mlp.c_fc" else method) for site in sites)
    dtype = {"conv": torch.bfloat16, "head.1": torch.float16}
    tensors = {
        p.site.name: {
            role: numbers(*shape, dtype=dtype.get(p.site.name, torch.float32)) for role, shape in p.shapes.items()
        }
        for p in placed
    }
    full = {"h.0.mlp.c_fc.bias": numbers(8), "ln_f.bias": numbers(4)}
    return Adapter(method, placed, tensors, full, Fingerprint("GPT2LMHeadModel", "0" * 64, "1" * 64, "org/base"))


def grouped() -> Adapter:
    """What PEFT has no words for."""
    method = lorary.method("lora", r=2, alpha=8)
    placed = (Placed(Site("conv", "conv1d", 6, 4, bias=True, groups=2, window=(2,)), method),)
    tensors = {"conv": {role: numbers(*shape) for role, shape in placed[0].shapes.items()}}
    return Adapter(method, placed, tensors, {"norm.weight": numbers(6)}, Fingerprint("Net"))


ADAPTERS = {"lora-0.1.0": lora, "grouped-0.1.0": grouped}


@pytest.mark.parametrize("path", FILES)
def test_the_files_are_those_of_the_release(path: str) -> None:
    assert hashlib.sha256((GOLDEN / path).read_bytes()).hexdigest() == FILES[path]


def test_no_other_file_is_there() -> None:
    assert {p.relative_to(GOLDEN).as_posix() for p in GOLDEN.rglob("*") if p.is_file()} == set(FILES)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_old_folder_loads_to_the_last_bit(name: str) -> None:
    read, expected = Adapter.load(GOLDEN / name), ADAPTERS[name]()
    assert (read.method, read.placed, read.base) == (expected.method, expected.placed, expected.base)
    for site, roles in expected.tensors.items():
        assert {role: t.dtype for role, t in read.tensors[site].items()} == {r: t.dtype for r, t in roles.items()}
        assert all(torch.equal(read.tensors[site][role], t) for role, t in roles.items())
    assert read.full.keys() == expected.full.keys()
    assert all(torch.equal(read.full[key], t) for key, t in expected.full.items())


@pytest.mark.parametrize("name", ADAPTERS)
def test_todays_writer_gives_the_same_bytes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorary.formats.native.__version__", name.rpartition("-")[2])
    ADAPTERS[name]().save(tmp_path / name)
    for path in sorted((tmp_path / name).iterdir()):
        assert path.read_bytes() == (GOLDEN / name / path.name).read_bytes(), path.name
