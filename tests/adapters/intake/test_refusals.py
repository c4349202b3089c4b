"""What the readers of other tools' files refuse, with its sentence; and nothing is written or changed."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorary
from lorary.adapters import AdapterWarning
from lorary.adapters.intake.convert import convert
from lorary.adapters.intake.diffusers import split
from tests.adapters.hostile import entry, safetensors
from tests.adapters.intake.test_made import KOHYA, MADE, part, stand_in, updates
from tests.adapters.models import BASES

LLAMA = BASES[0]


def changed(tool: str, file: str, change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], Path]:
    """A made file with a change of its tensors."""

    def make(folder: Path) -> Path:
        path = folder / Path(file).name
        with safe_open(MADE / tool / file, "pt") as there:
            metadata = there.metadata()
        tensors = load_file(MADE / tool / file)
        change(tensors)
        save_file(tensors, path, metadata=metadata)
        return path

    return make


def put(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: value})


def drop(*names: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: [tensors.pop(name) for name in names]


def bytes_of(change: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    """The made GGUF file with a change of its bytes."""

    def make(folder: Path) -> Path:
        path = folder / "adapter.gguf"
        path.write_bytes(change((MADE / "gguf" / "adapter.gguf").read_bytes()))
        return path

    return make


def text_encoder() -> nn.Module:
    found = part(updates("kohya"), "lora_te_")
    return stand_in({KOHYA["te"][name]: t for name, t in found.items()}, {})


def unet() -> nn.Module:
    return stand_in(part(updates("diffusers"), "unet."), {"mid_block.resnets.0.conv1": (3, 3)})


def tune(**config: Any) -> Callable[[Path], Path]:
    """torchtune's own folder with other fields."""

    def make(folder: Path) -> Path:
        path = folder / "own"
        shutil.copytree(MADE / "torchtune" / "own", path)
        said = json.loads((path / "adapter_config.json").read_text()) | config
        (path / "adapter_config.json").write_text(json.dumps(said))
        return path

    return make


def described(**fields: Any) -> Callable[[Path], Path]:
    """The made file of diffusers with other fields in its metadata."""

    def make(folder: Path) -> Path:
        path = folder / "pytorch_lora_weights.safetensors"
        with safe_open(MADE / "diffusers" / path.name, "pt") as there:
            said = json.loads(there.metadata()["lora_adapter_metadata"]) | fields
        save_file(load_file(MADE / "diffusers" / path.name), path, metadata={"lora_adapter_metadata": json.dumps(said)})
        return path

    return make


def without_config(folder: Path) -> Path:
    shutil.copy(MADE / "torchtune" / "own" / "adapter_model.safetensors", folder)
    return folder / "adapter_model.safetensors"


Q = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
KO = ("kohya", "lora.safetensors")
DI = ("diffusers", "pytorch_lora_weights.safetensors")
TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
Case = tuple[Callable[[Path], Path], Callable[[], nn.Module] | None, str]


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


