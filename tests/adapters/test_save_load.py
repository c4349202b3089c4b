"""Folders written and read back: every form, what is tolerated, what is refused, and what a full disk leaves."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

import lorary
from lorary.adapters import AdapterWarning, export_peft, load_adapter, save_adapter
from lorary.errors import FileError
from lorary.files import tensor_file
from lorary.files.tensor_file import TensorFile
from tests import tiny
from tests.adapters.hostile import PREFIX, Spoiled
from tests.adapters.models import BASES, Base, adapted, fill, outputs, same, vera
from tests.files.test_atomic import largest_file, litter

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
LLAMA, GPT2, BERT, CONV = BASES
A0 = PREFIX + "0.self_attn.q_proj.lora_A.weight"


class Grouped(nn.Module):
    """A grouped and a plain convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        self.first = nn.Conv1d(8, 12, 3, groups=4, padding=1)
        self.second = nn.Conv1d(12, 5, 1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(self.embed(tokens).transpose(1, 2)))).mean(2)


GROUPED = Base("grouped", Grouped, ("first", "second"), "first", "embed")


def bare(*names: str, base: Base = BERT, **words: Any) -> nn.Module:
    """A base whose own parameters were trained."""
    model = base.model()
    lorary.attach(model, lorary.plan(model, lorary.method(*names, **words)))
    fill(p for p in model.parameters() if p.requires_grad)
    return model


SAVED: dict[str, tuple[Callable[[], nn.Module], Base, str]] = {
    "LoRA": (lambda: adapted(LLAMA), LLAMA, "adapter_model.safetensors"),
    "ranks and alphas": (
        lambda: adapted(LLAMA, "rslora", ranks={"down_proj": 2}, alphas={"layers.1.*.q_proj": 0.3}),
        LLAMA,
        "adapter_model.safetensors",
    ),
    "embedding and head": (
        lambda: adapted(LLAMA, targets=["embed_tokens", "lm_head"]),
        LLAMA,
        "adapter_model.safetensors",
    ),
    "convolutions": (lambda: adapted(CONV), CONV, "adapter_model.safetensors"),
    "LoRA and biases": (lambda: adapted(BERT, full=("bias",)), BERT, "adapter_model.safetensors"),
    "LoRA and norms": (lambda: adapted(BERT, full=("*.LayerNorm.weight",)), BERT, "adapter.safetensors"),
    "grouped convolution": (lambda: adapted(GROUPED), GROUPED, "adapter.safetensors"),
    "DoRA": (lambda: adapted(LLAMA, "dora", "rslora", ranks={"down_proj": 2}), LLAMA, "adapter_model.safetensors"),
    "DoRA of convolutions": (lambda: adapted(CONV, "dora"), CONV, "adapter_model.safetensors"),
    "DoRA of a grouped convolution": (lambda: adapted(GROUPED, "dora"), GROUPED, "adapter.safetensors"),
    "PiSSA": (lambda: adapted(LLAMA, "pissa", "dora", ranks={"down_proj": 2}), LLAMA, "adapter.safetensors"),
    "PiSSA of a fused weight": (lambda: adapted(GPT2, "pissa", targets=["c_attn[q,v]"]), GPT2, "adapter.safetensors"),
    "PiSSA of a grouped convolution": (lambda: adapted(GROUPED, "pissa"), GROUPED, "adapter.safetensors"),
    "OLoRA and biases": (lambda: adapted(BERT, "olora", full=("bias",)), BERT, "adapter.safetensors"),
    "VeRA": (lambda: vera(LLAMA), LLAMA, "adapter_model.safetensors"),
    "VeRA of a grouped convolution": (lambda: vera(GROUPED), GROUPED, "adapter.safetensors"),
    "VeRA and biases": (lambda: vera(BERT, full=("bias",)), BERT, "adapter_model.safetensors"),
    "BitFit": (lambda: bare("bitfit"), BERT, "adapter.safetensors"),
    "full fine-tuning": (lambda: bare("full"), BERT, "adapter.safetensors"),
}


