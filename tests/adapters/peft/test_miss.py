"""MiSS between PEFT and here: one block for every shard of the inputs, whole or in rows that are repeated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import MissConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorary
from lorary.adapters import export_peft
from lorary.errors import FileError
from tests.adapters.models import BASES, Base, by_peft, close, fill, outputs, same

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT's `set_scale` of MiSS says that it has none
    pytest.mark.filterwarnings("ignore:Scaling operation for MiSS not supported:UserWarning"),
]
LLAMA, GPT2, BERT, _ = BASES


def saved_by_peft(base: Base, folder: Path, **words: Any) -> Tensor:
    """Saves a MiSS with PEFT; returns PEFT's outputs."""
    words = {"target_modules": list(base.targets), "r": 5} | words
    model = get_peft_model(base.model(), MissConfig(**words)).eval()
    fill(p for n, p in model.named_parameters() if "miss_" in n)
    model.save_pretrained(str(folder))
    return outputs(model)


def miss(base: Base, targets: Any = None, *names: str, ranks: Any = None, **options: Any) -> Any:
    """The base with a filled MiSS on it."""
    model = base.model()
    method = lorary.method("miss", *names, **({"r": 5} | options))
    lorary.attach(model, lorary.plan(model, method, targets or list(base.targets), ranks=ranks))
    fill(p for n, p in model.named_parameters() if ".params." in n)
    return model.eval()


@pytest.mark.parametrize("base", [LLAMA, BERT], ids=str)
@pytest.mark.parametrize(
    ("words", "options"),
    [
        ({}, {}),
        ({"r": 4}, {"r": 4}),  # a divisor of the inputs
        ({"init_weights": False, "miss_dropout": 0.25}, {"dropout": 0.25}),
        ({"init_weights": "mini", "mini_r": 4}, {"mini_r": 4}),
        ({"mini_r": 4}, {}),  # which PEFT ignores
    ],
    ids=str,
)
def test_saved_by_peft_loads_here(base: Base, words: dict[str, Any], options: dict[str, Any], tmp_path: Path) -> None:
    theirs = saved_by_peft(base, tmp_path, **words)
    model = lorary.load(base.model(), tmp_path)
    close(outputs(model), theirs)
    assert (theirs - outputs(base.model())).abs().max() > 1e-3, "the adapter must change something"
    assert lorary.attached(model).method == lorary.method("miss", **({"r": 5} | options))
    lorary.save(model, tmp_path / "again")
    close(by_peft(base, tmp_path / "again"), theirs)
    name = "adapter_model.safetensors"
    mine, other = (load_file(folder / name) for folder in (tmp_path / "again", tmp_path))
    assert mine.keys() == other.keys()
    assert all(torch.equal(t, other[n]) for n, t in mine.items())
    lorary.merge(model)
    torch.testing.assert_close(outputs(model), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["all", "MiSS_only"])
def test_biases_that_peft_trained(name: str, tmp_path: Path) -> None:
    theirs = saved_by_peft(BERT, tmp_path, bias=name)
    close(outputs(lorary.load(BERT.model(), tmp_path)), theirs)


MADE: dict[str, tuple[Base, Any]] = {
    "Llama": (LLAMA, lambda: miss(LLAMA)),
    "all linear layers": (LLAMA, lambda: miss(LLAMA, "all-linear")),
    "BERT": (BERT, lambda: miss(BERT)),
    "rows that repeat": (LLAMA, lambda: miss(LLAMA, mini_r=2)),
    "with biases": (BERT, lambda: miss(BERT, None, "bitfit")),
    "dropout": (BERT, lambda: miss(BERT, dropout=0.5)),
}


@pytest.mark.parametrize(("base", "make"), MADE.values(), ids=MADE)
def test_saved_here_loads_in_peft(base: Base, make: Any, tmp_path: Path) -> None:
    model = make()
    y = outputs(model)
    lorary.save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "MISS"
    close(by_peft(base, tmp_path), y)
    same(lorary.load_adapter(tmp_path), lorary.Adapter.of(model))
    (tmp_path / "lorary.json").unlink()
    close(outputs(lorary.load(base.model(), tmp_path)), y)


OWN: dict[str, tuple[Base, Any]] = {
    "several ranks": (LLAMA, lambda: miss(LLAMA, ranks={"down_proj": 4})),
    "GPT-2's transposed layers": (GPT2, lambda: miss(GPT2)),
    "parts": (GPT2, lambda: miss(GPT2, ["c_attn[q,v]"])),
    "DoRA's magnitudes": (LLAMA, lambda: miss(LLAMA, None, "dora")),
}


@pytest.mark.parametrize(("base", "make"), OWN.values(), ids=OWN)
def test_what_pefts_type_cannot_say_is_kept_in_our_own_form_and_exported_as_lora(
    base: Base, make: Any, tmp_path: Path
) -> None:
    model = make()
    lorary.save(model, tmp_path / "own")
    assert sorted(p.name for p in (tmp_path / "own").iterdir()) == ["adapter.safetensors", "lorary.json"]
    same(lorary.load_adapter(tmp_path / "own"), lorary.Adapter.of(model))
    assert torch.equal(outputs(lorary.load(base.model(), tmp_path / "own")), outputs(model))
    export_peft(lorary.Adapter.of(model), tmp_path / "out", model=base.model())
    close(by_peft(base, tmp_path / "out"), outputs(model))


