"""SDXL files of sd-scripts with the original names of the UNet, and of both text encoders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import lorary
from lorary.adapters.intake.sgm import original_names
from lorary.errors import FileError
from tests.adapters.intake.test_made import stand_in

# As diffusers 0.42 converts them (`_maybe_map_sgm_blocks_to_diffusers`, `_convert_unet_lora_key`).
NAMES = {
    "input_blocks.0.0": "conv_in",
    "input_blocks.1.0.in_layers.2": "down_blocks.0.resnets.0.conv1",
    "input_blocks.2.0.emb_layers.1": "down_blocks.0.resnets.1.time_emb_proj",
    "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks.4.0.skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks.4.1.proj_in": "down_blocks.1.attentions.0.proj_in",
    "input_blocks.8.1.transformer_blocks.9.attn2.to_out.0": (
        "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_out.0"
    ),
    "middle_block.0.out_layers.3": "mid_block.resnets.0.conv2",
    "middle_block.1.transformer_blocks.0.ff.net.0.proj": "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "middle_block.2.in_layers.2": "mid_block.resnets.1.conv1",
    "output_blocks.0.1.transformer_blocks.0.attn1.to_q": "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "output_blocks.2.2.conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks.5.1.conv": "up_blocks.1.upsamplers.0.conv",
    "output_blocks.8.0.in_layers.2": "up_blocks.2.resnets.2.conv1",
    "time_embed.0": "time_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.2": "conv_out",
}
CONVOLUTIONS = {path: (3, 3) for path in NAMES.values() if "conv" in path and "shortcut" not in path}
CONVOLUTIONS["down_blocks.1.resnets.0.conv_shortcut"] = (1, 1)


def layer(name: str, window: tuple[int, ...] = (), size: int = 4, blocks: int = 0) -> dict[str, Tensor]:
    """The tensors of a LoRA of rank 2 and alpha 1."""
    random = torch.Generator().manual_seed(len(name) + blocks)
    ones = (1,) * len(window)
    return {
        f"{name}.lora_down.weight": torch.randn(2, size, *window, generator=random),
        f"{name}.lora_up.weight": torch.randn(size, 2, *ones, generator=random),
        f"{name}.alpha": torch.tensor(1.0),
    }


def unet_file() -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, path in NAMES.items():
        tensors |= layer(f"lora_unet_{name.replace('.', '_')}", CONVOLUTIONS.get(path, ()))
    return tensors


def unet() -> torch.nn.Module:
    shapes = {path: torch.empty(4, 4 * (window := CONVOLUTIONS.get(path, (1, 1)))[0] * window[1]) for path in paths()}
    return stand_in(shapes, CONVOLUTIONS)


def paths() -> list[str]:
    return list(NAMES.values())


def encoder(blocks: int) -> torch.nn.Module:
    return stand_in({f"text_model.encoder.layers.{i}.mlp.fc1": torch.empty(4, 4) for i in range(blocks)}, {})


def encoder_file(prefix: str, blocks: int) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for i in range(blocks):
        tensors |= layer(f"{prefix}_text_model_encoder_layers_{i}_mlp_fc1", blocks=blocks)
    return tensors


def test_every_name_of_the_table() -> None:
    assert original_names(paths()) == NAMES
    assert original_names(["model.layers.0.q_proj"]) == {}


@pytest.mark.parametrize("new", [False, True], ids=["original names", "names of diffusers"])
def test_a_file_for_the_unet(new: bool, tmp_path: Path) -> None:
    tensors = unet_file()
    if new:
        ours = {f"lora_unet_{a.replace('.', '_')}": f"lora_unet_{b.replace('.', '_')}" for a, b in NAMES.items()}
        tensors = {ours[name.partition(".")[0]] + "." + name.partition(".")[2]: t for name, t in tensors.items()}
    save_file(tensors, tmp_path / "sdxl.safetensors")
    adapter = lorary.load_adapter(tmp_path / "sdxl.safetensors", model=unet())
    updates, file = adapter.low_rank(), unet_file()
    assert updates.keys() == set(paths())
    for name, path in NAMES.items():
        down, up = (file[f"lora_unet_{name.replace('.', '_')}.lora_{end}.weight"].flatten(1) for end in ("down", "up"))
        torch.testing.assert_close(updates[path].B @ updates[path].A, 0.5 * up @ down)
    assert (
        "the original names of the UNet's blocks (input_blocks) are those of diffusers here" in adapter.notes
    ) != new


@pytest.mark.parametrize(("blocks", "prefix"), [(2, "lora_te1"), (5, "lora_te2")])
def test_each_text_encoder_gets_its_own_part(blocks: int, prefix: str, tmp_path: Path) -> None:
    """Their layers have the same names, and the second one has more."""
    file = unet_file() | encoder_file("lora_te1", 2) | encoder_file("lora_te2", 5)
    save_file(file, tmp_path / "sdxl.safetensors")
    adapter = lorary.load_adapter(tmp_path / "sdxl.safetensors", model=encoder(blocks))
    assert len(adapter.sites) == blocks
    form = adapter.low_rank()["text_model.encoder.layers.0.mlp.fc1"]
    down, up = (file[f"{prefix}_text_model_encoder_layers_0_mlp_fc1.lora_{end}.weight"] for end in ("down", "up"))
    torch.testing.assert_close(form.B @ form.A, 0.5 * up @ down)
    (note,) = (note for note in adapter.notes if note.startswith("read its part for text_encoder"))
    others = note.partition("; the file adapts ")[2].removesuffix(" too").split(", ")
    assert sorted(others) == ["text_encoder_2" if blocks == 2 else "text_encoder", "unet"]


def refused(tensors: dict[str, Tensor], model: torch.nn.Module, folder: Path) -> str:
    save_file(tensors, folder / "file.safetensors")
    with pytest.raises(FileError) as caught:
        lorary.load_adapter(folder / "file.safetensors", model=model)
    return str(caught.value)


def test_names_that_the_unet_does_not_have(tmp_path: Path) -> None:
    tensors = unet_file() | layer("lora_unet_input_blocks_7_1_proj_out")
    found = refused(tensors, unet(), tmp_path)
    assert "lora_unet_input_blocks_7_1_proj_out: adapts a layer that the model does not have" in found
    assert "it is an original name of a Stable Diffusion UNet: is it this model's?" in found


def test_a_layer_under_both_names(tmp_path: Path) -> None:
    tensors = unet_file() | layer("lora_unet_mid_block_resnets_1_conv1", (3, 3))
    found = refused(tensors, unet(), tmp_path)
    assert "lora_unet_middle_block_2_in_layers_2: is there twice, as lora_unet_mid_block_resnets_1_conv1 too" in found


def test_two_encoders_of_one_size(tmp_path: Path) -> None:
    found = refused(encoder_file("lora_te1", 2) | encoder_file("lora_te2", 2), encoder(2), tmp_path)
    assert "its names do not tell which of them this is" in found


def test_a_kernel_of_another_size(tmp_path: Path) -> None:
    found = refused(unet_file() | layer("lora_unet_out_2"), unet(), tmp_path)
    assert "lora_unet_out_2.lora_down.weight: has the shape [2, 4], expected [2, 4, 3, 3]" in found