CASES: dict[str, Case] = {
    # kohya's sd-scripts
    "kohya without a base": (lambda f: MADE / "kohya" / "lora.safetensors", None, "has `_` for every `.` in the paths"),
    "kohya, no up": (changed(*KO, drop(f"{Q}.lora_up.weight")), text_encoder, f"{Q}.lora_up.weight: is missing"),
    "kohya, another layer": (
        changed(*KO, lambda t: [t.update({k.replace(Q, f"{Q}x"): t.pop(k)}) for k in list(t) if Q in k]),
        text_encoder,
        f"{Q}x: adapts a layer that the model does not have",
    ),
    "kohya, alpha of two numbers": (changed(*KO, put(f"{Q}.alpha", torch.ones(2))), text_encoder, "not a number"),
    "kohya, alpha NaN": (changed(*KO, put(f"{Q}.alpha", torch.tensor(float("nan")))), text_encoder, "alpha: is nan"),
    "kohya, alpha negative": (changed(*KO, put(f"{Q}.alpha", torch.tensor(-1.0))), text_encoder, "alpha: is -1.0"),
    "kohya, alpha infinite": (changed(*KO, put(f"{Q}.alpha", torch.tensor(torch.inf))), text_encoder, "alpha: is inf"),
    "kohya, alpha of 64 bits": (
        changed(*KO, put(f"{Q}.alpha", torch.tensor(1e300, dtype=torch.float64))),
        text_encoder,
        "alpha: is 'F64'; accepted are F32, F16, BF16",
    ),
    "kohya, no rank": (
        changed(*KO, lambda t: t.update({f"{Q}.lora_down.weight": torch.ones(0, 16)})),
        text_encoder,
        f"{Q}.alpha: has rank 0",
    ),
    "kohya, whole numbers": (
        changed(*KO, put(f"{Q}.lora_up.weight", torch.ones(16, 3, dtype=torch.int64))),
        text_encoder,
        "lora_up.weight: is 'I64'",
    ),
    "kohya, two names of one text encoder": (
        changed(*KO, lambda t: t.update({k.replace("_te_", "_te1_"): v.clone() for k, v in t.items() if "_te_" in k})),
        text_encoder,
        "self_attn.q_proj: is there twice",
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
    "kohya, LoHa": (
        changed(*KO, put(f"{Q}.hada_w1_a", torch.ones(2, 2))),
        text_encoder,
        f"{Q}.hada_w1_a: belongs to LoHa, which is not read from such a file",
    ),
    "kohya, LoKr": (changed(*KO, put(f"{Q}.lokr_w1", torch.ones(2))), text_encoder, "lokr_w1: belongs to LoKr"),
    "kohya, Tucker": (changed(*KO, put(f"{Q}.lora_mid.weight", torch.ones(2))), text_encoder, "a Tucker decomposition"),
    "kohya, a whole change": (changed(*KO, put(f"{Q}.diff_b", torch.ones(2))), text_encoder, "change of a whole param"),
    "kohya, shapes": (
        changed(*KO, put(f"{Q}.lora_down.weight", torch.ones(3, 15))),
        text_encoder,
        r"lora_down.weight: has the shape \[3, 15\], expected \[3, 16\]",
    ),
    "kohya, NaN": (
        changed(*KO, lambda t: t[f"{Q}.lora_up.weight"].fill_(float("nan"))),
        text_encoder,
        f"{Q}.lora_up.weight: 48 of 48 values are NaN",
    ),
    "kohya, magnitudes per input": (
        changed(*KO, put(f"{Q}.dora_scale", torch.ones(1, 16))),
        text_encoder,
        r"dora_scale: has the shape \[1, 16\], expected \[16\]",
    ),
    "kohya, the original names of SDXL": (
        changed(*KO, lambda t: [t.update({k.replace("te_text_model", "te_input_blocks"): t.pop(k)}) for k in list(t)]),
        text_encoder,
        "this is the original name in SDXL's UNet",
    ),
    # diffusers
    "diffusers without a model": (
        lambda f: MADE / "diffusers",
        None,
        "the file adapts several models: text_encoder, unet",
    ),
    "diffusers, unknown": (changed(*DI, put("unet.x", torch.ones(1))), unet, "unet.x: is not a tensor of this adapter"),
    "diffusers, a bias": (changed(*DI, put(f"{TO_Q}.lora_B.bias", torch.ones(8))), unet, "is a bias beside B"),
    "diffusers, transposed": (
        changed(*DI, lambda t: t.update({f"{TO_Q}.lora_A.weight": t[f"{TO_Q}.lora_A.weight"].T.contiguous()})),
        unet,
        "it is transposed",
    ),
    "diffusers, alphas beside its metadata": (
        changed(*DI, put(f"{TO_Q}.alpha", torch.tensor(2.0))),
        unet,
        "to_q.alpha: is there, and so are a rank and an alpha for each layer in the metadata",
    ),
    "diffusers, the rank in its metadata": (described(**{"unet.r": 5}), unet, r"expected \[5, 8\]"),
    "diffusers, another type in its metadata": (
        described(**{"unet.peft_type": "LOKR"}),
        unet,
        "__metadata__: lora_adapter_metadata: is of type 'LOKR'",
    ),
    "diffusers, a feature in its metadata": (
        described(**{"unet.use_qalora": True}),
        unet,
        "__metadata__: lora_adapter_metadata: use_qalora: is true: QA-LoRA pools its input",
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
        r"the shape \[1099511627776, 1099511627776\] is not at most 5 whole numbers up to 2,147,483,648",
    ),
    "a negative shape": (
        raw(safetensors({"lora_te_a.lora_up.weight": entry((-1, 4))})),
        text_encoder,
        r"the shape \[-1, 4\] is not at most 5",
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
            "it is a pickle, which can run code when it is read; it was not opened",
        )
        for suffix in (".pt", ".bin", ".ckpt")
    },
    "a bomb within a pickle": (bomb, LLAMA.model, "adapter_model.bin: is a pickle, which can run code when it is read"),
    # torchtune
    "torchtune without a base": (tune(), None, "has torchtune's names: only the model tells its heads"),
    "torchtune without alpha": (without_config, LLAMA.model, "the file does not say alpha"),
    "torchtune, another model": (tune(), BASES[1].model, "lorary knows of llama, .*; the model is of 'gpt2'"),
    "torchtune, rank": (tune(r=4), LLAMA.model, r"lora_a.weight: has the shape \[3, 16\], expected \[4, 16\]"),
    "torchtune, DoRA without magnitudes": (tune(use_dora=True), LLAMA.model, "has no magnitudes, which DoRA needs"),
    "torchtune, a negative rank": (tune(r=-4), LLAMA.model, "r: is -4; it takes a whole number from 1 to 65,536"),
    "torchtune, rank 2^62": (tune(r=2**62), LLAMA.model, "r: is 4611686018427387904; it takes a whole number"),
    "torchtune, alpha NaN": (tune(lora_alpha=float("nan")), LLAMA.model, "NaN is not a JSON number"),
    "torchtune, an unknown field": (tune(use_gadget=True), LLAMA.model, "use_gadget: is not a field that lorary knows"),
    # llama.cpp
    "gguf, a value twice": (gguf(ALPHA * 2, [A]), LLAMA.model, "has the value adapter.lora.alpha twice"),
    "gguf, alpha NaN": (
        gguf(ALPHA.replace(struct.pack("<f", 8.0), struct.pack("<f", float("nan"))), [A, B]),
        LLAMA.model,
        "adapter.lora.alpha: is NaN; it takes a positive number",
    ),
    "gguf, no alpha": (gguf(b"", [A, B]), LLAMA.model, "adapter.lora.alpha: is null; it takes a positive number"),
    "gguf, tensors on each other": (
        gguf(ALPHA, [A, (B[0], B[1], 0, 32)]),
        LLAMA.model,
        "blk.0.attn_q.weight.lora_b: overlaps blk.0.attn_q.weight.lora_a",
    ),
    "gguf, an offset beyond": (
        gguf(ALPHA, [(A[0], A[1], 0, 2**63)]),
        LLAMA.model,
        "lora_a: reaches beyond the end of the file",
    ),
    "gguf, shapes beyond": (
        gguf(ALPHA, [(A[0], (2**63, 2**63), 0, 0)]),
        LLAMA.model,
        r"lora_a: has the shape \[9223372036854775808, 9223372036854775808\]",
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
    "gguf without a base": (lambda f: MADE / "gguf" / "adapter.gguf", None, "has llama.cpp's names: only the model"),
    "gguf, another model": (
        lambda f: MADE / "gguf" / "adapter.gguf",
        BASES[1].model,
        "is for llama.cpp's 'llama'; the",
    ),
    "gguf, not one": (bytes_of(lambda b: b"GGML" + b[4:]), LLAMA.model, "does not begin with `GGUF`"),
    "gguf, empty": (bytes_of(lambda b: b""), LLAMA.model, "is cut short within its header"),
    "gguf, cut in the header": (bytes_of(lambda b: b[:300]), LLAMA.model, "is cut short within its header"),
    "gguf, cut in the data": (bytes_of(lambda b: b[:-400]), LLAMA.model, "reaches beyond the end of the file"),
    "gguf, version": (bytes_of(lambda b: b[:4] + struct.pack("<I", 9) + b[8:]), LLAMA.model, "of GGUF's version 9"),
    "gguf, 2^60 tensors": (
        bytes_of(lambda b: b[:8] + struct.pack("<Q", 2**60) + b[16:]),
        LLAMA.model,
        "announces 1,152,921,504,606,846,976 tensors",
    ),
    "gguf, 2^60 letters": (
        bytes_of(lambda b: b[:24] + struct.pack("<Q", 2**60) + b[32:]),
        LLAMA.model,
        "announces a text of 1,152,921,504,606,846,976 bytes",
    ),
    "gguf, a whole model": (
        bytes_of(lambda b: b.replace(b"\x07\0\0\0\0\0\0\0adapter", b"\x07\0\0\0\0\0\0\0madapte")),
        LLAMA.model,
        "general.type: is 'madapte', expected 'adapter'",
    ),
    "gguf, a name twice": (
        bytes_of(lambda b: b.replace(b"blk.1.attn_q.weight.lora_a", b"blk.0.attn_q.weight.lora_a")),
        LLAMA.model,
        "blk.0.attn_q.weight.lora_a: is there twice",
    ),
    "gguf, another layer": (
        bytes_of(lambda b: b.replace(b"blk.1.attn_q", b"blk.7.attn_q")),
        LLAMA.model,
        "blk.7.attn_q: adapts a tensor that the model does not have in llama.cpp",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_file_is_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, base, text = CASES[case]
    path = make(tmp_path)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    model = None if base is None else base()
    with pytest.raises(lorary.FileError, match=text) as caught:
        lorary.load_adapter(path, model=model)
    assert re.match(r"cannot load the adapter '", str(caught.value))
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


def test_a_link_that_leaves_its_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "x.safetensors").symlink_to(MADE / "kohya" / "lora.safetensors")
    with pytest.raises(lorary.FileError, match="is a link that leaves the folder"):
        lorary.load_adapter(tmp_path / "inside" / "x.safetensors", model=text_encoder())


def test_every_reason_is_given_at_once(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors |= {f"{Q}.hada_w1_a": torch.ones(1), f"{Q}.alpha": torch.ones(2)}
        del tensors[f"{Q.replace('0_self_attn_q_proj', '1_mlp_fc1')}.lora_up.weight"]

    with pytest.raises(lorary.FileError) as caught:
        lorary.load_adapter(changed(*KO, change)(tmp_path), model=text_encoder())
    text = str(caught.value)
    assert "belongs to LoHa" in text
    assert "is missing, and its partner is useless alone" in text


def test_what_is_unknown_is_left_out_if_asked(tmp_path: Path) -> None:
    path = changed(*DI, put("unet.x", torch.ones(1)))(tmp_path)
    with pytest.warns(AdapterWarning, match=r"unet\.x: is not a tensor of this adapter"):
        found = lorary.load_adapter(path, model=unet(), strict=False)
    assert len(found.sites) == len(part(updates("diffusers"), "unet."))


OLD = {
    "mid_block.attn1.processor.to_q_lora.down.weight": ("mid_block.attn1.to_q", "A"),
    "mid_block.attn1.to_out_lora.up.weight": ("mid_block.attn1.to_out.0", "B"),
    "mid_block.attn1.processor.to_v_lora.alpha": ("mid_block.attn1.to_v", "alpha"),
    "mid_block.proj_in.lora.up.weight": ("mid_block.proj_in", "B"),
    "layers.0.self_attn.to_out_lora.down.weight": ("layers.0.self_attn.out_proj", "A"),
    "layers.0.self_attn.q_proj.lora_linear_layer.down.weight": ("layers.0.self_attn.q_proj", "A"),
    "layers.0.mlp.fc1.lora_magnitude_vector": ("layers.0.mlp.fc1", "m"),
    "layers.0.mlp.fc1.weight": ("layers.0.mlp.fc1.weight", ""),
}


@pytest.mark.parametrize("name", OLD)
def test_the_names_of_older_releases_of_diffusers(name: str) -> None:
    assert split(name) == OLD[name]
