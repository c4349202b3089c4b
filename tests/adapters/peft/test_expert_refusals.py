"""Files of experts that are wrong or hostile: the sentence of each refusal, and a base that stays as it is."""

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
from lorary.errors import FileError
from tests import tiny
from tests.adapters.peft.test_experts import OLD_MIXTRAL, old_file, saved_by_peft
from tests.experts import moe

pytest.importorskip("peft")

Change = Callable[[dict[str, Tensor]], object]
SINGLE = "base_model.model.model.layers.0.block_sparse_moe.experts"
FUSED = "base_model.model.model.layers.{}.mlp.experts"
W1 = f"{SINGLE}.0.w1.lora_A.weight"


def copied(old: str, new: str, where: str = W1) -> Change:
    """The tensors with `where` in their names, under further names."""
    return lambda t: t.update({k.replace(old, new): v.clone() for k, v in list(t.items()) if where in k})


def put(name: str, value: Tensor) -> Change:
    return lambda t: t.update({name: value})


def whole(tensors: dict[str, Tensor]) -> None:
    """Factors of every fused `down_proj` beside those of single experts."""
    for layer in range(2):
        tensors[f"{FUSED.format(layer)}.lora_A.weight"] = torch.ones(8, 24)
        tensors[f"{FUSED.format(layer)}.lora_B.weight"] = torch.ones(16, 8)


def nothing(tensors: dict[str, Tensor]) -> None:
    """The tensors as they are."""


OF_SINGLE_EXPERTS: dict[str, tuple[Change, dict[str, Any], str]] = {
    "as a whole too": (
        whole,
        {"target_parameters": ["experts.down_proj"]},
        "layers.0.mlp.experts.down_proj: has factors of its own in this file, and factors of single experts too",
    ),
    "the old name and the new": (
        copied("block_sparse_moe", "mlp", "experts.0.w2"),
        {},
        "mlp.experts.0.w2: is there twice: model.layers.0.block_sparse_moe.experts.0.w2 is the same projection",
    ),
    "with a prefix and without": (
        copied("base_model.model.", "", "experts.0.w2"),
        {},
        "experts.0.w2.lora_A.weight: is there twice, with and without its prefix",
    ),
    "with an adapter's name and without": (
        copied(".weight", ".default.weight", "experts.0.w2"),
        {},
        "experts.0.w2.lora_A.weight: is there twice, with and without an adapter's name",
    ),
    "with a wrapper and without": (
        copied("layers.0", "layers.0._orig_mod"),
        {},
        "experts.0.w1.lora_A.weight: is there twice, with and without a wrapper's name",
    ),
    "an expert beyond any": (
        copied("experts.0.", f"experts.{10**18}."),
        {},
        "experts.1000000000000000000.w1: is of expert 1000000000000000000, and model.layers.0.mlp.experts.gate_up_proj",
    ),
    "a negative expert": (
        copied("experts.0.", "experts.-1."),
        {},
        "experts.-1.w1.lora_A.weight: adapts a module that the model does not have",
    ),
    "a projection that is none": (copied(".w1.", ".w4."), {}, "experts.0.w4.lora_A.weight: adapts a module that"),
    "a layer that is none": (copied("layers.0", "layers.7"), {}, "model.layers.7.block_sparse_moe.experts.0.w1.lora_A"),
    "not a number": (put(W1, torch.full((2, 16), torch.nan)), {}, "32 of 32 values are NaN or infinite"),
    "rank 0": (
        put(W1, torch.ones(0, 16)),
        {},
        "experts.0.w1: has rank 0 for each expert, and the configuration says 2",
    ),
    "transposed": (
        put(W1, torch.ones(16, 2)),
        {},
        "experts.0.w1: has rank 16 for each expert, and the configuration says 2",
    ),
    "a negative rank in the configuration": (nothing, {"r": -2}, "r: is -2; it takes a whole number from 1 to 65,536"),
    "alpha NaN": (nothing, {"lora_alpha": float("nan")}, "adapter_config.json: NaN is not a JSON number"),
    "alpha infinite": (nothing, {"lora_alpha": float("inf")}, "adapter_config.json: Infinity is not a JSON number"),
}

OF_FUSED_EXPERTS: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": (
        {"use_dora": True},
        "use_dora: is true, and PEFT has no magnitudes for the experts in `target_parameters`",
    ),
    "a number": ({"target_parameters": 3}, "target_parameters: is 3, not a list of names"),
    "an empty name": ({"target_parameters": [""]}, 'target_parameters: is [""], not a list of names'),
    "another name": (
        {"target_parameters": ["nothing"]},
        "target_parameters: names 'nothing': the model has no such parameter of experts that is known",
    ),
    "a path": ({"target_parameters": ["../../down_proj"]}, "target_parameters: names '../../down_proj': the model has"),
    "a norm": ({"target_parameters": ["input_layernorm.weight"]}, "adapts a module that the model does not have"),
    "a negative rank": ({"rank_pattern": {"down_proj": -2}}, "rank_pattern: 'down_proj': is -2; it takes a whole"),
    "rank 2^60": ({"rank_pattern": {"down_proj": 2**60}}, "rank_pattern: 'down_proj': is 1152921504606846976"),
    "another rank": ({"rank_pattern": {"down_proj": 3}}, "has the shape [8, 24], expected [12, 24]"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("experts")
    old_file("MixtralForCausalLM", folder / "single", OLD_MIXTRAL)
    saved_by_peft("MixtralForCausalLM", folder / "fused", target_parameters=["gate_up_proj", "down_proj"])
    return {name: folder / name for name in ("single", "fused")}


def refused(source: Path, folder: Path, change: Change, fields: dict[str, Any], sentence: str) -> None:
    """Read a changed copy of an adapter, which must be refused with nothing changed."""
    folder.mkdir()
    tensors = load_file(source / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = json.loads((source / "adapter_config.json").read_text()) | fields
    (folder / "adapter_config.json").write_text(json.dumps(config))
    model = moe()
    before = tiny.everything(model)
    with pytest.raises(FileError) as caught:
        lorary.load(model, folder)
    assert sentence in str(caught.value)
    assert tiny.everything(model) == before


@pytest.mark.parametrize("case", OF_SINGLE_EXPERTS)
def test_a_file_of_single_experts(case: str, folders: dict[str, Path], tmp_path: Path) -> None:
    refused(folders["single"], tmp_path / "a", *OF_SINGLE_EXPERTS[case])


@pytest.mark.parametrize("case", OF_FUSED_EXPERTS)
def test_a_file_of_fused_experts(case: str, folders: dict[str, Path], tmp_path: Path) -> None:
    refused(folders["fused"], tmp_path / "a", nothing, *OF_FUSED_EXPERTS[case])
