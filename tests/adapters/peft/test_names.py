"""Names in PEFT's files that wrappers, other adapters' names or patched layers have changed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorary
from tests.adapters.models import BASES, Base, adapted, by_peft, close, fill, ids, outputs

peft = pytest.importorskip("peft")

LLAMA = BASES[0]
PREFIX = "base_model.model."


def saved_by_peft(model: nn.Module, folder: Path, **options: object) -> Tensor:
    """The outputs of a filled adapter that PEFT has saved."""
    there = peft.get_peft_model(model, peft.LoraConfig(**({"r": 4, "lora_alpha": 6} | options))).eval()
    fill(p for n, p in there.named_parameters() if "lora_" in n or "modules_to_save" in n)
    there.save_pretrained(str(folder))
    return outputs(there)


def rename(folder: Path, new: Callable[[str], str], **config: object) -> None:
    """Change the names of a folder's tensors, and fields of its configuration."""
    path = folder / "adapter_model.safetensors"
    save_file({new(name): t for name, t in load_file(path).items()}, path)
    said = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(said | config))


# --- wrappers ---------------------------------------------------------------------------------------------------------

WRAPPED = {
    "compiled inside": (lambda n: n.replace(PREFIX, f"{PREFIX}_orig_mod."), "_orig_mod"),
    "compiled outside": (lambda n: f"_orig_mod.{n}", "_orig_mod"),
    "compiled layers": (lambda n: n.replace("layers.1.", "layers.1._orig_mod."), "_orig_mod"),
    "FSDP": (lambda n: n.replace(PREFIX, f"{PREFIX}_fsdp_wrapped_module."), "_fsdp_wrapped_module"),
    "checkpoints": (
        lambda n: n.replace(".0.", ".0._checkpoint_wrapped_module."),
        "_checkpoint_wrapped_module",
    ),
    "DDP outside": (lambda n: f"module.{n}", "module"),
    "DDP inside": (lambda n: n.replace(PREFIX, f"{PREFIX}module."), "module"),
    "no prefix, compiled": (lambda n: n.replace(PREFIX, "_orig_mod."), "_orig_mod"),
    "no prefix, DDP": (lambda n: n.replace(PREFIX, "module."), "module"),
    "compiled DDP": (lambda n: f"_orig_mod.module.{n}", "module"),
}


@pytest.mark.parametrize(("new", "component"), WRAPPED.values(), ids=WRAPPED)
def test_wrappers_are_left_out_of_the_names(new: Callable[[str], str], component: str, tmp_path: Path) -> None:
    theirs = saved_by_peft(LLAMA.model(), tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"])
    rename(tmp_path, new)
    adapter = lorary.load_adapter(tmp_path, model=LLAMA.model())
    assert f"`{component}` in the names of its tensors is a wrapper's, and was left out" in adapter.notes
    close(outputs(lorary.load(LLAMA.model(), tmp_path)), theirs)


def test_targets_with_wrappers_and_without_the_model(tmp_path: Path) -> None:
    theirs = saved_by_peft(LLAMA.model(), tmp_path, target_modules=["q_proj"])
    paths = [f"_orig_mod.model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    rename(tmp_path, lambda n: n.replace(PREFIX, f"{PREFIX}_orig_mod."), target_modules=paths)
    adapter = lorary.load_adapter(tmp_path)
    assert [a.site.name for a in adapter.sites] == [p.removeprefix("_orig_mod.") for p in paths]
    close(outputs(lorary.switch(LLAMA.model(), adapter)), theirs)


def test_a_tensor_with_and_without_a_wrapper_is_refused(tmp_path: Path) -> None:
    saved_by_peft(LLAMA.model(), tmp_path, target_modules=["q_proj"])
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {f"module.{n}": t.clone() for n, t in tensors.items()}, path)
    with pytest.raises(lorary.FileError, match="is there twice, with and without a wrapper's name"):
        lorary.load(LLAMA.model(), tmp_path)


@pytest.mark.parametrize("name", ["lora", "pissa"])
def test_our_own_older_folder_of_a_compiled_model(name: str, tmp_path: Path) -> None:
    model = adapted(LLAMA, name)
    adapter = lorary.Adapter.of(model)
    wrapped = dataclasses.replace(
        adapter,
        sites=tuple(
            dataclasses.replace(a, site=dataclasses.replace(a.site, name=f"_orig_mod.{a.site.name}"))
            for a in adapter.sites
        ),
        tensors={f"_orig_mod.{site}": roles for site, roles in adapter.tensors.items()},
        base=dataclasses.replace(adapter.base, architecture="OptimizedModule", structure="0" * 64),
    )
    lorary.save_adapter(wrapped, tmp_path)
    again = lorary.load_adapter(tmp_path)
    assert again.sites == adapter.sites
    assert "`_orig_mod` in the names of its tensors is a wrapper's, and was left out" in again.notes
    assert torch.equal(outputs(lorary.load(LLAMA.model(), tmp_path)), outputs(model))


class Modules(nn.Module):
    """A model with modules that are called `module`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        self.module = nn.ModuleDict({"first": nn.Linear(8, 8), "module": nn.ModuleDict({"last": nn.Linear(8, 5)})})

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.module["first"](self.embed(tokens)))
        out: Tensor = self.module["module"]["last"](hidden)  # type: ignore[index]
        return out


MODULES = Base("modules", Modules, ("first", "last"), "", "")


@pytest.mark.parametrize("component", ["", "module."])
def test_a_module_called_module_is_kept(component: str, tmp_path: Path) -> None:
    theirs = saved_by_peft(MODULES.model(), tmp_path, target_modules=["first", "last"])
    rename(tmp_path, lambda n: n.replace(PREFIX, PREFIX + component))
    adapter = lorary.load_adapter(tmp_path, model=MODULES.model())
    assert [a.site.name for a in adapter.sites] == ["module.first", "module.module.last"]
    assert bool(adapter.notes) is bool(component)
    close(outputs(lorary.load(MODULES.model(), tmp_path)), theirs)


def test_a_name_with_two_readings_is_refused(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"module": nn.Linear(4, 4)}), "module": nn.ModuleDict()})
    model["module"]["a"] = nn.Linear(4, 4)  # type: ignore[index]
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2), targets=["a.module"]))
    fill(p for n, p in model.named_parameters() if ".params." in n)
    lorary.save(model, tmp_path)
    (tmp_path / "lorary.json").unlink()
    rename(tmp_path, lambda n: n.replace("a.module", "module.a.module"))
    lorary.detach(model)
    what = r"module\.a\.module: may mean a\.module or module\.a: `module` is a wrapper's name, and a module's here"
    with pytest.raises(lorary.FileError, match=what):
        lorary.load(model, tmp_path)


# --- wrapped layers ---------------------------------------------------------------------------------------------------


class Clipped(nn.Module):
    """A linear layer between two clamps, as Gemma's clippable layers are."""

    def __init__(self, linear: nn.Module, extra: nn.Module | None = None) -> None:
        super().__init__()
        self.linear = linear
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x.clamp(-1, 1)).clamp(-1, 1)
        return out