@pytest.mark.parametrize(("make", "base", "file"), SAVED.values(), ids=SAVED)
def test_saved_and_loaded_is_the_same(make: Callable[[], nn.Module], base: Base, file: str, tmp_path: Path) -> None:
    model = make()
    adapter = lorary.Adapter.of(model)
    lorary.save_adapter(adapter, tmp_path / "a")
    assert (tmp_path / "a" / file).exists()
    same(lorary.load_adapter(tmp_path / "a"), adapter)
    again = lorary.load(base.model(), tmp_path / "a")
    assert torch.equal(outputs(again), outputs(model))
    lorary.save(model, tmp_path / "b")
    lorary.save(again, tmp_path / "c")
    for path in (tmp_path / "b").iterdir():
        assert path.read_bytes() == (tmp_path / "c" / path.name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_stay_sixteen_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    adapter = lorary.Adapter.of(adapted(LLAMA))
    half = {site: {role: t.to(dtype) for role, t in roles.items()} for site, roles in adapter.tensors.items()}
    halved = lorary.Adapter(adapter.method, adapter.sites, half, base=adapter.base)
    lorary.save_adapter(halved, tmp_path)
    same(lorary.load_adapter(tmp_path), halved)


def test_an_adapter_is_replaced_in_one_step_and_its_card_stays(tmp_path: Path) -> None:
    lorary.save(adapted(GROUPED), tmp_path / "a")
    (tmp_path / "a" / "README.md").write_text("card")
    lorary.save(adapted(LLAMA), tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "lorary.json",
    ]
    lorary.load_adapter(tmp_path / "a")


# --- tolerance ------------------------------------------------------------------------------------------------

TOLERATED: list[tuple[str, Callable[[Spoiled], Any], str]] = [
    (
        "one tensor missing",
        lambda s: s.drop("0.self_attn.q_proj.lora_B.weight"),
        "model.layers.0.self_attn.q_proj.lora_B.weight: is missing",
    ),
    ("an extra tensor", lambda s: s.add("base_model.model.extra", 2), "extra: is not a tensor of this adapter"),
    (
        "NaN",
        lambda s: s.value(float("nan")),
        "model.layers.0.self_attn.q_proj.lora_A.weight: 1 of 64 values are NaN or infinite, the first at [1, 2]",
    ),
    (
        "an absurd value",
        lambda s: s.value(1e7),
        "model.layers.0.self_attn.q_proj.lora_A.weight: its largest value is 1e+07; a trained adapter's stay far "
        "below 1,000,000",
    ),
    (
        "an unknown field",
        lambda s: s.say(novelty=3),
        "adapter_config.json: novelty: is not a field that lorary knows",
    ),
]


@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")  # PEFT's own words about the same files
@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments:UserWarning")
@pytest.mark.parametrize(("spoil", "text"), [c[1:] for c in TOLERATED], ids=[c[0] for c in TOLERATED])
def test_what_peft_tolerates_can_be_tolerated(spoil: Callable[[Spoiled], Any], text: str, tmp_path: Path) -> None:
    spoiled = Spoiled(tmp_path / "adapter")
    spoil(spoiled)
    with pytest.raises(FileError):
        lorary.load(LLAMA.model(), spoiled.folder)
    model = LLAMA.model()
    with pytest.warns(AdapterWarning) as caught:
        lorary.load(model, spoiled.folder, strict=False)
    assert [str(w.message) for w in caught] == [f"the adapter {str(spoiled.folder)!r}:\n  - {text}"]
    theirs = outputs(PeftModel.from_pretrained(LLAMA.model(), str(spoiled.folder)).eval())
    torch.testing.assert_close(outputs(model), theirs, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_a_base_weight_is_never_overwritten(tmp_path: Path) -> None:
    """PEFT overwrites it without a word."""
    spoiled = Spoiled(tmp_path / "adapter")
    good = outputs(lorary.load(LLAMA.model(), spoiled.folder))
    spoiled.add("base_model.model.model.embed_tokens.weight", 30, 16)
    model = LLAMA.model()
    with pytest.warns(AdapterWarning, match=r"embed_tokens\.weight: would overwrite a weight of the base"):
        lorary.load(model, spoiled.folder, strict=False)
    assert torch.equal(outputs(model), good)
    assert not torch.allclose(outputs(PeftModel.from_pretrained(LLAMA.model(), str(spoiled.folder)).eval()), good)


def test_several_things_tolerated_make_one_warning(tmp_path: Path) -> None:
    spoiled = Spoiled(tmp_path / "adapter")
    spoiled.drop("0.self_attn.q_proj.lora_B.weight", "1.self_attn.v_proj.lora_A.weight")
    spoiled.add("base_model.model.extra", 2)
    with pytest.warns(AdapterWarning) as caught:
        adapter = load_adapter(spoiled.folder, model=LLAMA.model(), strict=False)
    assert len(caught) == 1
    assert str(caught[0].message).count("\n  - ") == 3
    assert len(adapter.notes) == 3
    assert not adapter.tensors["model.layers.0.self_attn.q_proj"]["B"].any()


def test_an_adapter_that_does_nothing_is_told(tmp_path: Path) -> None:
    model = LLAMA.model()
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=4), targets=["q_proj", "embed_tokens"]))
    lorary.save(model, tmp_path)
    with pytest.warns(AdapterWarning) as caught:
        adapter = lorary.load_adapter(tmp_path)
    expected = "every update is zero: this adapter changes nothing"
    assert str(caught[0].message) == f"the adapter {str(tmp_path)!r}:\n  - {expected}"
    assert adapter.notes == (expected,)


