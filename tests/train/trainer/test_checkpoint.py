"""Checkpoints are whole or not there; damaged ones are passed over; nothing is pickled."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import lorary
from lorary.adapters.adapter import Adapter
from lorary.errors import FileError, TrainingError
from lorary.files import syscalls
from lorary.train.trainer import checkpoint, optimizer_state, rng
from tests.train.resume.processes import child
from tests.train.runs import adapted, sft


def _adapter(value: float = 0.5) -> Adapter:
    model = adapted(targets=["q_proj"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("params.B"):
                parameter.fill_(value)
    return Adapter.of(model)


def _write(path: Path, state: Any = None) -> None:
    step = checkpoint.step_of(path)
    checkpoint.write(path, _adapter(), state or {"step": step}, {"step": step}, lambda folder: None)


# --- what a state may hold ------------------------------------------------------------------------------------------


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    state = {
        "tensors": {"a.b/c": torch.randn(2, 3), "half": torch.randn(4).bfloat16(), "scalar": torch.tensor(7.0)},
        "bytes": torch.arange(5, dtype=torch.uint8),
        "numbers": [1, -2.5, True, None, 2**70, 1e-320],
        "tuple": (0.9, (0.999, [1])),
        "lost": [math.inf, -math.inf],
        "empty": {"dict": {}, "list": [], "tuple": (), "tensor": torch.zeros(0, 3)},
        "text": "ä $tensor",
    }
    _write(tmp_path / "checkpoint-1", state)
    found = checkpoint.read(tmp_path / "checkpoint-1")
    for key in ("numbers", "tuple", "lost", "text"):
        assert found[key] == state[key]
    assert [type(v) for v in found["numbers"]] == [int, float, bool, type(None), int, float]
    for name, tensor in state["tensors"].items():  # type: ignore[attr-defined]
        assert torch.equal(found["tensors"][name], tensor)
        assert found["tensors"][name].dtype == tensor.dtype
    assert torch.equal(found["bytes"], torch.arange(5, dtype=torch.uint8))
    assert found["empty"]["tensor"].shape == (0, 3)
    assert found["empty"] | {"tensor": 0} == {"dict": {}, "list": [], "tuple": (), "tensor": 0}
    assert math.isnan(checkpoint.from_json(checkpoint.to_json(math.nan, {}), {}))


def test_what_could_only_be_pickled_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as caught:
        _write(tmp_path / "checkpoint-1", {"optimizer": {"group": [lambda: 0]}})
    assert str(caught.value) == (
        "cannot save the training state:\n"
        "  - optimizer/group/0: a function could only be pickled, and a pickle runs code when it is read\n"
        "      hint: use another optimizer"
    )
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_is_not_finite_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"q_proj\.B: contains non-finite values"):
        checkpoint.write(tmp_path / "checkpoint-1", _adapter(math.inf), {}, {}, lambda folder: None)
    with pytest.raises(TrainingError) as caught:
        checkpoint.write(tmp_path / "checkpoint-1", _adapter(2e6), {}, {}, lambda folder: None)
    assert str(caught.value).startswith("cannot save a checkpoint:\n  - model.layers.0.self_attn.q_proj.B: its largest")
    assert list(tmp_path.iterdir()) == []


def test_random_streams_come_back() -> None:
    import random

    import numpy as np

    def draw() -> tuple[float, float, float, float]:
        return random.gauss(0, 1), float(np.random.normal()), float(torch.randn(())), random.random()

    draw()  # an odd number of Gaussians is half-way
    state = checkpoint.from_json(*_packed(rng.capture()))
    first = draw()
    with rng.preserved():
        draw()
    second = draw()
    rng.restore(state)
    assert (draw(), draw()) == (first, second)


def _packed(value: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    tensors: dict[str, torch.Tensor] = {}
    return json.loads(json.dumps(checkpoint.to_json(value, tensors))), tensors


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop])
def test_optimizer_states_come_back_by_name(kind: Any) -> None:
    def steps(model: Any, optimizer: Any, count: int) -> None:
        for i in range(count):
            model(input_ids=torch.tensor([[5 + i, 6, 7]]), labels=torch.tensor([[5 + i, 6, 7]])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    words = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    model = adapted("lora", "lora+")
    optimizer = kind(lorary.param_groups(model, lr=1e-2), **words)
    steps(model, optimizer, 2)
    saved = checkpoint.from_json(*_packed(optimizer_state.capture(optimizer, model)))
    middle = Adapter.of(model)
    steps(model, optimizer, 2)
    again = adapted("lora", "lora+")
    for name, layer in lorary.layers.adapted.adapted_layers(again).items():
        layer.load(dict(middle.tensors[name]))
    other = kind(lorary.param_groups(again, lr=1.0), **words)  # the rate comes from the checkpoint
    optimizer_state.restore(other, again, saved)
    steps(again, other, 2)
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


def test_another_models_optimizer_is_refused() -> None:
    one, two = adapted(targets=["q_proj"]), adapted(targets=["q_proj", "k_proj"])
    saved = optimizer_state.capture(torch.optim.SGD(lorary.param_groups(one, lr=1.0)), one)
    with pytest.raises(TrainingError) as caught:
        optimizer_state.restore(torch.optim.SGD(lorary.param_groups(two, lr=1.0)), two, saved)
    assert "group 0: model.layers.0.self_attn.k_proj.params.A is only here" in str(caught.value)


# --- which one is taken ---------------------------------------------------------------------------------------------


def _damage(path: Path, how: str) -> None:
    target = path / checkpoint.TENSORS if how != "adapter" else path / "adapter" / "adapter_model.safetensors"
    data = bytearray(target.read_bytes())
    if how == "truncated":
        target.write_bytes(data[: len(data) // 2])
    elif how == "zeroed":
        target.write_bytes(bytes(len(data)))
    elif how == "missing":
        target.unlink()
    elif how == "unfinished":
        (path / "MANIFEST.json").unlink()
    else:
        data[-3] ^= 1
        target.write_bytes(data)


SKIPS = {
    "truncated": "bytes, the manifest says",
    "zeroed": "its contents are not those that were written (SHA-256 differs)",
    "one bit": "its contents are not those that were written (SHA-256 differs)",
    "adapter": "adapter/adapter_model.safetensors': its contents are not those that were written",
    "missing": "no such file or directory",
    "unfinished": "MANIFEST.json: no such file or directory",
}


@pytest.mark.parametrize("how", SKIPS)
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path, how: str) -> None:
    state = {"moments": torch.randn(64)}
    for step in (2, 10, 9):
        _write(tmp_path / f"checkpoint-{step}", state)
    assert checkpoint.newest(tmp_path) == (tmp_path / "checkpoint-10", ())
    _damage(tmp_path / "checkpoint-10", how)
    os.utime(tmp_path / "checkpoint-2")  # the newest by the clock
    path, skipped = checkpoint.newest(tmp_path)
    assert path == tmp_path / "checkpoint-9"
    assert len(skipped) == 1
    assert skipped[0].startswith("passed over checkpoint-10, which is incomplete or damaged (")
    assert SKIPS[how] in skipped[0]


def test_swapped_files_of_two_checkpoints_are_noticed(tmp_path: Path) -> None:
    for step in (1, 2):
        _write(tmp_path / f"checkpoint-{step}", {"moments": torch.randn(64)})
    one, two = ((tmp_path / f"checkpoint-{step}" / checkpoint.TENSORS) for step in (1, 2))
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    path, skipped = checkpoint.newest(tmp_path)
    assert path is None
    assert len(skipped) == 2


def test_rotation_goes_by_steps_and_spares_the_best(tmp_path: Path) -> None:
    for step in (3, 20, 100, 7):
        _write(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-x").mkdir()
    best = str(tmp_path / "checkpoint-7")
    removed = checkpoint.rotate(tmp_path, 2, best)
    assert [p.name for p in removed] == ["checkpoint-3", "checkpoint-20"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-100", "checkpoint-7", "checkpoint-x"]
    assert checkpoint.rotate(tmp_path, None) == []


# --- crashes --------------------------------------------------------------------------------------------------------

POINTS = (
    "directory.begin",
    "manifest.written",
    "directory.written",
    "directory.before-rename",
    "directory.after-rename",
)


@pytest.mark.parametrize("point", POINTS)
def test_killed_anywhere_the_old_checkpoint_or_the_new_one_is_whole(tmp_path: Path, point: str) -> None:
    _write(tmp_path / "checkpoint-1")

    def work() -> None:
        syscalls._passages.clear()  # what earlier tests of this process have counted
        os.environ["LORARY_FAULT"] = f"{point}:1:kill" if point != "manifest.written" else f"{point}:kill"
        _write(tmp_path / "checkpoint-2")

    _, status = os.waitpid(child(work), 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    path, skipped = checkpoint.newest(tmp_path)
    assert path is not None
    assert skipped == ()  # a temporary folder is not even a candidate
    assert checkpoint.read(path)["step"] == checkpoint.step_of(path)
    _write(tmp_path / "checkpoint-2")  # and the next attempt succeeds
    assert checkpoint.newest(tmp_path)[0] == tmp_path / "checkpoint-2"


def test_the_adapter_is_written_as_lorary_save_writes_it(tmp_path: Path) -> None:
    """With the model at hand, which alone tells what PEFT can read: here, a head that trains as a whole."""
    model = adapted(targets=["q_proj"], full=("lm_head",))
    sft(tmp_path, model, save_strategy="steps", save_steps=1, max_steps=1).train()
    lorary.save(model, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj"]
    assert config["modules_to_save"] == ["lm_head"]
    written = tmp_path / "checkpoint-1" / checkpoint.ADAPTER
    for file in sorted((tmp_path / "saved").iterdir()):
        assert (written / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: Any) -> None:
    t = sft(tmp_path, save_strategy="steps", save_steps=1, max_steps=4)
    syscalls._passages.clear()
    # each checkpoint commits two folders: the adapter in it, and itself; this is the second one's own
    monkeypatch.setenv("LORARY_FAULT", "directory.before-rename:4:enospc")
    with pytest.raises(FileError) as caught:
        t.train()
    assert f"cannot write {str(tmp_path / 'checkpoint-2')!r}; what was there before is unchanged" in str(caught.value)
    assert "no space left on device: " in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    assert checkpoint.newest(tmp_path)[0] == tmp_path / "checkpoint-1"


def test_checkpoints_hold_no_pickle_and_no_base(tmp_path: Path) -> None:
    t = sft(tmp_path, save_strategy="steps", save_steps=6, save_total_limit=1)
    t.train()
    files = {str(p.relative_to(tmp_path)): p for p in tmp_path.rglob("*") if p.is_file()}
    assert {name.split("/")[0] for name in files} == {"checkpoint-12"}
    assert {Path(name).suffix for name in files} == {".json", ".safetensors"}
    from safetensors import safe_open

    for path in (p for p in files.values() if p.suffix == ".safetensors"):
        with safe_open(path, "pt") as file:
            assert not [name for name in file.keys() if "embed_tokens" in name or ".base." in name]  # noqa: SIM118
    assert lorary.load_adapter(tmp_path / "checkpoint-12" / "adapter").sites  # usable as it is
