"""Files that the tools' own code has written, against the updates that it computes: see tests/clients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lorary
from lorary.adapters.intake.convert import convert
from tests import tiny
from tests.adapters.models import BASES, by_peft, close, outputs

MADE = Path(__file__).parent / "made"
LLAMA = BASES[0]
LLAMAS = {
    "mlx": "mlx",
    "torchtune": "torchtune/own",
    "torchtune's PEFT form": "torchtune/peft",
    "llama.cpp": "gguf/adapter.gguf",
}


def updates(tool: str) -> dict[str, Tensor]:
    """Layer -> W' - W, by the tool."""
    return load_file(MADE / tool.partition("/")[0] / "updates.safetensors")


def equal(adapter: lorary.Adapter, expected: dict[str, Tensor], embedding: str = "") -> None:
    """Compare every layer's update; that of an embedding is [vocabulary, width] for most tools."""
    forms = adapter.low_rank()
    assert set(forms) == set(expected)
    for name, delta in expected.items():
        found = forms[name].B @ forms[name].A
        assert torch.allclose(found, delta.T if name == embedding else delta, atol=2e-6, rtol=1e-5), name
        assert delta.abs().max() > 0.01


@pytest.mark.parametrize("path", LLAMAS.values(), ids=LLAMAS)
def test_files_of_language_models(path: str) -> None:
    """Squares (q_proj) and grouped heads (k_proj) would hide no transposition and no other order of rows."""
    equal(lorary.load_adapter(MADE / path, model=LLAMA.model()), updates(path), "model.embed_tokens")


@pytest.mark.parametrize("path", LLAMAS.values(), ids=LLAMAS)
@pytest.mark.parametrize("to", ["lorary", "peft"])
def test_converted_files_are_read_by_peft(to: str, path: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = LLAMA.model()
    with torch.no_grad():
        for name, delta in updates(path).items():
            model.get_parameter(f"{name}.weight").add_(delta)
    done = convert(MADE / path, tmp_path / "out", to=to, model=LLAMA.model())
    assert done.difference < 1e-6
    assert done.compared == len(updates(path))
    close(by_peft(LLAMA, tmp_path / "out"), outputs(model))
    close(outputs(lorary.load(LLAMA.model(), MADE / path)), outputs(model))


def stand_in(names: dict[str, Tensor], kernels: dict[str, tuple[int, ...]]) -> nn.Module:
    """A module with layers at these paths, of the shapes of their updates."""
    root = nn.Module()
    for path, delta in names.items():
        *above, last = path.split(".")
        module = root
        for name in above:
            if not hasattr(module, name):
                module.add_module(name, nn.Module())
            module = module.get_submodule(name)
        out, into = delta.shape
        kernel = kernels.get(path, ())
        layer = nn.Conv2d(into // (kernel[0] * kernel[1]), out, kernel) if kernel else nn.Linear(into, out)
        module.add_module(last, layer)
    return root


def part(expected: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in expected.items() if name.startswith(prefix)}


@pytest.mark.parametrize(("model", "other"), [("unet", "text_encoder"), ("text_encoder", "unet")])
def test_a_file_of_diffusers_for_two_models(model: str, other: str) -> None:
    expected = part(updates("diffusers"), f"{model}.")
    base = stand_in(expected, {"mid_block.resnets.0.conv1": (3, 3)})
    adapter = lorary.load_adapter(MADE / "diffusers", model=base)
    assert f"read its part for {model}; the file adapts {other} too" in adapter.notes
    equal(adapter, expected)


KOHYA = {
    "unet": {
        "mid_block_attentions_0_proj_in": "mid_block.attentions.0.proj_in",
        "mid_block_resnets_0_conv1": "mid_block.resnets.0.conv1",
        "mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0": (
            "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
        ),
    },
    "te": {
        "text_model_encoder_layers_0_self_attn_q_proj": "text_model.encoder.layers.0.self_attn.q_proj",
        "text_model_encoder_layers_1_mlp_fc1": "text_model.encoder.layers.1.mlp.fc1",
    },
}


@pytest.mark.parametrize("part_of", KOHYA)
def test_a_file_of_sd_scripts_with_ranks_and_alphas_of_its_own(part_of: str) -> None:
    found = part(updates("kohya"), f"lora_{part_of}_")
    expected = {KOHYA[part_of][name]: t for name, t in found.items()}
    kernels = {"mid_block.attentions.0.proj_in": (1, 1), "mid_block.resnets.0.conv1": (3, 3)}
    adapter = lorary.load_adapter(MADE / "kohya" / "lora.safetensors", model=stand_in(expected, kernels))
    equal(adapter, expected)
    assert len({a.r for a in adapter.sites}) > 1
    assert adapter.notes[0] == "read from a file of kohya's sd-scripts"


def test_a_quantised_gguf_file(tmp_path: Path) -> None:
    """Q8_0, which `convert_lora_to_gguf.py --outtype q8_0` writes where the rows are long enough."""
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(0)
    base = tiny.llama(hidden_size=32)
    rows = {"a": torch.randn(32, 32), "b": torch.randn(32, 32)}
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 8.0)
    kind = gguf.GGMLQuantizationType.Q8_0
    there = {leaf: gguf.quants.quantize(t.numpy(), kind) for leaf, t in rows.items()}
    for leaf, data in there.items():
        writer.add_tensor(f"blk.0.attn_output.weight.lora_{leaf}", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    adapter = lorary.load_adapter(tmp_path / "x.gguf", model=base)
    A, B = (torch.from_numpy(gguf.quants.dequantize(there[leaf], kind)) for leaf in "ab")
    equal(adapter, {"model.layers.0.self_attn.o_proj": 8 / 32 * B @ A})
    assert "its tensors are quantised as Q8_0, and read as llama.cpp computes" in adapter.notes
