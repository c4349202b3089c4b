"""From disk to the host: adapters of real files on a tiny base, and what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorary
from lorary.adapters import tensor_checks
from lorary.files import safe_open
from lorary.layers import adapted
from lorary.serve.forms.form import serving_form
from lorary.serve.interface import BusyError
from lorary.serve.open import engine_of
from lorary.serve.pool import loader as loader_module
from lorary.serve.pool.adapter_root import AdapterRoot
from lorary.serve.pool.arena import PlainArena
from lorary.serve.pool.loader import Limits, Loader, folder_digest
from lorary.serve.pool.pool import Pool
from lorary.serve.pool.registry import Registry
from lorary.serve.request import Request, Sampling
from tests import tiny
from tests.serve.flats import own_tensors
from tests.serve.running import saved_adapter, submitted, words

METHODS = {
    "lora": lorary.method("lora", r=3, alpha=6),
    "dora": lorary.method("dora", r=2),
    "vera": lorary.method("vera", r=4),
    "pissa": lorary.method("pissa", r=2),
    "melora": lorary.method("melora", r=2, n=2),
    "bitfit": lorary.method("bitfit"),
}


def base() -> Any:
    return tiny.seeded("Qwen2ForCausalLM")  # with biases


def saved(folder: Path, method: lorary.Method, seed: int = 3) -> Path:
    """An adapter folder of a method, as after training."""
    model = base()
    lorary.attach(model, lorary.plan(model, method, "all-linear" if method.delta else None))
    lorary.save(tiny.shaken(model, seed=seed), folder)  # type: ignore[arg-type]
    return folder


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return saved(tmp_path / "root" / "a", METHODS["lora"])


@pytest.fixture
def peft(lora: Path) -> Path:
    (lora / "lorary.json").unlink()
    return lora


# --- what is loaded ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(METHODS))
def test_an_adapter_beside_the_base_is_its_serving_form(name: str, tmp_path: Path) -> None:
    folder, model = saved(tmp_path / name, METHODS[name]), base()
    expected = serving_form(lorary.load_adapter(folder), model)
    loaded = Loader(model).load(folder, name)
    pool = Pool(PlainArena(2**18, 2**12), host_bytes=2**18)
    pool.put("u", loaded.flat)
    found = pool.bring("u")
    assert found is not None
    pairs = list(zip(own_tensors(found), own_tensors(expected), strict=True))
    assert pairs
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
    assert [site.shared for site in found.sites.values()] == [site.shared for site in expected.sites.values()]
    assert found.shared.keys() == expected.shared.keys()
    assert (found.kind, found.rank, found.method) == (expected.kind, expected.rank, expected.method)


def test_equal_bytes_have_an_equal_digest_wherever_they_are(lora: Path, tmp_path: Path) -> None:
    other = saved(tmp_path / "other", METHODS["lora"], seed=4)
    copy = Path(shutil.copytree(lora, tmp_path / "copy"))
    assert folder_digest(lora) == folder_digest(copy) != folder_digest(other)
    for folder in (lora, copy, other):
        (folder / "lorary.json").unlink()
    assert folder_digest(lora) == folder_digest(copy) != folder_digest(other)
    assert Loader(base()).load(lora, "a").flat.form.uid == folder_digest(lora)
    (copy / "README.md").write_text("another")
    assert folder_digest(lora) == folder_digest(copy)
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 7}))
    assert folder_digest(lora) != folder_digest(copy)


def test_the_base_is_measured_once(lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, calls = Loader(base()), list[Any]()
    monkeypatch.setattr("lorary.model.fingerprint._plain_samples", lambda model: calls.append(model))
    reader.load(lora, "a")
    assert calls == []


def test_the_base_is_walked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [saved(tmp_path / name, METHODS[name]) for name in ("lora", "dora", "vera", "pissa")]
    peft = Path(shutil.copytree(folders[0], tmp_path / "peft"))
    (peft / "lorary.json").unlink()
    model = base()
    reader, walks = Loader(model), list[str]()

    def count(owner: Any, name: str) -> None:
        walk = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: (walks.append(name), walk(*args, **kwargs))[1])

    for owner, name in ((adapted, "named_modules"), (nn.Module, "named_modules"), (nn.Module, "named_children")):
        count(owner, name)
    for folder in (*folders, peft):
        assert reader.load(folder, "a").flat.bytes
    assert walks == []
    Loader(model)
    assert set(walks) == {"named_modules", "named_children"}


def test_values_are_looked_at_once_and_not_copied(lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of finite values takes one pass over it, without a tensor of flags as large as it."""
    monkeypatch.setattr(torch, "isfinite", None)
    monkeypatch.setattr(tensor_checks, "out_of_range", lambda tensors: [1 / 0] if tensors else [])
    assert Loader(base()).load(lora, "a").flat.bytes


