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
from tests import architectures
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


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["default", "fr_v2"])
def test_an_adapters_name_in_keys_is_left_out(name: str, dora: bool, tmp_path: Path) -> None:
    """The state dict of PEFT's model, saved as it is, with the copies of modules that are trained in full."""
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    config["use_dora"] = dora
    there = peft.get_peft_model(LLAMA.model(), peft.LoraConfig(**config), adapter_name=name).eval()
    fill(p for n, p in there.named_parameters() if "lora_" in n or "modules_to_save" in n)
    there.peft_config[name].save_pretrained(str(tmp_path))
    state = {n: t.clone() for n, t in there.state_dict().items() if "lora_" in n or "modules_to_save" in n}
    save_file(state, tmp_path / "adapter_model.safetensors")
    adapter = lorary.load_adapter(tmp_path, model=LLAMA.model())
    assert f"the adapter's name in those of its tensors, `{name}`, was left out" in adapter.notes
    close(outputs(lorary.load(LLAMA.model(), tmp_path)), outputs(there))


# --- Transformers' names ----------------------------------------------------------------------------------------------


def llava() -> nn.Module:
    """A LLaVA, whose modules had other names in Transformers 4."""
    return architectures.model("LlavaForConditionalGeneration")  # type: ignore[no-any-return]


def test_names_of_transformers_4_are_translated_by_its_own_mapping(tmp_path: Path) -> None:
    base = Base("llava", llava, (), "", "")
    model = base.model()
    targets = ["language_model.layers.0.self_attn.q_proj", "vision_tower.encoder.layers.0.self_attn.k_proj"]
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2), targets=[f"model.{t}" for t in targets]))
    fill(p for n, p in model.named_parameters() if ".params." in n)
    lorary.save(model, tmp_path)
    (tmp_path / "lorary.json").unlink()
    old = {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.encoder.": "vision_tower.vision_model.encoder.",
    }

    def renamed(name: str) -> str:
        for new, before in old.items():
            name = name.replace(new, before)
        return name

    pattern = r"language_model\.model\.layers\.\d+\..*q_proj|vision_tower\.vision_model\..*k_proj"
    rename(tmp_path, renamed, target_modules=pattern)
    adapter = lorary.load_adapter(tmp_path, model=base.model())
    assert [a.site.name for a in adapter.sites] == [f"model.{t}" for t in reversed(targets)]
    assert (
        "Transformers has renamed language_model.model.layers.0.self_attn.q_proj to "
        "model.language_model.layers.0.self_attn.q_proj, and 1 more"
    ) in adapter.notes
    want, found = lorary.Adapter.of(model).tensors, adapter.tensors
    assert all(torch.equal(want[site][role], t) for site, roles in found.items() for role, t in roles.items())


def test_an_adapter_of_the_bare_model_fits_the_one_with_a_head(tmp_path: Path) -> None:
    """Keys without `model.`, as of an adapter that was trained on AutoModel."""
    there = peft.get_peft_model(LLAMA.model().model, peft.LoraConfig(r=4, target_modules=["q_proj"])).eval()
    fill(p for n, p in there.named_parameters() if "lora_" in n)
    there.save_pretrained(str(tmp_path))
    adapter = lorary.load_adapter(tmp_path, model=LLAMA.model())
    assert "Transformers has renamed layers.0.self_attn.q_proj to model.layers.0.self_attn.q_proj, and 1 more" in (
        adapter.notes
    )
    with torch.no_grad():
        hidden = there(ids()).last_hidden_state
        close(outputs(lorary.load(LLAMA.model(), tmp_path)), LLAMA.model().lm_head(hidden))


# --- other programs' habits -------------------------------------------------------------------------------------------

HABITS = {
    "Unsloth": {
        "target_modules": (
            r"(?:.*?(?:vision|image|visual|patch_embed|sam_model|language|text).*?(?:self_attn|attention|attn|mlp|"
            r"feed_forward|ffn|dense).*?(?:q_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|"
            r"mlp|feed_forward|ffn|dense)\.(?:(?:q_proj|v_proj)))"
        ),
        "auto_mapping": {
            "base_model_class": "LlamaForCausalLM",
            "parent_library": "transformers.models.llama.modeling_llama",
            "unsloth_fixed": True,
        },
        "base_model_name_or_path": "unsloth/llama-3-8b-bnb-4bit",
    },
    "LLaMA-Factory": {
        "target_modules": r"^(?!.*(?:patchify|vision_tower|multi_modal_projector)).*(?:q_proj|v_proj).*",
    },
    "Axolotl": {"target_modules": ["q_proj", "v_proj"], "loftq_config": {}, "inference_mode": True},
    "torchtune": {"target_modules": ["q_proj", "v_proj"], "peft_type": "LORA"},
}


@pytest.mark.parametrize("tool", HABITS)
def test_what_other_trainers_write_in_pefts_folder(tool: str, tmp_path: Path) -> None:
    theirs = saved_by_peft(LLAMA.model(), tmp_path, target_modules=["q_proj", "v_proj"])
    rename(tmp_path, lambda n: n, **HABITS[tool])
    for other in ("trainer_state.json", "training_args.bin", "all_results.json", "value_head.safetensors"):
        (tmp_path / other).write_bytes(b"{}")
    close(outputs(lorary.load(LLAMA.model(), tmp_path)), theirs)