def test_several_dtypes_are_noted(tmp_path: Path) -> None:
    spoiled = Spoiled(tmp_path / "adapter")
    spoiled.tensors(lambda t: t.update({A0: t[A0].to(torch.bfloat16)}))
    assert lorary.load_adapter(spoiled.folder).notes == ("its tensors are of several dtypes: BF16, F32",)


# --- reading without a model, and with another ----------------------------------------------------------------


def test_without_a_model_the_shapes_tell_the_kinds(tmp_path: Path) -> None:
    export_peft(lorary.Adapter.of(adapted(CONV, targets=["embed", "conv1", "conv2", "head.1"])), tmp_path)
    kinds = {p.site.name: (p.site.kind, p.site.kernel_size) for p in lorary.load_adapter(tmp_path).sites}
    assert kinds == {
        "embed": ("embedding", ()),
        "conv1": ("conv1d", (3,)),
        "conv2": ("conv2d", (3, 2)),
        "head.1": ("linear", ()),
    }


def test_without_a_model_a_factor_alone_is_refused(tmp_path: Path) -> None:
    spoiled = Spoiled(tmp_path / "adapter")
    spoiled.drop("0.self_attn.q_proj.lora_B.weight")
    with pytest.raises(FileError) as caught:
        lorary.load_adapter(spoiled.folder)
    assert str(caught.value) == (
        f"cannot load the adapter {str(spoiled.folder)!r}\n"
        "  - model.layers.0.self_attn.q_proj.lora_B.weight: is missing, and its partner is useless alone"
    )


def test_an_adapter_of_another_model(tmp_path: Path) -> None:
    spoiled = Spoiled(tmp_path / "adapter")
    with pytest.raises(FileError) as caught:
        lorary.load(BERT.model(), spoiled.folder)
    lines = str(caught.value).splitlines()
    assert lines[1:3] == [
        "  - adapter_config.json: target_modules: names no layer of this model",
        "      hint: its layers: decoder, dense, key, position_embeddings, query, token_type_embeddings, value, "
        "word_embeddings",
    ]
    assert "  - model.layers.0.self_attn.q_proj.lora_A.weight: adapts a module that the model does not have" in lines
    assert len(lines) == 3 + 8


