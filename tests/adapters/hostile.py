"""A good adapter folder to spoil, and safetensors files built byte by byte."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorary
from lorary.adapters import export_peft
from lorary.errors import FileError
from tests.adapters.models import BASES, adapted

PREFIX = "base_model.model.model.layers."


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of the format, right or wrong.

    Args:
        header: bytes as they are, a text as UTF-8, all else as JSON.
        data: what follows the header.
        length: what the first eight bytes say; the truth if silent.
    """
    if isinstance(header, bytes):
        raw = header
    else:
        raw = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(shape: Any = (2,), start: Any = 0, stop: Any = 8, dtype: Any = "F32") -> dict[str, Any]:
    """One tensor's entry in a header."""
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [start, stop]}


def lora() -> nn.Module:
    """The adapter that is spoiled unless another is asked for."""
    return adapted(BASES[0], targets=["q_proj", "v_proj"])


class Spoiled:
    """An adapter folder of its own, good until something is done to it.

    Args:
        folder: where.
        native: whether lorary's record lies beside PEFT's two files.
        make: makes the model whose adapter it is; a function with a name, which is called once.
    """

    def __init__(self, folder: Path, native: bool = False, make: Callable[[], nn.Module] = lora) -> None:
        shutil.copytree(_good(native, make), folder)
        self.folder = folder
        self.weights = next(folder.glob("*.safetensors"))
        self.config = folder / "adapter_config.json"
        self.record = folder / "lorary.json"

    def say(self, **words: Any) -> None:
        """Changes fields of the configuration."""
        self.config.write_text(json.dumps(json.loads(self.config.read_text()) | words))

    def note(self, change: Callable[[dict[str, Any]], Any]) -> None:
        """Changes lorary's record in place."""
        record = json.loads(self.record.read_text())
        change(record)
        self.record.write_text(json.dumps(record))

    def sign(self) -> None:
        """Makes lorary's record agree with the files as they are now."""

        def change(record: dict[str, Any]) -> None:
            for name in record["files"]:
                data = (self.folder / name).read_bytes()
                record["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}

        self.note(change)

    def tensors(self, change: Callable[[dict[str, Tensor]], Any]) -> None:
        """Changes the tensors in place; names in full."""
        tensors = load_file(self.weights)
        change(tensors)
        save_file(tensors, self.weights)

    def value(self, value: float, name: str = "0.self_attn.q_proj.lora_A.weight") -> None:
        """Puts one number into one tensor."""

        def change(tensors: dict[str, Tensor]) -> None:
            tensors[PREFIX + name][1, 2] = value

        self.tensors(change)

    def rename(self, old: str, new: str) -> None:
        """Renames a tensor; names without `PREFIX`."""
        self.tensors(lambda tensors: tensors.update({new: tensors.pop(PREFIX + old)}))

    def drop(self, *names: str) -> None:
        """Removes tensors; names without `PREFIX`."""
        self.tensors(lambda tensors: [tensors.pop(PREFIX + name) for name in names])

    def add(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        """Adds a tensor of ones; the name in full."""
        self.tensors(lambda tensors: tensors.update({name: torch.ones(shape, dtype=dtype)}))


@functools.cache
def _good(native: bool, make: Callable[[], nn.Module]) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="lorary-tests-")) / "good"
    model = make()
    if native:
        lorary.save(model, folder)
    else:
        export_peft(lorary.Adapter.of(model), folder, model=BASES[0].model())
    return folder


Spoil = Callable[[Spoiled], Any]


def put(name: str, *shape: int, value: float = 1.0) -> Spoil:
    """Adds a tensor, or replaces the one that is there."""
    return lambda s: s.tensors(lambda t: t.update({name: torch.full(shape, value)}))


def drop(name: str) -> Spoil:
    """Removes a tensor."""
    return lambda s: s.tensors(lambda t: t.pop(name))


def note(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """Changes lorary's record."""
    return lambda s: s.note(change)


def refusal(spoiled: Spoiled) -> str:
    """The message with which an adapter is refused, after making sure that nothing else happened."""
    model = BASES[0].model()
    before, there = _state(model), _listing(spoiled.folder)
    start = time.process_time()
    with pytest.raises(FileError) as caught:
        lorary.load(model, spoiled.folder)
    assert time.process_time() - start < 4, "refusing must be quick"
    assert _state(model) == before
    assert _listing(spoiled.folder) == there
    assert not (spoiled.folder / "ran").exists(), "code of the file has run"
    text = str(caught.value)
    headline, _, rest = text.partition("\n")
    assert headline == f"cannot load the adapter {str(spoiled.folder)!r}"
    assert "\x1b" not in text
    assert "\u202e" not in text
    return rest


def _state(model: nn.Module) -> str:
    """Everything that an adapter could have changed."""
    digest = hashlib.sha256(repr([(n, type(m).__name__, id(m)) for n, m in model.named_modules()]).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    digest.update(repr([p.requires_grad for p in model.parameters()]).encode())
    return digest.hexdigest()


def _listing(folder: Path) -> list[tuple[str, int]]:
    return sorted(
        (str(p.relative_to(folder)), p.lstat().st_size) for p in folder.parent.rglob("*") if folder in p.parents
    )
