"""Hostile files of other tools: sizes beyond any file, numbers that are none, paths, pickles, two layouts at once."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorary
from lorary.adapters.intake.convert import convert
from tests.adapters.hostile import entry, safetensors
from tests.adapters.intake.test_made import MADE
from tests.adapters.intake.test_refusals import (
    DI,
    KO,
    LLAMA,
    TO_Q,
    Case,
    Q,
    changed,
    described,
    put,
    text_encoder,
    tune,
    unet,
)
from tests.adapters.models import BASES


class Runs:
    """Would leave a file where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def raw(data: bytes, name: str = "x.safetensors") -> Callable[[Path], Path]:
    """A file of these bytes."""

    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def bomb(folder: Path) -> Path:
    """A folder of PEFT's with a pickle of 64 MB of zeros, packed to a thousandth of it."""
    with zipfile.ZipFile(folder / "adapter_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 2**26)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}')
    return folder


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def value(key: str, kind: int, data: bytes) -> bytes:
    """A value of a GGUF header."""
    return text(key) + struct.pack("<I", kind) + data


ALPHA = value("adapter.lora.alpha", 6, struct.pack("<f", 8.0))
A = ("blk.0.attn_q.weight.lora_a", (16, 4), 0, 0)  # name, dimensions, type, offset
B = ("blk.0.attn_q.weight.lora_b", (4, 16), 0, 256)


def gguf(more: bytes, tensors: list[tuple[Any, ...]], values: int | None = None) -> Callable[[Path], Path]:
    """A GGUF adapter for a Llama with further values and these tensors, whose numbers are zero.

    Args:
        more: the values beside the general ones.
        tensors: name, dimensions, type and offset of each.
        values: the number of values that it announces; the truth if silent.
    """
    said = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}
    header = b"".join(value(key, 8, text(one)) for key, one in said.items()) + more
    count = len(said) + more.count(b"adapter.lora.alpha") + more.count(b"general.alignment") + more.count(text("x"))
    described = b"".join(
        text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
        for name, shape, kind, offset in tensors
    )
    counts = struct.pack("<IQQ", 3, len(tensors), count if values is None else values)
    return raw(b"GGUF" + counts + header + described + bytes(1024), "x.gguf")