def test_exported_as_lora_it_is_read_by_what_knows_lora_alone(tmp_path: Path) -> None:
    model = miss(LLAMA)
    export_peft(lorary.Adapter.of(model), tmp_path, model=LLAMA.model())
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    close(by_peft(LLAMA, tmp_path), outputs(model))
    close(outputs(lorary.load(LLAMA.model(), tmp_path)), outputs(model))


def test_pefts_own_conversion_to_lora_is_the_same_lora(tmp_path: Path) -> None:
    from peft import convert_to_lora

    saved_by_peft(LLAMA, tmp_path)
    torch.manual_seed(0)
    theirs = get_peft_model(LLAMA.model(), MissConfig(r=5, target_modules=list(LLAMA.targets))).eval()
    fill(p for n, p in theirs.named_parameters() if "miss_" in n)
    _, tensors = convert_to_lora(theirs, rank=5)
    forms = lorary.Adapter.of(lorary.load(LLAMA.model(), tmp_path)).low_rank()
    for name, form in forms.items():
        A, B = (tensors[f"base_model.model.{name}.lora_{role}.weight"] for role in "AB")
        torch.testing.assert_close(B @ A, form.B @ form.A, rtol=1e-5, atol=1e-5)


# --- refused ----------------------------------------------------------------------------------------------------------


def rewrite(folder: Path, what: Any) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    what(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def say(folder: Path, **words: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | words))


Q = "model.layers.0.self_attn.q_proj"
D = f"base_model.model.{Q}.miss_block"
BAD: dict[str, tuple[Any, str]] = {
    "bat": (
        lambda f: say(f, init_weights="bat"),
        "init_weights: is 'bat', a variant whose update multiplies its matrix with the weight, which is not supported; "
        "merge the adapter with PEFT",
    ),
    "a variant that is not known": (
        lambda f: say(f, init_weights="mega"),
        "init_weights: is 'mega'; it takes true, false or mini",
    ),
    "a block missing": (lambda f: rewrite(f, lambda t: t.pop(D)), f"{Q}.miss_block: is missing"),
    "a block of infinities": (
        lambda f: rewrite(f, lambda t: t[D].fill_(float("inf"))),
        f"{Q}.miss_block: 80 of 80 values are NaN or infinite, the first at [0, 0]",
    ),
    "a transposed block": (
        lambda f: rewrite(f, lambda t: t.update({D: torch.ones(16, 5)})),
        f"{Q}.miss_block: has the shape [16, 5], expected [5, 16]\n      hint: it is transposed",
    ),
    "bat's blocks unsaid": (
        lambda f: rewrite(f, lambda t: t.update({D: torch.ones(4, 4, 4)})),
        f"{Q}.miss_block: has the shape [4, 4, 4], expected [5, 16]",
    ),
    "mini unsaid": (
        lambda f: rewrite(f, lambda t: t.update({D: torch.ones(5, 4)})),
        f"{Q}.miss_block: has the shape [5, 4], expected [5, 16]",
    ),
    "a rank above the inputs": (lambda f: say(f, r=20), f"{Q}: it has 16 inputs, fewer than one shard of r = 20"),
    "rows that do not divide the outputs": (
        lambda f: say(f, init_weights="mini", mini_r=5),
        f"{Q}: mini_r = 5 does not divide its 16 output features",
    ),
    "no rank": (lambda f: say(f, r=0), "r: is 0; it takes a whole number from 1 to 65,536"),
    "a bias of another type": (lambda f: say(f, bias="lora_only"), "bias: is 'lora_only'; it takes one of"),
}


@pytest.mark.parametrize(("damage", "sentence"), BAD.values(), ids=BAD)
def test_a_bad_file_is_refused(damage: Any, sentence: str, tmp_path: Path) -> None:
    saved_by_peft(LLAMA, tmp_path)
    damage(tmp_path)
    model = LLAMA.model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(FileError) as refusal:
        lorary.load(model, tmp_path)
    assert sentence in str(refusal.value)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_file_that_peft_made_with_bat_is_refused(tmp_path: Path) -> None:
    saved_by_peft(LLAMA, tmp_path, init_weights="bat", r=4, target_modules=["q_proj"])
    with pytest.raises(FileError, match="is 'bat', a variant whose update multiplies its matrix with the weight"):
        lorary.load(LLAMA.model(), tmp_path)


def test_without_the_base_its_shapes_are_not_known(tmp_path: Path) -> None:
    saved_by_peft(LLAMA, tmp_path)
    with pytest.raises(FileError, match="the shapes of the layers that PEFT's MiSS adapts are known only to the model"):
        lorary.load_adapter(tmp_path)