def test_a_loaded_model_keeps_what_it_has_when_another_folder_is_bad(tmp_path: Path) -> None:
    model = adapted(LLAMA)
    before = outputs(model)
    spoiled = Spoiled(tmp_path / "adapter", native=True)
    spoiled.value(float("nan"))
    with pytest.raises(FileError):
        lorary.switch(model, lorary.load_adapter(spoiled.folder))
    assert torch.equal(outputs(model), before)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_pefts_copy_of_an_adapted_table_must_be_the_bases(tmp_path: Path) -> None:
    model = get_peft_model(LLAMA.model(), LoraConfig(r=2, target_modules=["embed_tokens"]))
    fill(p for n, p in model.named_parameters() if "lora_" in n)
    model.save_pretrained(str(tmp_path))
    assert "base_model.model.model.embed_tokens.base_layer.weight" in load_file(tmp_path / "adapter_model.safetensors")
    name = "model.embed_tokens.base_layer.weight"
    assert lorary.load_adapter(tmp_path).notes == (f"{name} is a copy of the base's own table; it was left out",)
    other = LLAMA.model()
    with torch.no_grad():
        other.get_input_embeddings().weight[3, 3] += 1
    with pytest.raises(FileError) as caught:
        lorary.load(other, tmp_path)
    assert str(caught.value) == (
        f"cannot load the adapter {str(tmp_path)!r}\n"
        f"  - {name}: is a copy of the base's own table, and this model's is another\n"
        "      hint: load the base that it was trained on"
    )


def test_a_kept_module_that_is_tied_is_refused(tmp_path: Path) -> None:
    base = BASES[1]
    model = get_peft_model(
        base.model(), LoraConfig(r=2, target_modules=["c_fc"], modules_to_save=["wte"], fan_in_fan_out=True)
    )
    model.save_pretrained(str(tmp_path))
    with pytest.raises(FileError) as caught:
        lorary.load(base.model(), tmp_path)
    assert str(caught.value) == (
        f"cannot load the adapter {str(tmp_path)!r}\n"
        "  - transformer.wte.weight: is tied to lm_head.weight in this model, and PEFT trained a separate copy\n"
        "      hint: untie the base's weights before loading: lorary.untie_embeddings(model)"
    )


# --- folders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("adaptor", "there is no such folder\n      hint: did you mean `adapter`?"),
        (
            "adapter/lorary.json",
            "it is a file, and an adapter is a folder\n"
            "      hint: name its folder, or a file that ends in .safetensors or .gguf",
        ),
        ("empty", "it holds neither lorary.json nor adapter_config.json"),
        (
            ".",
            "it holds neither lorary.json nor adapter_config.json\n      hint: an adapter is in its folder 'adapter'",
        ),
        (
            "model",
            "it holds neither lorary.json nor adapter_config.json\n"
            "      hint: this looks like a whole model: load it as the base",
        ),
        (
            "pickled",
            "adapter_model.bin: is a pickle, which can run code when it is read; it was not opened\n"
            "      hint: if you trust its author, load it with PEFT and save it again: PEFT writes safetensors",
        ),
    ],
)
def test_folders_that_hold_no_adapter(path: str, message: str, tmp_path: Path) -> None:
    shutil.copytree(Spoiled(tmp_path / "adapter", native=True).folder, tmp_path / "other" / "adapter")
    for name in ("empty", "model", "pickled"):
        (tmp_path / name).mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "pickled" / "adapter_model.bin").write_bytes(b"\x80\x04")
    folder = tmp_path / "other" if path == "." else tmp_path / path
    with pytest.raises(FileError) as caught:
        lorary.load_adapter(folder)
    assert str(caught.value) == f"cannot load the adapter {str(folder)!r}\n  - {message}"


def test_a_loop_of_links_and_a_name_with_a_nul(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / "loop", str(tmp_path) + "/a\0b"):
        with pytest.raises(FileError, match="the path cannot be followed"):
            lorary.load_adapter(path)


def test_the_hub_caches_links_are_followed(tmp_path: Path) -> None:
    good = Spoiled(tmp_path / "good", native=True).folder
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(good.iterdir())):
        shutil.copy(file, blobs / str(i))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(i))
    same(lorary.load_adapter(snapshot), lorary.load_adapter(good))


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    spoiled = Spoiled(tmp_path / "adapter")
    with TensorFile(spoiled.folder, "adapter_model.safetensors") as file:
        names = list(file.header.tensors)
        os.truncate(spoiled.weights, spoiled.weights.stat().st_size - 200)
        with pytest.raises(FileError) as caught:
            file.read(names)
    assert [str(p) for p in caught.value.problems] == [
        "adapter_model.safetensors: the file became shorter while it was being read"
    ]