def test_the_neighbours_of_an_adapter_are_not_listed(lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safe_open, "recover", None)
    assert Loader(base()).load(lora, "a").flat.bytes


# --- what is refused --------------------------------------------------------------------------------------------------


def cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def changed(edit: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path)

    return change


def configured(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))


def pickled_under_another_name(folder: Path) -> None:
    torch.save({"a": torch.ones(3)}, folder / "adapter_model.safetensors")


def large_header(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}" + bytes(64))


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def linked_outside(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.rename(folder.parent.parent / "weights.safetensors")
    path.symlink_to(folder.parent.parent / "weights.safetensors")


def nan(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values())).view(-1)[4] = float("nan")


def infinite(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values())).view(-1)[:2] = float("inf")


def large(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values())).view(-1)[0] = -1e9


def extra(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.norm.weight"] = torch.ones(16)


def missing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"]


def path_like(tensors: dict[str, torch.Tensor]) -> None:
    tensors["../../x"] = torch.ones(1)


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut short": (cut, r"adapter_model\.safetensors: the tensors need .* bytes, the file has .*: it is cut short"),
    "NaN": (changed(nan), r"1 of .* values are NaN or infinite, the first at \[0, 4\]"),
    "infinite": (changed(infinite), r"2 of .* values are NaN or infinite, the first at \[0, 0\]"),
    "large": (changed(large), r"its largest value is 1e\+09; a trained adapter's stay far below 1,000,000"),
    "an unknown tensor": (changed(extra), r"norm.*: "),
    "a missing tensor": (changed(missing), r"down_proj.*: is missing"),
    "a tensor named as a path": (changed(path_like), "a tensor's name is not a path"),
    "a pickle alone": (
        pickled,
        r"adapter_model\.bin: is a pickle, which can run code when it is read",
    ),
    "a pickle in disguise": (pickled_under_another_name, "is a pickle under another name"),
    "a header of a terabyte": (large_header, "announces a header of 1,099,511,627,776 bytes"),
    "an unknown field": (configured(frobnicate=3), "frobnicate"),
    "a feature that changes it": (configured(use_qalora=True), "QA-LoRA pools its input, which is not supported"),
    "a base that PEFT changes": (
        configured(init_lora_weights="pissa"),
        "these factors belong to a base that PEFT",
    ),
    "nothing": (empty, "there is no adapter in its folder"),
    "a link out of the root": (
        linked_outside,
        r"adapter_model\.safetensors: is a link that leaves the server's",
    ),
}


@pytest.mark.parametrize("what", list(BAD))
def test_bad_adapters_are_refused_with_the_reason_and_nothing_is_kept(what: str, peft: Path) -> None:
    damage, sentence = BAD[what]
    damage(peft)
    pool, reader = Pool(PlainArena(2**16), host_bytes=2**16), Loader(base())
    registry = Registry(pool, reader, root=AdapterRoot(peft.parent), recheck=0.0)
    with pytest.raises(lorary.FileError, match=sentence) as caught:
        registry.load("a", "a")
    assert caught.value.headline == "cannot serve the adapter 'a':"
    assert str(peft.parent) not in str(caught.value)
    assert pool.statistics()["host"] == 0
    assert not [card for card in registry.cards() if card.state != "on disk"]
    registry.loader.close()


def test_bytes_that_are_not_those_that_were_saved_are_refused(lora: Path) -> None:
    changed(nan)(lora)
    with pytest.raises(lorary.FileError, match=r"adapter_model\.safetensors: is not the file that was saved") as caught:
        Loader(base()).load(lora, "a")
    assert len(caught.value.problems) == 1  # what the changed file holds does not matter