HOSTILE: dict[str, Case] = {
    "kohya, alpha infinite": (changed(*KO, put(f"{Q}.alpha", torch.tensor(torch.inf))), text_encoder, "alpha: is inf"),
    "kohya, alpha of 64 bits": (
        changed(*KO, put(f"{Q}.alpha", torch.tensor(1e300, dtype=torch.float64))),
        text_encoder,
        "alpha: is 'F64'; accepted are F32, F16, BF16",
    ),
    "kohya, two layouts": (
        changed(*KO, put("text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight", torch.ones(3, 16))),
        text_encoder,
        "text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight: is not a tensor of this adapter",
    ),
    "kohya, a path": (
        changed(*KO, put("lora_te_../../etc.lora_up.weight", torch.ones(2, 2))),
        text_encoder,
        "'lora_te_../../etc.lora_up.weight': a tensor's name is not a path",
    ),
    "kohya, control characters": (
        changed(*KO, put("lora_te_\x1b[31m.lora_up.weight", torch.ones(2, 2))),
        text_encoder,
        "a tensor's name is made of printable ASCII",
    ),
    "kohya, alphas alone": (
        changed(*KO, lambda t: [t.pop(k) for k in list(t) if not k.endswith(".alpha")]),
        text_encoder,
        "holds no factors of any layer",
    ),
    "diffusers, the name of now and of then": (
        changed(*DI, put(f"{TO_Q.rpartition('.')[0]}.processor.to_q_lora.down.weight", torch.ones(4, 8))),
        unet,
        "processor.to_q_lora.down.weight: is not a tensor of this adapter",
    ),
    "diffusers, two layouts": (
        changed(
            *DI,
            lambda t: t.update({f"lora_unet_x.lora_{end}.weight": torch.ones(2, 2) for end in ("up", "down")}),
        ),
        unet,
        "lora_unet_x: adapts a layer that the model does not have",
    ),
    "diffusers, a negative rank in its metadata": (described(**{"unet.r": -1}), unet, "metadata: r: is -1; it takes"),
    "diffusers, alpha NaN in its metadata": (
        described(**{"unet.lora_alpha": float("nan")}),
        unet,
        "metadata: NaN is not a JSON number",
    ),
    # any of these
    "shapes beyond any file": (
        raw(safetensors({"lora_te_a.lora_up.weight": entry((2**40, 2**40))})),
        text_encoder,
        "the shape [1099511627776, 1099511627776] is not at most 5 whole numbers up to 2,147,483,648",
    ),
    "a negative shape": (
        raw(safetensors({"lora_te_a.lora_up.weight": entry((-1, 4))})),
        text_encoder,
        "the shape [-1, 4] is not at most 5",
    ),
    "a header of 2^50 bytes": (
        raw(safetensors(b"{}", length=2**50)),
        text_encoder,
        "announces a header of 1,125,899,9",
    ),
    "a pickle under another name": (
        raw(pickle.dumps(Runs())),
        text_encoder,
        "x.safetensors: is a pickle under another name; pickles can run code and are never opened",
    ),
    **{
        f"a pickle, {suffix}": (
            raw(pickle.dumps(Runs()), f"adapter_0{suffix}"),
            text_encoder,
            "it is a pickle by its name, which can run code when it is read; it was not opened",
        )
        for suffix in (".pt", ".bin", ".ckpt")
    },
    "a bomb within a pickle": (bomb, LLAMA.model, "adapter_model.bin: is a pickle, which can run code when it is read"),
    # torchtune
    "torchtune, a negative rank": (tune(r=-4), LLAMA.model, "r: is -4; it takes a whole number from 1 to 65,536"),
    "torchtune, rank 2^62": (tune(r=2**62), LLAMA.model, "r: is 4611686018427387904; it takes a whole number"),
    "torchtune, alpha NaN": (tune(lora_alpha=float("nan")), LLAMA.model, "NaN is not a JSON number"),
    "torchtune, an unknown field": (tune(use_gadget=True), LLAMA.model, "use_gadget: is not a field that lorary knows"),
    # llama.cpp
    "gguf, a value twice": (gguf(ALPHA * 2, [A]), LLAMA.model, "has two values of 'adapter.lora.alpha'"),
    "gguf, alpha NaN": (
        gguf(ALPHA.replace(struct.pack("<f", 8.0), struct.pack("<f", float("nan"))), [A, B]),
        LLAMA.model,
        "adapter.lora.alpha: is NaN; it takes a positive number",
    ),
    "gguf, no alpha": (gguf(b"", [A, B]), LLAMA.model, "adapter.lora.alpha: is null; it takes a positive number"),
    "gguf, tensors on each other": (
        gguf(ALPHA, [A, (B[0], B[1], 0, 32)]),
        LLAMA.model,
        "lora_b: begins at byte 32, and the tensors before it end at 256",
    ),
    "gguf, an offset beyond": (
        gguf(ALPHA, [(A[0], A[1], 0, 2**63)]),
        LLAMA.model,
        "lora_a: reaches beyond the end of the file",
    ),
    "gguf, shapes beyond": (
        gguf(ALPHA, [(A[0], (2**63, 2**63), 0, 0)]),
        LLAMA.model,
        "lora_a: has the shape [9223372036854775808, 9223372036854775808]",
    ),
    "gguf, a type that is none": (gguf(ALPHA, [(A[0], A[1], 999, 0)]), LLAMA.model, "has the unknown type 999"),
    "gguf, arrays in arrays": (
        gguf(ALPHA + value("x", 9, struct.pack("<IQ", 9, 1) * 2000), []),
        LLAMA.model,
        "has an array of 1 values of the type 9",
    ),
    "gguf, 2^60 values": (
        gguf(ALPHA, [], values=2**60),
        LLAMA.model,
        "announces 0 tensors and 1,152,921,504,606,846,9",
    ),
    "gguf, an alignment of 0": (
        gguf(ALPHA + value("general.alignment", 4, struct.pack("<I", 0)), [A]),
        LLAMA.model,
        "has the alignment 0",
    ),
    "gguf, a path": (gguf(ALPHA, [("../../x.lora_a", *A[1:])]), LLAMA.model, "a tensor's name is not a path"),
    "gguf, a half alone": (gguf(ALPHA, [A]), LLAMA.model, "lora_b: is missing, and its partner is useless alone"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, base, sentence = HOSTILE[case]
    path = make(tmp_path)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(lorary.FileError) as caught:
        lorary.load_adapter(path, model=base and base())
    assert sentence in str(caught.value)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


WRITTEN: dict[str, tuple[Callable[[Path], Any], Callable[[], nn.Module], str]] = {
    "a folder with something in it": (lambda f: full(f / "out"), LLAMA.model, "the folder is not empty: it holds 'x'"),
    "a file": (lambda f: full(f / "out") / "x", LLAMA.model, "a file of this name is in the way"),
    "a path through a file": (lambda f: full(f / "out") / "x" / "y", LLAMA.model, "is a file, not a folder"),
    "a link out of here": (lambda f: link(f / "out", full(f / "other")), LLAMA.model, "the folder is not empty"),
    "a null character": (lambda f: f"{f}/a\0b", LLAMA.model, "cannot be followed: it holds a null character"),
    "a name that is too long": (lambda f: f / ("a" * 300), LLAMA.model, "name too long"),
    "no path": (lambda f: 3, LLAMA.model, "folder: is a int, not a path"),
    "another base": (lambda f: f / "out", BASES[1].model, "adapts a layer that the model does not have"),
}


def full(folder: Path) -> Path:
    folder.mkdir()
    (folder / "x").write_text("mine")
    return folder


def link(path: Path, to: Path) -> Path:
    path.symlink_to(to)
    return path


@pytest.mark.parametrize("case", WRITTEN)
def test_where_nothing_can_be_written_nothing_is(case: str, tmp_path: Path) -> None:
    make, base, sentence = WRITTEN[case]
    folder = make(tmp_path)
    before = sorted((p.name, p.is_file() and p.read_bytes()) for p in tmp_path.rglob("*"))
    with pytest.raises(lorary.FileError) as caught:
        convert(MADE / "mlx", folder, model=base())
    assert sentence.lower() in str(caught.value).lower()
    assert sorted((p.name, p.is_file() and p.read_bytes()) for p in tmp_path.rglob("*")) == before
