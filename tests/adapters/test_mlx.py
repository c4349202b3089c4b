"""mlx-lm's adapter folders against the update written out by hand, on square layers too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorary
from lorary.adapters import export_peft
from tests import tiny
from tests.adapters.models import BASES, by_peft, close, outputs

LLAMA = BASES[0]
SITES = (
    "model.layers.0.self_attn.q_proj",  # square
    "model.layers.1.self_attn.v_proj",
    "model.layers.1.mlp.down_proj",
)
SCALE, RANK = 1.7, 3


def folder_of(path: Path, kind: str = "lora", sites: tuple[str, ...] = SITES) -> dict[str, Tensor]:
    """A folder as mlx-lm writes it, and its tensors."""
    modules = dict(LLAMA.model().named_modules())
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name in sites:
        first, last = modules[name].weight.shape  # type: ignore[union-attr,misc]
        out, into = (last, first) if "embed" in name else (first, last)
        tensors[f"{name}.lora_a"] = torch.randn(into, RANK, generator=generator)
        tensors[f"{name}.lora_b"] = torch.randn(RANK, out, generator=generator) * 0.2
        if kind == "dora":
            tensors[f"{name}.m"] = torch.rand(out, generator=generator) + 0.5
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "adapters.safetensors")
    parameters = {"rank": RANK, "scale": SCALE, "dropout": 0.05, "keys": ["self_attn.q_proj"]}
    config = {"fine_tune_type": kind, "num_layers": 16, "lora_parameters": parameters, "model": "org/model"}
    (path / "adapter_config.json").write_text(json.dumps(config | {"batch_size": 4, "train": True}))
    return tensors


def by_hand(tensors: dict[str, Tensor]) -> Tensor:
    """The outputs of a base whose weights are changed as mlx-lm's forward says."""
    model = LLAMA.model()
    with torch.no_grad():
        for key, a in tensors.items():
            if key.endswith(".lora_a"):
                name = key.removesuffix(".lora_a")
                weight, b = model.get_parameter(f"{name}.weight"), tensors[f"{name}.lora_b"]
                delta = SCALE * (a @ b)
                weight += delta if "embed" in name else delta.T
                if (m := tensors.get(f"{name}.m")) is not None:
                    weight *= (m / weight.norm(dim=1))[:, None]
    return outputs(model)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_of_mlx_is_its_update_by_hand(kind: str, tmp_path: Path) -> None:
    tensors = folder_of(tmp_path, kind)
    model = lorary.load(LLAMA.model(), tmp_path)
    close(outputs(model), by_hand(tensors))
    assert (outputs(LLAMA.model()) - by_hand(tensors)).abs().max() > 0.01
    adapter = lorary.load_adapter(tmp_path)
    assert adapter.base.name == "org/model"
    assert "read from mlx-lm's files" in adapter.notes
    close(outputs(lorary.switch(LLAMA.model(), adapter)), by_hand(tensors))


def test_an_embedding_of_mlx_needs_the_model(tmp_path: Path) -> None:
    tensors = folder_of(tmp_path, sites=("model.embed_tokens", *SITES))
    close(outputs(lorary.load(LLAMA.model(), tmp_path)), by_hand(tensors))


def test_an_adapter_of_mlx_goes_on_to_peft(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    tensors = folder_of(tmp_path / "a")
    export_peft(lorary.load_adapter(tmp_path / "a", model=LLAMA.model()), tmp_path / "b", model=LLAMA.model())
    close(by_peft(LLAMA, tmp_path / "b"), by_hand(tensors))


def say(**changes: Any) -> Callable[[Path], None]:
    """A change of the configuration; of `lora_parameters` with a dict."""

    def change(path: Path) -> None:
        config = json.loads((path / "adapter_config.json").read_text())
        parameters = config["lora_parameters"] | changes.pop("parameters", {})
        config = config | {"lora_parameters": parameters} | changes
        (path / "adapter_config.json").write_text(json.dumps(config))

    return change


def tensor(end: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[Path], None]:
    """A change of the tensors with this end; None removes them."""

    def changed(path: Path) -> None:
        found = load_file(path / "adapters.safetensors")
        new = {key: change(t) if key.endswith(end) else t for key, t in found.items()}
        save_file({k: t.contiguous() for k, t in new.items() if t is not None}, path / "adapters.safetensors")

    return changed


REFUSED = [
    (say(fine_tune_type="full"), "fine_tune_type: is 'full'; lorary reads lora and dora"),
    (say(fine_tune_type=["lora"]), r"fine_tune_type: is \[.*\]; lorary reads lora and dora"),
    (say(lora_parameters=None), "lora_parameters: is null"),
    (say(parameters={"rank": 0}), "lora_parameters: rank: is 0; it takes a whole number from 1"),
    (say(parameters={"scale": None}), "lora_parameters: scale: is null; it takes a positive number"),
    (say(parameters={"alpha": 16}), "alpha: is there: early releases of mlx-lm multiply the scale by alpha / rank"),
    (say(parameters={"rank": 4}), r"q_proj.lora_a: has the shape \[16, 3\], expected \[16, 4\]"),
    (tensor("q_proj.lora_a", lambda t: t.T), r"has the shape \[3, 16\], expected \[16, 3\]\n.*hint: it is transposed"),
    (tensor("q_proj.lora_a", lambda t: t[None]), "layers.0.self_attn.q_proj: adapts fused experts"),
    (tensor("q_proj.lora_b", lambda t: None), "q_proj.lora_b: is missing"),
    (tensor("q_proj.lora_b", lambda t: t * torch.nan), "48 of 48 values are NaN or infinite"),
    (tensor("lora_a", lambda t: None), r"is missing"),
]


@pytest.mark.parametrize(("spoil", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_bad_adapters_of_mlx_are_refused(spoil: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    folder_of(tmp_path)
    spoil(tmp_path)
    with pytest.raises(lorary.FileError, match=message):
        lorary.load(LLAMA.model(), tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("block_sparse_moe.experts.0.w1", r"experts\.0\.w1: is a part of .*experts\.gate_up_proj here"),
        ("mlp.experts.gate_up_proj", r"gate_up_proj: adapts fused experts, which only PEFT's files are read for"),
    ],
)
def test_experts_of_mlx_are_refused(name: str, message: str, tmp_path: Path) -> None:
    tensors = folder_of(tmp_path, sites=SITES[:1])
    moved = {key.replace("self_attn.q_proj", name): t for key, t in tensors.items()}
    save_file(moved, tmp_path / "adapters.safetensors")
    with pytest.raises(lorary.FileError, match=message):
        lorary.load_adapter(tmp_path, model=tiny.seeded("MixtralForCausalLM"))


def test_other_tensors_of_mlx_are_refused(tmp_path: Path) -> None:
    tensors = folder_of(tmp_path, "dora", ("model.embed_tokens",))
    with pytest.raises(lorary.FileError, match="embed_tokens: mlx-lm's DoRA of an embedding has a magnitude for each"):
        lorary.load(LLAMA.model(), tmp_path)
    tensors = folder_of(tmp_path)
    save_file(tensors | {"model.norm.weight": torch.ones(16)}, tmp_path / "adapters.safetensors")
    with pytest.raises(lorary.FileError, match=r"model\.norm\.weight: is not a tensor of this adapter"):
        lorary.load_adapter(tmp_path)
    save_file({k.replace("q_proj", "qproj"): t for k, t in tensors.items()}, tmp_path / "adapters.safetensors")
    with pytest.raises(lorary.FileError, match=r"qproj: adapts a layer that the model does not have\n.*q_proj"):
        lorary.load(LLAMA.model(), tmp_path)