def clipped(extra: bool = False) -> nn.Module:
    model = LLAMA.make()
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.self_attn.q_proj = Clipped(layer.self_attn.q_proj, nn.Linear(4, 4) if extra else None)
    return model


CLIPPED = Base("clipped", clipped, ("linear", "v_proj"), "", "")


@pytest.mark.parametrize("path", ["q_proj", "self_attn.q_proj"])
def test_a_patched_layer_of_peft_is_the_layer_inside(path: str, tmp_path: Path) -> None:
    model = adapted(CLIPPED, ranks={"linear": 3})
    lorary.save(model, tmp_path)
    close(by_peft(CLIPPED, tmp_path), outputs(model))
    (tmp_path / "lorary.json").unlink()
    own = {"target_modules": [path, "v_proj"], "rank_pattern": {path: 3, "v_proj": 4}}
    rename(tmp_path, lambda n: n.replace(".linear.", "."), **own)
    adapter = lorary.load_adapter(tmp_path, model=CLIPPED.model())
    q_proj = "model.layers.0.self_attn.q_proj"
    assert f"{q_proj} is a wrapper here: the adapter is on {q_proj}.linear" in adapter.notes
    close(outputs(lorary.load(CLIPPED.model(), tmp_path)), outputs(model))


def test_a_wrapper_around_two_layers_is_refused(tmp_path: Path) -> None:
    saved_by_peft(LLAMA.model(), tmp_path, target_modules=["q_proj"])
    with pytest.raises(lorary.FileError, match="target_modules: names no layer of this model"):
        lorary.load(clipped(extra=True), tmp_path)


# --- adapters' names --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Adapter name 'lora' should not be contained")
def test_adapters_whose_names_begin_alike(tmp_path: Path) -> None:
    names = ("foo", "foobar", "lora", "my_lora")
    there = peft.get_peft_model(LLAMA.model(), peft.LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="foo")
    for rank, name in enumerate(names[1:], start=3):
        there.add_adapter(name, peft.LoraConfig(r=rank, target_modules=["q_proj", "v_proj"]))
    fill(p for n, p in there.named_parameters() if "lora_" in n)
    there.save_pretrained(str(tmp_path))
    for name in names:
        there.set_adapter(name)
        with torch.no_grad():
            theirs = there.eval()(ids()).logits
        close(outputs(lorary.load(LLAMA.model(), tmp_path / name)), theirs)