def test_a_file_that_is_replaced_while_it_is_read_is_read_to_its_end(tmp_path: Path) -> None:
    spoiled = Spoiled(tmp_path / "adapter")
    expected = load_file(spoiled.weights)
    with TensorFile(spoiled.folder, "adapter_model.safetensors") as file:
        spoiled.weights.unlink()
        spoiled.weights.write_bytes(b"other")
        read = file.read(expected)
    assert all(torch.equal(t, expected[name]) for name, t in read.items())


def test_more_than_the_memory_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "memory", lambda: 1000)
    spoiled = Spoiled(tmp_path / "adapter")
    with pytest.raises(FileError) as caught:
        lorary.load_adapter(spoiled.folder)
    assert str(caught.value) == (
        f"cannot load the adapter {str(spoiled.folder)!r}\n"
        "  - adapter_model.safetensors: its tensors need 1,792 bytes, this machine has 1,000 of memory"
    )


# --- writing --------------------------------------------------------------------------------------------------


def with_value(value: float, dtype: torch.dtype = torch.float32) -> lorary.Adapter:
    adapter = lorary.Adapter.of(adapted(LLAMA, targets=["q_proj"]))
    tensors = {site: {role: t.to(dtype) for role, t in roles.items()} for site, roles in adapter.tensors.items()}
    tensors["model.layers.1.self_attn.q_proj"]["A"][0, 1] = value
    return lorary.Adapter(adapter.method, adapter.sites, tensors, base=adapter.base)


def test_what_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(FileError) as caught:
        lorary.save_adapter(with_value(float("inf")), tmp_path / "a")
    assert str(caught.value) == (
        f"cannot save an adapter to {str(tmp_path / 'a')!r}\n"
        "  - model.layers.1.self_attn.q_proj|A: 1 of 64 values are NaN or infinite, the first at [0, 1]"
    )
    with pytest.raises(FileError) as caught:
        export_peft(with_value(1, torch.float64), tmp_path / "a")
    assert str(caught.value).splitlines()[:2] == [
        f"cannot export an adapter to {str(tmp_path / 'a')!r} for PEFT",
        "  - base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight: is float64; adapters are saved as "
        "float32, float16, bfloat16",
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_not_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(FileError) as caught:
        lorary.save_adapter(nn.Linear(2, 2), tmp_path / "a")  # type: ignore[arg-type]
    assert str(caught.value) == (
        f"cannot save an adapter to {str(tmp_path / 'a')!r}\n"
        "  - adapter: is a Linear, not an Adapter\n      hint: lorary.save(model, path) saves a model's adapter"
    )


def test_a_folder_of_other_things_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "run" / "step-1").mkdir(parents=True)
    with pytest.raises(FileError) as caught:
        lorary.save(adapted(LLAMA), tmp_path / "run")
    assert str(caught.value) == (
        f"cannot write {str(tmp_path / 'run')!r}\n"
        "  - the folder also holds 'step-1', not a plain file\n"
        "      hint: save into a folder of its own"
    )
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["step-1"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: adapted(GROUPED),
            "  - first: is a convolution with 4 groups: PEFT's LoRA of it does not equal a change of its weight",
        ),
        (
            lambda: bare("bitfit"),
            "  - sites: it trains base parameters only, and PEFT's adapters adapt at least one layer",
        ),
        (
            lambda: adapted(BERT, full=("*.0.output.LayerNorm.weight",)),
            "  - bert.encoder.layer.0.output.LayerNorm.weight: is trained in full, and only the model knows whether "
            "its whole module is\n      hint: give the model too: model=, or --base on the command line",
        ),
    ],
    ids=["groups", "BitFit", "full"],
)
def test_what_peft_has_no_words_for(make: Callable[[], nn.Module], message: str, tmp_path: Path) -> None:
    with pytest.raises(FileError) as caught:
        export_peft(lorary.Adapter.of(make()), tmp_path / "a")
    assert str(caught.value) == f"cannot export an adapter to {str(tmp_path / 'a')!r} for PEFT\n{message}"
    assert list(tmp_path.iterdir()) == []


