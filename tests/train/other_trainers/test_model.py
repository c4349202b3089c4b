"""An attached Transformers model by itself: its files, its class, its copies, and PEFT's words."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import lorary
from lorary import builtin
from lorary.errors import ConfigError, FileError, LoraryError, StateError, TrainingError
from lorary.model.optim.watch import MethodWarning
from tests.train.other_trainers.trainers import METHODS, model, same, values
from tests.train.runs import VOCABULARY, adapted, llama

X = torch.arange(12).view(2, 6) % VOCABULARY


def trained(method: str = "lora", **options: Any) -> Any:
    """An adapted model whose adapter is not zero."""
    made = model(method, **options)
    torch.manual_seed(1)
    for name, tensor in made.named_parameters():
        if tensor.requires_grad:
            assert "params" in name
            nn.init.normal_(tensor, std=0.1)
    return made.eval()


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*METHODS, "vera", "melora"])
def test_save_pretrained_writes_the_adapter(tmp_path: Path, method: str) -> None:
    made = trained(method)
    made.save_pretrained(tmp_path / "adapter")
    assert not {"model.safetensors", "config.json"} & {path.name for path in (tmp_path / "adapter").iterdir()}
    assert same(lorary.load(llama(), tmp_path / "adapter"), made)


def test_what_save_pretrained_writes_is_an_adapter_of_peft_with_the_path_of_its_base(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    made = adapted(targets="attention-qv", model=base).eval()
    torch.manual_seed(1)
    for tensor in made.parameters():
        if tensor.requires_grad:
            nn.init.normal_(tensor, std=0.1)
    made.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]).is_dir()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()  # Transformers reads it with PEFT
    assert torch.allclose(again(X).logits, made(X).logits, atol=1e-5)
    assert not torch.allclose(llama().eval()(X).logits, made(X).logits, atol=1e-2)


def test_a_folder_of_lorarys_own_form_is_never_taken_for_a_model(tmp_path: Path) -> None:
    trained("melora").save_pretrained(tmp_path)
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_merged_model_is_saved_whole_and_an_unmerged_one_is_not(tmp_path: Path) -> None:
    made = trained()
    expected = made(X).logits
    lorary.merge(made, keep=True)
    assert type(made) is LlamaForCausalLM
    made.save_pretrained(tmp_path / "merged")
    assert torch.allclose(
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(X).logits, expected, atol=1e-5
    )
    lorary.unmerge(made)
    made.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "lorary.json").is_file()
    assert torch.equal(made(X).logits, expected)


def test_push_to_hub_uploads_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import HfApi

    uploaded: list[str] = []

    def create_repo(self: Any, repo_id: str, **_: Any) -> Any:
        return huggingface_hub.RepoUrl(f"https://huggingface.co/someone/{repo_id}")

    def create_commit(self: Any, *_: Any, operations: Any, **__: Any) -> None:
        uploaded.extend(operation.path_in_repo for operation in operations)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(HfApi, "create_branch", lambda *_, **__: None)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: _Card())
    trained().save_pretrained(tmp_path / "mine", push_to_hub=True)
    assert {"adapter_config.json", "adapter_model.safetensors", "lorary.json"} <= set(uploaded)
    assert "model.safetensors" not in uploaded


class _Card:
    def save(self, _: Any) -> None:
        """The card asks the Hub for what is there."""


def test_the_state_dict_is_the_models_own() -> None:
    made, other = trained(), model("lora")
    other.load_state_dict(made.state_dict())
    assert same(made, other)


# --- the class ------------------------------------------------------------------------------------------------------


def test_it_is_a_model_of_peft_and_of_its_own_class_until_it_is_detached() -> None:
    made = trained()
    assert isinstance(made, PeftModel)
    assert isinstance(made, LlamaForCausalLM)
    assert made.__class__.__name__ == type(made).__name__ == "LlamaForCausalLM"
    assert made.get_base_model() is made
    assert made.base_model.model is made
    assert made.base_model.layers is made.model.layers
    lorary.detach(made)
    assert type(made) is LlamaForCausalLM
    assert not isinstance(made, PeftModel)
    assert "save_pretrained" not in vars(made.model)


def test_copies_and_pickles_are_adapted_too(tmp_path: Path) -> None:
    made = trained("dora")
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert type(other) is type(made)
        assert torch.equal(other(X).logits, made(X).logits)
        other.save_pretrained(tmp_path / "adapter")
        assert same(lorary.load(llama(), tmp_path / "adapter"), made)
        assert type(lorary.detach(other)) is LlamaForCausalLM


def test_it_compiles_whole_and_its_wrapper_saves_the_adapter(tmp_path: Path) -> None:
    made = trained()
    compiled = torch.compile(made, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(X).logits, made(X).logits, atol=1e-6)
    compiled.save_pretrained(tmp_path)
    assert same(lorary.load(llama(), tmp_path), made)


def test_a_failed_switch_leaves_the_class() -> None:
    made = trained()
    broken = lorary.Adapter.of(trained("dora", r=2))
    object.__setattr__(broken, "tensors", {})
    with pytest.raises(LoraryError):
        lorary.switch(made, broken, force=True)
    assert isinstance(made, PeftModel)
    lorary.switch(made, None)
    assert type(made) is LlamaForCausalLM


def test_the_disabled_adapter_is_the_base() -> None:
    made, base = trained("dora"), llama().eval()
    with made.disable_adapter():
        assert torch.equal(made(X).logits, base(X).logits)
    assert not torch.equal(made(X).logits, base(X).logits)


def test_the_class_of_a_whole_makes_plain_models() -> None:
    made = trained()
    assert type(type(made).from_pretrained(builtin.path())) is LlamaForCausalLM


# --- the base -------------------------------------------------------------------------------------------------------


def test_the_built_in_base_is_never_taken_for_a_hub_id() -> None:
    from lorary.model.loading.from_pretrained import load_model, load_tokenizer
    from lorary.model.loading.source import ModelSection

    section = ModelSection(id="builtin:base")
    for named in (builtin.load_model().config._name_or_path, load_model(section).config._name_or_path):
        assert Path(named).is_dir()
    for named in (builtin.load_tokenizer().name_or_path, load_tokenizer(section).name_or_path):
        assert Path(named).is_dir()
    assert lorary.Fingerprint.of(builtin.load_model()).name == "builtin:base"  # not the folder, which differs


# --- refusals: the sentence of each ---------------------------------------------------------------------------------


def _whole() -> Any:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = llama()

        def forward(self, x: Any) -> Any:
            return self.inside(x).logits

    made = Whole()
    return lorary.attach(made, lorary.plan(made, lorary.method("lora", r=2), targets=["*.q_proj"]))


def _disabled_save(made: Any, folder: Path) -> None:
    with made.disable_adapter():
        made.save_pretrained(folder)


def _optimizer(**settings: Any) -> Any:
    return lorary.optimizer(model("lora"), **({"lr": 1e-3} | settings))


REFUSED: dict[str, tuple[type[LoraryError], str, Any]] = {
    "a part of an adapted whole": (
        StateError,
        "the adapter is attached to the whole Whole, and a part of it cannot be saved alone",
        lambda folder: _whole().inside.save_pretrained(folder),
    ),
    "a disabled adapter": (StateError, "leave the `disabled` block first", lambda f: _disabled_save(model("lora"), f)),
    "a file for a folder": (
        FileError,
        "a part of this path is a file",
        lambda f: ((f / "file").touch(), model("lora").save_pretrained(f / "file")),
    ),
    "no folder": (FileError, "folder: is a NoneType, not a path", lambda _: model("lora").save_pretrained(None)),
    "a second adapter of PEFT": (
        StateError,
        "a second adapter is not supported: one adapter of lorary is attached",
        lambda _: model("lora").add_adapter("other", None),
    ),
    "another adapter's name": (
        StateError,
        "b is not supported: one adapter",
        lambda f: model("lora").load_adapter(f, "b"),
    ),
    "set_adapter": (
        StateError,
        "b is not supported: one adapter",
        lambda _: model("lora").set_adapter(["default", "b"]),
    ),
    "set_adapter of none": (
        StateError,
        "None is not supported: one adapter",
        lambda _: model("lora").set_adapter(None),
    ),
    "disable_adapters": (StateError, "lorary.disabled", lambda _: model("lora").disable_adapters()),
    "delete_adapter": (StateError, "the removal of PEFT's layers", lambda _: model("lora").delete_adapter("default")),
    "an empty folder": (FileError, "holds neither lorary.json nor", lambda f: model("lora").load_adapter(f)),
    "an adapter of another rank": (
        FileError,
        "the checkpoint holds another adapter",
        lambda f: (model("lora", r=2).save_pretrained(f), model("lora").load_adapter(f)),
    ),
    "an adapter of another alpha": (
        FileError,
        "the scale is 8 in the checkpoint, 4 here",
        lambda f: (model("lora").save_pretrained(f), model("lora", alpha=16).load_adapter(f)),
    ),
    "an adapter of another base": (
        FileError,
        "does not fit this model",
        lambda f: (
            adapted("lora", targets="attention-qv", model=llama(rms_norm_eps=1e-5, hidden_size=64)).save_pretrained(f),
            model("lora").load_adapter(f),
        ),
    ),
    "a callback without a model": (
        TrainingError,
        "is a str, not a torch.nn.Module",
        lambda _: lorary.TrainerCallback("m"),
    ),  # type: ignore[arg-type]
    "a callback of a plain model": (StateError, "no adapter is attached", lambda _: lorary.TrainerCallback(llama())),
    "automatic rules without an optimizer": (
        ConfigError,
        "is missing, and automatic rules follow it",
        lambda _: lorary.rules(model("adalora"), 4, automatic=True),
    ),
    "an optimizer of no class": (ConfigError, "cls: dict is not an optimizer class", lambda _: _optimizer(cls=dict)),
    "a name for a class": (ConfigError, "'adamw' is not an optimizer class", lambda _: _optimizer(cls="adamw")),
    "an unknown setting": (ConfigError, "momentum", lambda _: _optimizer(momentum=0.9)),
    "a setting out of range": (ConfigError, "betas|beta parameter", lambda _: _optimizer(betas=(2.0, 0.9))),
    "settings that exclude each other": (ConfigError, "cannot be", lambda _: _optimizer(fused=True, foreach=True)),
    "a rate of zero": (ConfigError, "lr: 0 is not a positive", lambda _: _optimizer(lr=0)),
    "an optimizer of a plain model": (
        StateError,
        "no adapter is attached",
        lambda _: lorary.optimizer(llama(), lr=1e-3),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str) -> None:
    error, text, action = REFUSED[case]
    with pytest.raises(error, match=text):
        action(tmp_path)


def test_an_optimizer_of_another_model_says_so() -> None:
    made, other = model("lora"), model("lora")
    optimizer = lorary.optimizer(other, lr=1e-3)
    made(input_ids=X, labels=X).loss.backward()
    with pytest.warns(MethodWarning, match="that of another model"):
        optimizer.step()


def test_the_warning_class_can_be_an_error(tmp_path: Path) -> None:
    made = model("lora+")
    optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=1e-3)
    made(input_ids=X, labels=X).loss.backward()
    before = values(made)
    with pytest.raises(MethodWarning, match="ratios"):  # warnings are errors in these tests
        optimizer.step()
    assert all(torch.equal(t, before[name]) for name, t in values(made).items())  # told before the step


def test_a_state_dict_of_peft_layers_is_read_as_sentence_transformers_does(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    made, other = (
        adapted(targets="attention-qv", model=AutoModelForCausalLM.from_pretrained(tmp_path / "base")) for _ in range(2)
    )
    torch.manual_seed(1)
    for tensor in made.parameters():
        if tensor.requires_grad:
            nn.init.normal_(tensor, std=0.1)
    made.save_pretrained(tmp_path / "adapter")
    with_peft = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert not same(made, other)
    nn.ModuleList([other]).load_state_dict(nn.ModuleList([with_peft]).state_dict())
    assert same(made, other)
    dora = model("dora")  # whose magnitudes Transformers' reader loses
    with pytest.raises(RuntimeError, match=r"Unexpected key.*base_layer"):
        dora.load_state_dict(with_peft.state_dict())
