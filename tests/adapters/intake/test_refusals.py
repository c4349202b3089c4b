"""What the readers of other tools' files refuse, with its sentence; and nothing is written or changed."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorary
from lorary.adapters import AdapterWarning
from lorary.adapters.intake.convert import convert
from lorary.adapters.intake.diffusers import split
from tests.adapters.intake.test_made import KOHYA, LYCORIS, MADE, lycoris, part, stand_in, updates
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


def second_offset(data: bytes, offset: int) -> bytes:
    """The made file with another offset of a tensor: the eight bytes before the length of the next one's name."""
    name = b"blk.1.attn_q.weight.lora_b"
    at = data.index(name) - 16
    assert struct.unpack("<Q", data[at : at + 8])[0] > 0
    return data[:at] + struct.pack("<Q", offset) + data[at + 8 :]


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


def with_heads(count: int) -> nn.Module:
    model: Any = LLAMA.model()
    model.config.num_attention_heads = count
    return cast(nn.Module, model)


def copied(file: str, name: str) -> Callable[[Path], Path]:
    """A made file under another name."""
    return lambda folder: Path(shutil.copy(MADE / file, folder / name))


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "x.safetensors")
    return folder / "x.safetensors"


def dotted(folder: Path) -> Path:
    path = folder / "dotted.safetensors"
    save_file({k.replace("lycoris_blocks_", "transformer.blocks."): t for k, t in load_file(LYCORIS).items()}, path)
    return path


def without_config(folder: Path) -> Path:
    shutil.copy(MADE / "torchtune" / "own" / "adapter_model.safetensors", folder)
    return folder / "adapter_model.safetensors"