def test_modules_that_peft_could_not_keep(tmp_path: Path) -> None:
    adapter = lorary.Adapter.of(
        adapted(BERT, full=("*.0.output.LayerNorm.weight", "bert.embeddings.word_embeddings.weight"))
    )
    with pytest.raises(FileError) as caught:
        export_peft(adapter, tmp_path / "a", model=BERT.model())
    assert str(caught.value) == (
        f"cannot export an adapter to {str(tmp_path / 'a')!r} for PEFT\n"
        "  - bert.encoder.layer.0.output.LayerNorm: PEFT saves whole modules, and "
        "bert.encoder.layer.0.output.LayerNorm.bias is not trained\n"
        "  - cls.predictions.decoder: PEFT saves whole modules, and cls.predictions.decoder.bias is not trained\n"
        "  - cls.predictions.decoder: PEFT would untie it from cls.predictions.bias"
    )


def test_an_export_does_not_bury_a_native_adapter(tmp_path: Path) -> None:
    lorary.save(adapted(GROUPED), tmp_path / "a")
    with pytest.raises(FileError) as caught:
        export_peft(lorary.Adapter.of(adapted(LLAMA)), tmp_path / "a")
    assert str(caught.value) == (
        f"cannot export an adapter to {str(tmp_path / 'a')!r} for PEFT\n"
        "  - it holds lorary.json: the adapter there would be lost\n"
        "      hint: export to another folder"
    )
    lorary.load_adapter(tmp_path / "a")


def test_a_full_disk_leaves_the_old_adapter(tmp_path: Path) -> None:
    lorary.save(adapted(LLAMA, targets=["q_proj"]), tmp_path / "a")
    old = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    large = adapted(LLAMA, r=16)
    with largest_file(8192), pytest.raises(FileError) as caught:
        lorary.save(large, tmp_path / "a")
    text = re.sub(r"[\d,]+ bytes are free", "N bytes are free", str(caught.value))
    assert text == (
        f"cannot write '{tmp_path}/a'; what was there before is unchanged\n"
        "  - file too large: N bytes are free, 12,288 are needed\n"
        "      hint: free some space (or raise the quota or file-size limit) or choose another folder"
    )
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == old
    assert litter(tmp_path) == []


SAVER = """
import sys, torch, lorary
torch.set_num_threads(1)
net = torch.nn.Sequential(torch.nn.Linear(4, 4))
lorary.attach(net, lorary.plan(net, lorary.method("lora", r=2), targets=["0"]))
with torch.no_grad():
    net[0].params["B"].fill_(2)
lorary.save(net, sys.argv[1])
"""


@pytest.mark.parametrize("point", ["directory.written", "directory.after-rename"])
def test_a_killed_save_leaves_the_old_adapter_or_the_new(point: str, tmp_path: Path) -> None:
    lorary.save(adapted(LLAMA), tmp_path / "a")
    command = [sys.executable, "-c", SAVER, str(tmp_path / "a")]
    environment = dict(os.environ) | {"LORARY_FAULT": f"{point}:kill"}
    assert subprocess.run(command, env=environment, check=False).returncode == -9
    sites = [p.site.name for p in lorary.load_adapter(tmp_path / "a").sites]
    assert (sites == ["0"]) == (point == "directory.after-rename")
    lorary.save(adapted(LLAMA), tmp_path / "a")
    words = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert words["peft_type"] == "LORA"


def test_with_the_model_targets_are_brief(tmp_path: Path) -> None:
    adapter = lorary.Adapter.of(adapted(LLAMA))
    save_adapter(adapter, tmp_path / "a", model=LLAMA.model())
    save_adapter(adapter, tmp_path / "b")
    brief, whole = (
        json.loads((tmp_path / name / "adapter_config.json").read_text())["target_modules"] for name in "ab"
    )
    assert brief == ["down_proj", "q_proj", "v_proj"]
    assert whole == sorted(p.site.name for p in adapter.sites)


