"""PEFT's adapters of nn.MultiheadAttention, read and written: equal outputs both ways, and their limits."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorary
from lorary.adapters.peft.export import export_peft
from lorary.errors import FileError, LoraryError

pytestmark = pytest.mark.filterwarnings("ignore:saved in lorary's own form")
TOKENS = torch.arange(10).reshape(2, 5)


class Tower(nn.Module):
    """Two attentions and a head, as in OpenCLIP's towers."""

    def __init__(self, **words: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(30, 8)
        self.blocks = nn.ModuleList([nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, **words)}) for _ in range(2)])
        self.head = nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block["attn"](x, x, x, need_weights=False)[0]  # type: ignore[index]
        y: Tensor = self.head(x)
        return y


def fill(model: nn.Module) -> nn.Module:
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_(torch.randn(p.shape, generator=random) * 0.1)
    return model.eval()


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(TOKENS)
    return y


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def peft_folder(folder: Path, **words: Any) -> Tensor:
    """What PEFT computes with the adapter that it saves there."""
    words = {"r": 4, "lora_alpha": 6, "target_modules": ["attn"]} | words
    model = fill(get_peft_model(Tower(), LoraConfig(**words)))
    model.save_pretrained(str(folder))
    return outputs(model)


def ours(method: str = "lora", targets: Any = "all-linear", **words: Any) -> nn.Module:
    model = Tower()
    lorary.attach(model, lorary.plan(model, lorary.method(method, r=2), targets=targets, **words))
    return fill(model)


WORDS: dict[str, dict[str, Any]] = {
    "by name": {},
    "by pattern": {"target_modules": r".*\.attn"},
    "one attention, a rank of its own": {
        "target_modules": ["blocks.0.attn", "head"],
        "rank_pattern": {"blocks.0.attn": 3},
        "alpha_pattern": {"head": 5},
    },
    "biases": {"bias": "all", "use_rslora": True},
}


@pytest.mark.parametrize("kind", WORDS)
def test_there_and_back(kind: str, tmp_path: Path) -> None:
    expected = peft_folder(tmp_path / "theirs", **WORDS[kind])
    assert (expected - outputs(Tower().eval())).abs().max() > 1e-2
    model = lorary.load(Tower(), tmp_path / "theirs").eval()
    close(outputs(model), expected)
    lorary.save(model, tmp_path / "back")
    theirs, back = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "back"))
    assert theirs.keys() == back.keys()
    assert all(torch.equal(t, back[name]) for name, t in theirs.items())
    close(outputs(PeftModel.from_pretrained(Tower(), str(tmp_path / "back")).eval()), expected)
    close(outputs(lorary.load(Tower(), tmp_path / "back").eval()), expected)
    close(outputs(lorary.merge(model)), expected)
    without_base = lorary.load_adapter(tmp_path / "theirs")
    assert {a.site.kind for a in without_base.sites} >= {"in_projection", "out_projection"}


def test_a_note_says_that_peft_adds_an_update_twice(tmp_path: Path) -> None:
    peft_folder(tmp_path)
    assert "PEFT adds the update of nn.MultiheadAttention's out_proj twice: B of it is doubled here" in (
        lorary.load_adapter(tmp_path, model=Tower()).notes
    )


