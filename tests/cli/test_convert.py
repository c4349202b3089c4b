"""lorary convert: files of other tools as folders of lorary and PEFT."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorary
from tests.adapters.models import BASES, by_peft, close, outputs
from tests.cli.command import Command

MADE = Path(__file__).parents[1] / "adapters" / "intake" / "made"
LLAMA = BASES[0]


@pytest.fixture
def base(command: Command) -> str:
    """The folder of a base of the made files' sizes."""
    LLAMA.model().save_pretrained("base")  # type: ignore[operator]
    return "base"


def test_a_gguf_file_becomes_a_folder_of_peft(base: str, command: Command) -> None:
    pytest.importorskip("peft")
    ran = command("convert", str(MADE / "gguf" / "adapter.gguf"), "out", "--base", base, "--to", "peft")
    assert (ran.code, ran.out) == (0, "out\n")
    assert "note: read from a file of llama.cpp\n" in ran.err
    assert "logits differ by at most" in ran.err
    assert "8 layers, 8 updates compared: equal to" in ran.err
    there = outputs(lorary.load(LLAMA.model(), MADE / "gguf" / "adapter.gguf"))
    close(by_peft(LLAMA, Path("out")), there)
    assert "lorary.json" not in [p.name for p in Path("out").iterdir()]
    assert Path("out/README.md").is_file()


def test_a_file_that_needs_no_base(command: Command) -> None:
    """Then every command takes it, in the same words."""
    found = load_file(MADE / "diffusers" / "pytorch_lora_weights.safetensors")
    save_file({name: t for name, t in found.items() if name.startswith("unet.")}, "unet.safetensors")
    ran = command("convert", "unet.safetensors", "out")
    assert (ran.code, ran.out) == (0, "out\n")
    assert "note: read from a file of diffusers\nnote: " in ran.err
    assert "layers have no alpha in the file: their scale is 1" in ran.err
    assert "identical" in command("diff", "unet.safetensors", "out").out
    assert command("mix", "unet.safetensors", "out", "--weights", "0.5,0.5", "--out", "mixed").code == 0
    assert command("inspect", "adapter", "unet.safetensors").code == 0
    codes = {command("check", path, "--reader", "peft").code for path in ("unet.safetensors", "out")}
    assert len(codes) == 1


def test_the_folder_of_diffusers_and_of_mlx(base: str, command: Command) -> None:
    shutil.copytree(MADE / "mlx", "mlx")
    assert command("convert", "mlx", "from-mlx", "--base", base).code == 0
    assert lorary.load_adapter("from-mlx").sites == lorary.load_adapter("mlx", model=LLAMA.model()).sites
    shutil.copytree(MADE / "diffusers", "pipeline")
    ran = command("convert", "pipeline", "out")
    assert ran.code == 4
    assert "the file adapts several models: " in ran.err
    assert not Path("out").exists()


def test_it_refuses_and_writes_nothing(base: str, command: Command) -> None:
    gguf = str(MADE / "gguf" / "adapter.gguf")
    Path("full").mkdir()
    Path("full/mine.txt").write_text("mine")
    files = ["other.ckpt", "other.safetensors", "other.txt"]
    for name in files:
        save_file({"x.weight": torch.ones(2, 2)}, name)
    cases = {
        ("nowhere", "out"): (4, "nowhere: there is no such folder"),
        (gguf, "out"): (4, "hint: read it onto its base: lorary.load(model, file), or lorary convert FILE OUT --base"),
        (gguf, "out", "--base", base, "--to", "mlx"): (2, "'mlx' is not a form that lorary converts to"),
        (gguf, "full", "--base", base): (4, "full"),
        ("other.ckpt", "out"): (4, "other.ckpt: it is a pickle by its name, which can run code when it is read"),
        ("other.txt", "out"): (4, "hint: name its folder, or a file that ends in .safetensors or .gguf"),
        ("other.safetensors", "out"): (4, "other.safetensors: is of no known tool"),
        ("base", "out"): (4, "there is no adapter in it: it is a whole model"),
    }
    for arguments, (code, text) in cases.items():
        ran = command("convert", *arguments)
        assert (ran.code, text in ran.err) == (code, True), ran.err
    assert sorted(p.name for p in Path().iterdir()) == ["base", "full", *files]
    assert [p.name for p in Path("full").iterdir()] == ["mine.txt"]


def test_a_model_of_diffusers_is_loaded_by_diffusers(command: Command) -> None:
    if importlib.util.find_spec("diffusers") is not None:
        pytest.skip("diffusers is installed")
    shutil.copyfile(MADE / "kohya" / "lora.safetensors", "style.safetensors")
    Path("pipeline/unet").mkdir(parents=True)
    Path("pipeline/unet/config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    ran = command("convert", "style.safetensors", "out", "--base", "pipeline/unet")
    assert ran.code == 2
    assert "pipeline/unet holds a model of diffusers, which is not installed" in ran.err
    assert "pip install diffusers" in ran.err
    assert not Path("out").exists()


def test_a_whole_pipeline_is_no_base(command: Command) -> None:
    shutil.copyfile(MADE / "kohya" / "lora.safetensors", "style.safetensors")
    for part in ("unet", "text_encoder"):
        Path("pipeline", part).mkdir(parents=True)
        Path("pipeline", part, "config.json").write_text("{}")
    Path("pipeline/model_index.json").write_text("{}")
    ran = command("convert", "style.safetensors", "out", "--base", "pipeline")
    assert ran.code == 2
    assert "pipeline is a pipeline of several models, and an adapter is read onto one of them" in ran.err
    assert "name one: pipeline/text_encoder, pipeline/unet" in ran.err
    assert not Path("out").exists()
