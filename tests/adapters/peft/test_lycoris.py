"""LoHa and LoKr between PEFT and here: linear layers, convolutions with and without cores, ranks by layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorary
from lorary.adapters.peft.export import export_peft
from lorary.errors import FileError
from lorary.methods.lokr import factorization
from tests.adapters import models
from tests.adapters.models import BASES, Base, close, outputs, same

LLAMA, GPT2, BERT, CONV = BASES
CONFIGS = {"loha": LoHaConfig, "lokr": LoKrConfig}


def fill(parameters: Iterable[Tensor]) -> None:
    """Numbers whose products are of a trained adapter's size."""
    filled = list(parameters)
    models.fill(filled)
    with torch.no_grad():
        for parameter in filled:
            parameter.mul_(3)


class Images(nn.Module):
    """Convolutions of every sort that PEFT adapts: grouped, dilated, of one pixel, and over a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.dilated = nn.Conv2d(8, 12, 3, padding=2, dilation=2)
        self.point = nn.Conv2d(12, 6, 1)
        self.along = nn.Conv1d(6, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(torch.tanh(self.dilated(torch.tanh(self.grouped(x)))))
        y: Tensor = self.along(x.flatten(2))
        return y


def images() -> nn.Module:
    torch.manual_seed(3)
    return Images().eval()


def seen(model: nn.Module) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(torch.linspace(-1, 1, 2 * 4 * 36).reshape(2, 4, 6, 6))
    return y


def saved_by_peft(name: str, make: Callable[[], nn.Module], folder: Path, **words: Any) -> nn.Module:
    """Saves an adapter with PEFT, with numbers in every tensor."""
    model = get_peft_model(make(), CONFIGS[name](**({"r": 2, "alpha": 3} | words))).eval()
    fill(p for _, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(str(folder))
    return model


WORDS: dict[str, tuple[str, Base, dict[str, Any]]] = {
    "loha": ("loha", LLAMA, {}),
    "loha of a high rank": ("loha", LLAMA, {"r": 7}),
    "loha, ranks and alphas": ("loha", BERT, {"rank_pattern": {"value": 3}, "alpha_pattern": {"value": 5}}),
    "loha, dropped in training": ("loha", LLAMA, {"rank_dropout": 0.5, "module_dropout": 0.5}),
    "lokr": ("lokr", LLAMA, {}),
    "lokr, D whole": ("lokr", LLAMA, {"r": 16}),
    "lokr, both products": ("lokr", LLAMA, {"r": 1, "decompose_both": True}),
    "lokr, a large C": ("lokr", LLAMA, {"decompose_factor": 8}),
    "lokr, ranks and alphas": ("lokr", BERT, {"rank_pattern": {"value": 1}, "alpha_pattern": {"value": 5}}),
    "lokr, LyCORIS' start": ("lokr", LLAMA, {"init_weights": "lycoris"}),
}


@pytest.mark.parametrize(("name", "base", "words"), WORDS.values(), ids=WORDS)
def test_saved_by_peft_loads_here_and_back(name: str, base: Base, words: dict[str, Any], tmp_path: Path) -> None:
    theirs = outputs(saved_by_peft(name, base.model, tmp_path, target_modules=list(base.targets), **words))
    assert (theirs - outputs(base.model())).abs().max() > 1e-3, "the adapter must change something"
    model = lorary.load(base.model(), tmp_path)
    close(outputs(model), theirs)
    lorary.save(model, tmp_path / "again")
    written, read = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "again", tmp_path))
    assert written.keys() == read.keys()
    assert all(torch.equal(t, read[key]) for key, t in written.items())
    close(outputs(PeftModel.from_pretrained(base.model(), str(tmp_path / "again")).eval()), theirs)
    same(lorary.load_adapter(tmp_path / "again"), lorary.Adapter.of(model))
    close(outputs(lorary.merge(model)), theirs)


@pytest.mark.parametrize("words", [{}, {"use_effective_conv2d": True}], ids=["matrices", "cores"])
@pytest.mark.parametrize("name", CONFIGS)
def test_convolutions(name: str, words: dict[str, Any], tmp_path: Path) -> None:
    targets = ["grouped", "dilated", "point"] + ["along"] * (name == "loha")
    r = 1 if name == "lokr" else 2
    theirs = seen(saved_by_peft(name, images, tmp_path, target_modules=targets, r=r, **words))
    assert any("_t2" in key for key in load_file(tmp_path / "adapter_model.safetensors")) == bool(words)
    model = lorary.load(images(), tmp_path)
    close(seen(model), theirs)
    lorary.save(model, tmp_path / "again")
    close(seen(PeftModel.from_pretrained(images(), str(tmp_path / "again")).eval()), theirs)


@pytest.mark.parametrize("words", [{}, {"use_effective_conv2d": True}], ids=["matrices", "core"])
def test_lokr_of_a_sequence(words: dict[str, Any], tmp_path: Path) -> None:
    """PEFT multiplies C with the wrong dimensions of a whole D there; of products it does not."""

    def wide() -> nn.Module:
        torch.manual_seed(5)
        return nn.Sequential(nn.Conv1d(4, 36, 3)).eval()

    x = torch.linspace(-1, 1, 40).reshape(1, 4, 10)
    theirs = saved_by_peft("lokr", wide, tmp_path, target_modules=["0"], r=2, **words)(x)
    torch.testing.assert_close(lorary.load(wide(), tmp_path)(x), theirs)
    saved_by_peft("lokr", wide, tmp_path / "whole", target_modules=["0"], r=3)
    with pytest.raises(FileError, match="of a Conv1d multiplies C with the wrong dimensions of a whole D"):
        lorary.load(wide(), tmp_path / "whole")


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_here_loads_in_peft(name: str, tmp_path: Path) -> None:
    model, base = LLAMA.model(), LLAMA
    options = {"factor": 4, "decompose_both": True} if name == "lokr" else {}
    plan = lorary.plan(model, lorary.method(name, r=3, alpha=2.5, **options), ranks={"*.down_proj": 1})
    fill(p for n, p in lorary.attach(model, plan).eval().named_parameters() if ".params." in n)
    lorary.save(model, tmp_path)
    close(outputs(PeftModel.from_pretrained(base.model(), str(tmp_path)).eval()), outputs(model))
    words = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (words["peft_type"], words["r"], words["alpha"]) == (name.upper(), 3, 2.5)
    assert words["rank_pattern"] == {"down_proj": 1}
    (tmp_path / "lorary.json").unlink()
    close(outputs(lorary.load(base.model(), tmp_path)), outputs(model))


@pytest.mark.parametrize("name", CONFIGS)
def test_exported_it_is_a_plain_lora(name: str, tmp_path: Path) -> None:
    model = LLAMA.model()
    lorary.attach(model, lorary.plan(model, lorary.method(name, r=2)))
    fill(p for n, p in model.eval().named_parameters() if ".params." in n)
    export_peft(lorary.Adapter.of(model), tmp_path, model=LLAMA.model())
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    close(outputs(PeftModel.from_pretrained(LLAMA.model(), str(tmp_path)).eval()), outputs(model))


def test_the_sizes_are_those_of_peft() -> None:
    from peft.tuners.lokr.layer import factorization as theirs

    for factor in (-1, *range(1, 20)):
        for size in range(1, 130):
            assert factorization(size, factor) == theirs(size, factor), (size, factor)


def _without(folder: Path, ending: str) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({k: t for k, t in load_file(path).items() if not k.endswith(ending)}, path)


def _put(folder: Path, ending: str, change: Callable[[Tensor], Tensor]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({k: change(t) if k.endswith(ending) else t for k, t in load_file(path).items()}, path)


def _say(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


BAD: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a factor is missing": ("loha", lambda f: _without(f, "0.self_attn.q_proj.hada_w2_b"), "hada_w2_b: is missing"),
    "NaN": ("loha", lambda f: _put(f, "hada_w1_a", lambda t: t * float("nan")), "values are NaN"),
    "a wrong shape": ("loha", lambda f: _put(f, "hada_w1_a", lambda t: t[:1]), r"hada_w1_a: has the shape \[1, 2\]"),
    "another rank": ("loha", lambda f: _say(f, r=3), r"has the shape \[16, 2\], expected \[16, 3\]"),
    "rank 0": ("lokr", lambda f: _say(f, r=0), "r: is 0; it takes a whole number from 1"),
    "alpha below 0": ("lokr", lambda f: _say(f, alpha=-1), "alpha: is -1; it takes a positive number"),
    "factor 0": ("lokr", lambda f: _say(f, decompose_factor=0), "it takes a whole number of at least 1, or -1"),
    "another factor": ("lokr", lambda f: _say(f, decompose_factor=2), r"lokr_w1: has the shape"),
    "one product only": ("lokr", lambda f: _say(f, decompose_both=True, r=1), "lokr_w1_a: is missing"),
    "a core nobody asked for": ("lokr", lambda f: _say(f, use_effective_conv2d="yes"), "it takes true or false"),
    "an unknown field": ("lokr", lambda f: _say(f, lora_alpha=3), "lora_alpha: is not a field that lorary knows"),
    "a dropout of 2": ("loha", lambda f: _say(f, rank_dropout=2), "it takes a probability"),
    "an unknown start": ("loha", lambda f: _say(f, init_weights="pissa"), "it takes true, false or lycoris"),
    "another type's tensors": ("loha", lambda f: _say(f, peft_type="LOKR"), "belongs to LoHa, which the configuration"),
}


@pytest.mark.parametrize(("name", "damage", "sentence"), BAD.values(), ids=BAD)
def test_damaged_folders_are_refused(name: str, damage: Callable[[Path], None], sentence: str, tmp_path: Path) -> None:
    saved_by_peft(name, LLAMA.model, tmp_path, target_modules=["q_proj"])
    damage(tmp_path)
    with pytest.raises(FileError, match=sentence):
        lorary.load(LLAMA.model(), tmp_path)


def test_without_the_model_the_layers_are_unknown(tmp_path: Path) -> None:
    saved_by_peft("lokr", LLAMA.model, tmp_path, target_modules=["q_proj"])
    with pytest.raises(FileError, match="known only to the model"):
        lorary.load_adapter(tmp_path)


def test_what_peft_has_no_form_for_is_saved_here(tmp_path: Path) -> None:
    """Parts of a fused weight: no PEFT files beside lorary's own."""
    model = GPT2.model()
    lorary.attach(model, lorary.plan(model, lorary.method("loha", r=2), "c_attn[q,v]"))
    fill(p for n, p in model.eval().named_parameters() if ".params." in n)
    lorary.save(model, tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    assert torch.equal(outputs(lorary.load(GPT2.model(), tmp_path)), outputs(model))
