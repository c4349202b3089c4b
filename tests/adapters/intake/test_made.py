"""Files that the tools' own code has written, against the updates that it computes: see tests/clients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
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


LYCORIS = MADE / "lycoris" / "lycoris.safetensors"


def lycoris() -> nn.Module:
    """The layers that LyCORIS' own modules were made for; those with magnitudes with the very weights."""
    kernels = {"hada_conv": (3, 3), "hada_core": (3, 3), "kron_conv": (3, 3), "kron_core": (3, 3)}
    base = stand_in(updates("lycoris"), {f"blocks.{name}": size for name, size in kernels.items()})
    for name in ("hada_conv", "hada_core"):
        base.blocks.add_module(name, nn.Conv2d(8, 12, 3, groups=2))
    for name in ("hada_along", "kron_along"):
        base.blocks.add_module(name, nn.Conv1d(8, 12, 3))
    with torch.no_grad():
        for name, W in load_file(MADE / "lycoris" / "weights.safetensors").items():
            base.get_submodule(name).weight.copy_(W)
    return base


def merged_updates(base: nn.Module, adapter: lorary.Adapter) -> dict[str, Tensor]:
    """Layer -> W' - W."""
    before = {name: t.detach().clone().flatten(1) for name, t in base.named_parameters() if name.endswith(".weight")}
    merged = lorary.merge(lorary.switch(base, adapter))
    after = {name: t.detach().flatten(1) for name, t in merged.named_parameters() if name in before}
    return {name.removesuffix(".weight"): after[name] - before[name] for name in before}


RENAMED = {
    "as LyCORIS writes them": lambda name: name,
    "as in sd-scripts": lambda name: name.replace("lycoris_", "lora_unet_"),
    "with dots": lambda name: name.replace("lycoris_blocks_", "transformer.blocks."),
}


@pytest.mark.parametrize("rename", RENAMED.values(), ids=RENAMED)
def test_files_of_lycoris(rename: Callable[[str], str], tmp_path: Path) -> None:
    """Every form of LoHa and LoKr that it writes; s is 1 where LoKr's matrices are both whole, whatever alpha is."""
    path = tmp_path / "lycoris.safetensors"
    save_file({rename(name): t for name, t in load_file(LYCORIS).items()}, path)
    base, expected = lycoris(), updates("lycoris")
    adapter = lorary.load_adapter(path, model=base)
    found = merged_updates(base, adapter)
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert torch.allclose(found[name], delta, atol=3e-6, rtol=1e-5), name
        assert delta.abs().max() > 0.01


def test_what_a_file_of_lycoris_says_of_its_layers() -> None:
    adapter = lorary.load_adapter(LYCORIS, model=lycoris())
    scales = {a.site.name.removeprefix("blocks."): a.scale for a in adapter.sites}
    assert scales["hada_root"] == 1.0  # rank-stabilised: 2 / sqrt(4)
    assert (scales["kron_whole"], scales["kron_full"], scales["kron_linear"]) == (1.0, 1.0, 1.0 * 2 / 2)
    assert {a.site.name for a in adapter.sites if a.join.roles} == {"blocks.hada_dora", "blocks.kron_dora"}
    assert adapter.notes[0] == "read from a file of kohya's sd-scripts"


def test_one_factor_is_found_for_a_file_of_lokr(tmp_path: Path) -> None:
    """Then PEFT has the same method, and reads the converted folder."""
    peft = pytest.importorskip("peft")
    names = ("kron_linear", "kron_both", "kron_whole", "kron_conv")
    kept = {k: t for k, t in load_file(LYCORIS).items() if k.removeprefix("lycoris_blocks_").partition(".")[0] in names}
    kept = {k: t for k, t in kept.items() if "kron_both" not in k}
    save_file(kept, tmp_path / "some.safetensors")
    convert(tmp_path / "some.safetensors", tmp_path / "out", model=lycoris())
    read = peft.PeftModel.from_pretrained(lycoris(), str(tmp_path / "out"))
    for name in ("kron_linear", "kron_whole", "kron_conv"):
        layer = read.get_submodule(f"base_model.model.blocks.{name}")
        delta = layer.get_delta_weight("default").detach().flatten(1)
        torch.testing.assert_close(delta, updates("lycoris")[f"blocks.{name}"], rtol=1e-5, atol=3e-6)
