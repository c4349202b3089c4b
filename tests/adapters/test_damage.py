"""Damage at random: whatever is done to a file, it loads or is refused; nothing else ever happens."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import lorary
from lorary.adapters import load_adapter
from lorary.errors import FileError
from tests.adapters.hostile import Spoiled, safetensors
from tests.adapters.models import BASES

pytestmark = pytest.mark.filterwarnings("ignore::lorary.files.findings.AdapterWarning")
JUNK: list[Any] = [
    None, True, False, 0, -1, 2**40, 1.5, -0.0, 1e300, "", "x", "../..", "\0", "(", "a" * 5000, [], {}, [[]], [None],
    [1, 2, 3], {"": 0}, {"component": "LowRank"}, {"name": 1},
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all nodes of a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, v in inner for p in places(v, (*path, key)))]


def put(value: Any, path: tuple[Any, ...], junk: Any) -> Any:
    """The value with something else at a path."""
    if not path:
        return junk
    copy = value.copy()
    copy[path[0]] = put(value[path[0]], path[1:], junk)
    return copy


def survives(folder: Path, **words: Any) -> bool:
    """Whether a folder loads; an error that is not a `FileError` passes and fails the test."""
    try:
        adapter = load_adapter(folder, **words)
    except FileError as refusal:
        if not refusal.problems:
            pytest.fail("a refusal gives its reasons")
        return False
    assert isinstance(adapter, lorary.Adapter)
    return True


@pytest.mark.parametrize("file", ["lorary.json", "adapter_config.json"])
def test_junk_anywhere_in_the_json(file: str, tmp_path: Path) -> None:
    rng, model = random.Random(5), BASES[0].model()
    path = Spoiled(tmp_path / "adapter", native=file == "lorary.json").folder / file
    good = json.loads(path.read_text())
    assert survives(path.parent, model=model)
    outcomes = []
    everywhere = places(good)
    for _ in range(400):
        path.write_text(json.dumps(put(good, rng.choice(everywhere), rng.choice(JUNK))))
        outcomes.append(survives(path.parent, model=model if rng.random() < 0.5 else None))
        survives(path.parent, model=model, strict=False)
    assert 0 < sum(outcomes) < 200, "most junk is refused, some is harmless"


def test_junk_anywhere_in_the_header(tmp_path: Path) -> None:
    rng = random.Random(8)
    path = Spoiled(tmp_path / "adapter").weights
    good = path.read_bytes()
    length = int.from_bytes(good[:8], "little")
    header, data = json.loads(good[8 : 8 + length]), good[8 + length :]
    everywhere = places(header)
    outcomes = []
    for _ in range(400):
        path.write_bytes(safetensors(put(header, rng.choice(everywhere), rng.choice(JUNK)), data))
        outcomes.append(survives(path.parent))
    assert sum(outcomes) < 40, "next to nothing in a header is harmless"


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "lorary.json"])
def test_bytes_changed_anywhere(file: str, tmp_path: Path) -> None:
    rng = random.Random(6)
    path = Spoiled(tmp_path / "adapter", native=file == "lorary.json").folder / file
    good = path.read_bytes()
    for _ in range(300):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(min(len(data), 1200))] = rng.randrange(256)
        path.write_bytes(bytes(data[: rng.randrange(len(data))] if rng.random() < 0.1 else data))
        survives(path.parent)