@pytest.mark.parametrize(
    ("method", "targets", "words"),
    [
        ("pissa", "all-linear", {}),
        ("melora", "attention", {}),
        ("vera", "attention", {}),
        ("lora", ["in_proj_weight[q,v]", "out_proj"], {}),
        ("lora", "attention", {"ranks": {"out_proj": 3}}),
        ("lora", ["blocks.0.attn"], {}),
    ],
)
@pytest.mark.parametrize("with_base", [True, False])
def test_other_methods_and_ranks_are_exported(
    method: str, targets: Any, words: dict[str, Any], with_base: bool, tmp_path: Path
) -> None:
    model = ours(method, targets, **words)
    export_peft(lorary.Adapter.of(model), tmp_path / "peft", model=Tower() if with_base else None)
    close(outputs(PeftModel.from_pretrained(Tower(), str(tmp_path / "peft")).eval()), outputs(model))


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (lambda: ours("dora"), "is of nn.MultiheadAttention with DoRA's magnitudes, which PEFT does not have there"),
        (lambda: ours(targets="in_proj_weight"), "is adapted alone, and PEFT adapts in_proj_weight and out_proj of"),
        (lambda: ours(targets="out_proj"), "is adapted alone, and PEFT adapts in_proj_weight and out_proj of"),
    ],
)
def test_what_peft_cannot_hold(model: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(FileError) as refused:
        export_peft(lorary.Adapter.of(model()), tmp_path / "peft")
    assert sentence in str(refused.value)
    assert not (tmp_path / "peft").exists()


def test_other_widths_and_a_whole_model_are_saved_in_the_own_form(tmp_path: Path) -> None:
    for i, attention in enumerate((nn.MultiheadAttention(8, 2), nn.TransformerDecoderLayer(8, 2, 16).multihead_attn)):
        lorary.attach(attention, lorary.plan(attention, lorary.method("lora", r=2)))
        with pytest.raises(FileError, match="an attention that is the whole model, and PEFT adapts modules inside"):
            export_peft(lorary.Adapter.of(attention), tmp_path / f"peft {i}")
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, kdim=6)})
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2)))
    with pytest.raises(FileError, match="keys or values have another width, which PEFT does not adapt"):
        export_peft(lorary.Adapter.of(model), tmp_path / "peft")
    lorary.save(model, tmp_path / "own")
    assert not (tmp_path / "own" / "adapter_config.json").exists()


def damaged(folder: Path, change: Any) -> str:
    peft_folder(folder)
    tensors, config = load_file(folder / "adapter_model.safetensors"), folder / "adapter_config.json"
    fields = json.loads(config.read_text())
    change(tensors, fields)
    save_file(tensors, folder / "adapter_model.safetensors")
    config.write_text(json.dumps(fields))
    model = Tower()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(LoraryError) as refused:
        lorary.load(model, folder)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    return str(refused.value)


IN, OUT = "base_model.model.blocks.0.attn", "base_model.model.blocks.0.attn.base_layer.out_proj"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t, c: t.pop(f"{IN}.lora_B.weight"), "blocks.0.attn.in_proj_weight.lora_B.weight: is missing"),
        (lambda t, c: t.pop(f"{OUT}.lora_A.weight"), "blocks.0.attn.out_proj.lora_A.weight: is missing"),
        (
            lambda t, c: t.update({f"{IN}.lora_B.weight": torch.ones(8, 4)}),
            "has the shape [8, 4], expected [24, 4]",
        ),
        (
            lambda t, c: t[f"{OUT}.lora_B.weight"].fill_(float("nan")),
            "32 of 32 values are NaN or infinite",
        ),
        (
            lambda t, c: c.update(target_modules=["nothing"]),
            "names no layer of this model",
        ),
        (
            lambda t, c: (
                t.update({n.replace(".base_layer.", "."): t.pop(n) for n in list(t)}),
                c.update(target_modules=["out_proj"]),
            ),
            "nn.MultiheadAttention reads its weight and never calls it: an adapter there would do nothing",
        ),
        (lambda t, c: c.update(use_dora=True), "lora_magnitude_vector: is missing"),
        (lambda t, c: c.update(r=5), "has the shape [4, 8], expected [5, 8]"),
    ],
)
def test_damaged_files(change: Any, sentence: str, tmp_path: Path) -> None:
    assert sentence in damaged(tmp_path, change)


def test_a_copy_computes_the_same(tmp_path: Path) -> None:
    peft_folder(tmp_path)
    model = lorary.load(Tower(), tmp_path).eval()
    assert torch.equal(outputs(copy.deepcopy(model)), outputs(model))