# --- a head that is drawn at every load -------------------------------------------------------------------------------


def classifier(seed: int, base: int = 0) -> Any:
    """A language model with a new head, as `AutoModelForSequenceClassification` makes one: only the head differs."""
    model = tiny.seeded("LlamaForSequenceClassification", seed=base)
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.score.weight)
    return model.eval()


def test_a_classifier_whose_head_is_drawn_again_loads(tmp_path: Path) -> None:
    model, ids = classifier(1), torch.arange(6)[None]
    tiny.trained(model, lorary.method("lora", r=2))
    assert "score.weight" in lorary.Adapter.of(model).full
    lorary.save(model, tmp_path / "adapter")
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        again = lorary.load(classifier(2), tmp_path / "adapter").eval()
        assert torch.equal(again(input_ids=ids).logits, expected)
        switched = lorary.switch(classifier(3), lorary.load_adapter(tmp_path / "adapter"))
        assert torch.equal(switched(input_ids=ids).logits, expected)
        lorary.save(again, tmp_path / "again")
        assert torch.equal(lorary.load(classifier(4), tmp_path / "again")(input_ids=ids).logits, expected)
    with pytest.raises(FileError, match="base: other weights"):
        lorary.load(classifier(1, base=7), tmp_path / "adapter")


# --- both ends alike --------------------------------------------------------------------------------------------------


def test_tolerating_files_is_not_accepting_another_base(tmp_path: Path) -> None:
    model = tiny.seeded("LlamaForCausalLM")
    lorary.save(tiny.shaken(lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2)))), tmp_path)
    other = tiny.seeded("LlamaForCausalLM", rms_norm_eps=0.1)
    with pytest.raises(FileError) as caught:
        lorary.load(other, tmp_path, strict=False)
    assert [str(p) for p in caught.value.problems] == [
        "base: another configuration, `rms_norm_eps`: 1e-06 when it was trained, 0.1 here\n"
        "      hint: load the base that it was trained on, or pass force=True"
    ]
    lorary.load(other, tmp_path, force=True)


@pytest.mark.parametrize("value", [2e6, float("nan")])
def test_a_value_that_would_not_be_read_is_not_written(tmp_path: Path, value: float) -> None:
    model = tiny.seeded("LlamaForCausalLM")
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2), ["q_proj"]))
    lorary.save(model, tmp_path / "a")
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.params["B"][0, 0] = value
    with pytest.raises(FileError) as refused:
        lorary.save(model, tmp_path / "a")
    what = "its largest value is 2e+06; a trained adapter's stay far below 1,000,000"
    what = what if value == 2e6 else "1 of 32 values are NaN or infinite, the first at [0, 0]"
    assert [str(p) for p in refused.value.problems] == [f"model.layers.0.self_attn.q_proj|B: {what}"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before


def test_a_base_parameter_may_be_as_large_as_it_is(tmp_path: Path) -> None:
    model = tiny.seeded("LlamaForCausalLM")
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2).replace(full=("norms",)), ["q_proj"]))
    tiny.shaken(model)
    with torch.no_grad():
        model.model.norm.weight.fill_(2e6)
    lorary.save(model, tmp_path)
    assert float(load_adapter(tmp_path).full["model.norm.weight"].max()) == 2e6


def test_files_beyond_a_readers_limits_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The very reader looks at them before they are put in place."""
    model = tiny.seeded("LlamaForCausalLM")
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2), ["q_proj"]))
    for name, limit, what in (
        ("lorary.files.tensor_file.MOST_TENSORS", 3, "adapter_model.safetensors: 4 tensors, more than the 3 that"),
        ("lorary.adapters.native.MOST_JSON", 99, "lorary.json: is "),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(name, limit)
            with pytest.raises(FileError, match=f"cannot save an adapter to .*\n  - {what}"):
                lorary.save(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