def test_adapters_of_another_base_are_refused(lora: Path) -> None:
    other = tiny.seeded("Qwen2ForCausalLM", seed=1)
    with pytest.raises(lorary.FileError, match=r"base: other weights: .* when it was trained, .* here"):
        Loader(other).load(lora, "a")
    with pytest.raises(lorary.FileError, match="cannot serve the adapter 'a':"):
        Loader(tiny.seeded("Qwen2ForCausalLM", hidden_size=32)).load(lora, "a")


def test_files_above_the_limit_are_refused_before_they_are_read(lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "load_adapter", None)
    with pytest.raises(lorary.FileError, match=r"its files have .* bytes, and this server accepts 1,000"):
        Loader(base(), limits=Limits(bytes=1000)).load(lora, "a")


def test_ranks_above_the_limit_are_refused(lora: Path, tmp_path: Path) -> None:
    with pytest.raises(lorary.FileError, match="rank: it is served with rank 3, and this server accepts 2"):
        Loader(base(), limits=Limits(rank=2)).load(lora, "a")
    assert Loader(base(), limits=Limits(rank=3)).load(lora, "a").flat.form.rank == 3
    pissa = saved(tmp_path / "pissa", METHODS["pissa"])
    with pytest.raises(lorary.FileError, match="rank: it is served with rank 4, and this server accepts 3"):
        Loader(base(), limits=Limits(rank=3)).load(pissa, "a")


def test_an_adapter_that_is_replaced_while_it_is_read_is_read_again(
    lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, original, reads = saved(tmp_path / "new", METHODS["lora"], seed=4), loader_module.load_adapter, list[Any]()

    def load(folder: Path, **options: Any) -> Any:
        adapter = original(folder, **options)
        if not reads:
            shutil.rmtree(lora)
            shutil.copytree(new, lora)
        reads.append(folder)
        return adapter

    monkeypatch.setattr(loader_module, "load_adapter", load)
    expected = Loader(base()).load(new, "a").flat.buffer
    reads.clear()
    assert torch.equal(Loader(base()).load(lora, "a").flat.buffer, expected)
    assert reads == [lora, lora]


def test_a_loader_that_is_closed_says_that_the_server_stops(lora: Path) -> None:
    pool, reader = Pool(PlainArena(2**16), host_bytes=2**16), Loader(base())
    registry = Registry(pool, reader, root=AdapterRoot(lora.parent))
    registry.loader.close()
    with pytest.raises(BusyError, match="the server stops"):
        registry.lease("a")


class _CopiedBesideAPass:
    """A setting of a base: while it is copied, the engine begins a forward pass, and waits inside a layer."""

    def __init__(self, base: Any) -> None:
        self.base, self.inside, self.over = base, threading.Event(), threading.Event()
        self.begin: Callable[[], object] = lambda: None
        self.before, self.during = set[str](), set[str]()  # names of the base's settings

    def __deepcopy__(self, memo: object) -> None:
        self.before = {*vars(self.base.config)}
        self.begin()
        assert self.inside.wait(60), "no forward pass began"

    def wait(self, *_: object) -> None:
        self.during = {*vars(self.base.config)}
        self.inside.set()
        assert self.over.wait(60)


def test_an_adapter_is_read_while_a_forward_pass_begins(tmp_path: Path) -> None:
    def short() -> Any:
        return tiny.seeded("Qwen2ForCausalLM", max_position_embeddings=64)

    folder, model = saved_adapter(short(), lorary.method("longlora", "lora", r=2, length=128), tmp_path / "a"), short()
    engine = engine_of(model, words(model.config.vocab_size), "base", budget=2**20, page=4)
    model.config.other = beside = _CopiedBesideAPass(model)
    model.model.layers[0].register_forward_pre_hook(beside.wait)
    beside.begin = lambda: submitted(engine, Request((1, 2, 3), sampling=Sampling(max_tokens=1)))
    engine.start()
    try:
        loaded = engine.registry.loader.load(Path(folder), "a")
    finally:
        beside.over.set()
        engine.stop()
    assert beside.during > beside.before, "a pass adds nothing to the settings: there is nothing to test"
    assert loaded.flat.form.rotary.keys() == {"model.rotary_emb"}