Q = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
KO = ("kohya", "lora.safetensors")
LY = ("lycoris", "lycoris.safetensors")
DI = ("diffusers", "pytorch_lora_weights.safetensors")
TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
Case = tuple[Callable[[Path], Path], Callable[[], nn.Module] | None, str]

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
    "kohya, LoHa beside LoRA": (
        changed(*KO, put(f"{Q}.hada_w1_a", torch.ones(2, 2))),
        text_encoder,
        f"{Q}: has tensors of several methods: LoRA, LoHa and LoKr are each for a layer of its own",
    ),
    # LyCORIS
    "lycoris without a base": (lambda f: LYCORIS, None, "has `_` for every `.` in the paths"),
    "lycoris with dots, without a base": (dotted, None, "do not say which layers are convolutions"),
    "lycoris, a factor is missing": (
        changed(*LY, drop("lycoris_blocks_hada_linear.hada_w2_b")),
        lycoris,
        "lycoris_blocks_hada_linear: hada_w2_b: is missing, and the others are useless alone",
    ),
    "lycoris, a core is missing": (
        changed(*LY, drop("lycoris_blocks_hada_core.hada_t2")),
        lycoris,
        "lycoris_blocks_hada_core.hada_t2: is missing",
    ),
    "lycoris, half a product": (
        changed(*LY, drop("lycoris_blocks_kron_both.lokr_w1_b")),
        lycoris,
        "lycoris_blocks_kron_both: lokr_w1_b: is missing",
    ),
    "lycoris, a matrix and its product": (
        changed(*LY, put("lycoris_blocks_kron_linear.lokr_w2", torch.ones(6, 4))),
        lycoris,
        "does not belong to such a layer beside its other tensors",
    ),
    "lycoris, a vector": (
        changed(*LY, put("lycoris_blocks_kron_linear.lokr_w1", torch.ones(6))),
        lycoris,
        r"lokr_w1: has the shape \[6\]: no layer has such a factor",
    ),
    "lycoris, sizes that do not divide": (
        changed(*LY, put("lycoris_blocks_kron_linear.lokr_w1", torch.ones(5, 4))),
        lycoris,
        r"sizes = \(5, 4\) does not divide its 36 output and 16 input features",
    ),
    "lycoris, another layer's shape": (
        changed(*LY, put("lycoris_blocks_hada_linear.hada_w1_a", torch.ones(15, 2))),
        lycoris,
        r"hada_w1_a: has the shape \[15, 2\], expected \[16, 2\]",
    ),
    "lycoris, no such layer": (
        changed(*LY, lambda t: [t.update({k.replace("hada_root", "roof"): t.pop(k)}) for k in list(t) if "root" in k]),
        lycoris,
        "lycoris_blocks_roof: adapts a layer that the model does not have",
    ),
    "lycoris, NaN": (
        changed(*LY, lambda t: t["lycoris_blocks_kron_core.lokr_t2"].fill_(float("nan"))),
        lycoris,
        "lokr_t2: 9 of 9 values are NaN",
    ),
    "lycoris, alpha infinite": (
        changed(*LY, put("lycoris_blocks_kron_core.alpha", torch.tensor(float("inf")))),
        lycoris,
        "alpha: is inf",
    ),
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
    "kohya, rank 0": (
        changed(*KO, lambda t: t.update({f"{Q}.lora_down.weight": torch.ones(0, 16)})),
        text_encoder,
        f"{Q}.alpha: has rank 0",
    ),
    "kohya, a vector": (
        changed(*KO, put(f"{Q}.lora_down.weight", torch.ones(16))),
        text_encoder,
        r"lora_down.weight: has the shape \[16\], expected \[16, 16\]",
    ),
    "kohya, whole numbers": (
        changed(*KO, put(f"{Q}.lora_down.weight", torch.ones(3, 16, dtype=torch.int64))),
        text_encoder,
        "lora_down.weight: is 'I64'; accepted are F32, F16, BF16",
    ),
    "kohya, an alpha without a layer": (
        changed(*KO, put("lora_te_foo.alpha", torch.ones(()))),
        text_encoder,
        "lora_te_foo.alpha: is not a tensor of this adapter",
    ),
    "kohya, names of diffusers too": (
        changed(*KO, put("unet.a.lora_A.weight", torch.ones(2, 3))),
        text_encoder,
        "unet.a.lora_A.weight: is not a tensor of this adapter",
    ),
    "kohya, a layer under two prefixes": (
        changed(*KO, lambda t: t.update({k.replace("lora_te_", "lora_te1_"): v.clone() for k, v in t.items()})),
        text_encoder,
        f"{Q}: is there twice, as lora_te1_text_model_encoder_layers_0_self_attn_q_proj too",
    ),
    "kohya, magnitudes per input": (
        changed(*KO, put(f"{Q}.dora_scale", torch.ones(1, 16))),
        text_encoder,
        r"dora_scale: has the shape \[1, 16\], expected \[16\]",
    ),
    "kohya, the original names of SDXL": (
        changed(*KO, lambda t: [t.update({k.replace("te_text_model", "te_input_blocks"): t.pop(k)}) for k in list(t)]),
        text_encoder,
        "it is an original name of a Stable Diffusion UNet",
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
    # mlx-lm, and files of no kind
    "mlx-lm without its configuration": (
        copied("mlx/adapters.safetensors", "adapters.safetensors"),
        LLAMA.model,
        "has mlx-lm's names, and no adapter_config.json is beside it: the scale is missing",
    ),
    "a pickle": (copied("kohya/lora.safetensors", "x.ckpt"), text_encoder, "it is a pickle by its name"),
    "a file of no kind": (
        copied("kohya/lora.safetensors", "x"),
        text_encoder,
        "name its folder, or a file that ends in .safetensors or .gguf",
    ),
    "a pipe": (pipe, text_encoder, "it is a named pipe, not a file or a folder"),
    # torchtune
    "torchtune without a base": (tune(), None, "has torchtune's names: only the model tells its heads"),
    "torchtune without alpha": (without_config, LLAMA.model, "the file does not say alpha"),
    "torchtune, another model": (tune(), BASES[1].model, "lorary knows of llama, .*; the model is of 'gpt2'"),
    "torchtune, heads that do not divide the rows": (
        tune(),
        lambda: with_heads(3),
        "self_attn.q_proj: has 16 rows, and the model's configuration says 3 heads of an even width",
    ),
    "torchtune, rank": (tune(r=4), LLAMA.model, r"lora_a.weight: has the shape \[3, 16\], expected \[4, 16\]"),
    "torchtune, DoRA without magnitudes": (tune(use_dora=True), LLAMA.model, "has no magnitudes, which DoRA needs"),
    # llama.cpp
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
    "gguf, alpha twice": (
        bytes_of(lambda b: b.replace(b"general.type", b"adapter.type")),
        LLAMA.model,
        "has two values of 'adapter.type'",
    ),
    "gguf, a tensor in the place of another": (
        bytes_of(lambda b: second_offset(b, 0)),
        LLAMA.model,
        "begins at byte 0, and the tensors before it end at [1-9]",
    ),
    "gguf, another layer": (
        bytes_of(lambda b: b.replace(b"blk.1.attn_q", b"blk.7.attn_q")),
        LLAMA.model,
        "blk.7.attn_q: adapts a tensor that the model does not have in llama.cpp",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_file_is_refused(case: str, tmp_path: Path) -> None:
    make, base, text = CASES[case]
    path = make(tmp_path)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    model = None if base is None else base()
    with pytest.raises(lorary.FileError, match=text) as caught:
        lorary.load_adapter(path, model=model)
    assert re.match(r"cannot load the adapter '", str(caught.value))
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


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
    assert "has tensors of several methods" in text
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


@pytest.mark.parametrize(
    ("file", "name"), [("kohya/lora.safetensors", "x.SafeTensors"), ("gguf/adapter.gguf", "x.GGUF")]
)
def test_the_case_of_a_files_ending_says_nothing(file: str, name: str, tmp_path: Path) -> None:
    base = text_encoder() if file.startswith("kohya") else LLAMA.model()
    path = copied(file, name)(tmp_path)
    assert lorary.load_adapter(path, model=base).sites == lorary.load_adapter(MADE / file, model=base).sites


def test_an_alpha_that_is_a_whole_number(tmp_path: Path) -> None:
    """sd-scripts writes the rank itself, where no alpha is given."""
    path = changed(*KO, put(f"{Q}.alpha", torch.tensor(6)))(tmp_path)
    (first, *_) = lorary.load_adapter(path, model=text_encoder()).sites
    assert first.alpha == 6.0


@pytest.mark.parametrize(
    ("folder", "options", "sentence"),
    [
        (None, {}, "folder: is a NoneType, not a path"),
        (5, {}, "folder: is a int, not a path"),
        ("a\0b", {}, "it holds a null character"),
        ("out", {"to": None}, "to: None is not a form that lorary converts to"),
        ("out", {"to": ["peft"]}, r"to: \['peft'\] is not a form"),
        ("out", {"model": "base"}, "model: is a str, not a torch.nn.Module"),
    ],
)
def test_arguments_of_convert(
    folder: Any, options: dict[str, Any], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(lorary.LoraryError, match=sentence):
        convert(MADE / "mlx", folder, **options)
    assert not any(tmp_path.iterdir())
