"""(IA)³ between PEFT and here: vectors at outputs and inputs, and the modules whose inputs are scaled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorary
from lorary.adapters import export_peft
from lorary.adapters.peft.types import PEFT_TYPES
from lorary.errors import FileError
from tests.adapters.models import BASES, Base, close, fill, outputs, same

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
]
LLAMA, GPT2, BERT, CONV = BASES
NAMES: dict[str, tuple[list[str], list[str]]] = {
    "Llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "GPT-2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    # as PEFT's defaults: attention's output too, whose inputs are scaled
    "BERT": (["key", "value", "output.dense"], ["output.dense"]),
    "ConvNet": (["conv2", "head.1"], []),
}


def saved_by_peft(base: Base, folder: Path, **words: Any) -> Tensor:
    """Saves an (IA)³ with PEFT; returns PEFT's outputs."""
    targets, inputs = NAMES[base.name]
    words = {"target_modules": targets, "feedforward_modules": inputs, "fan_in_fan_out": base.transposed} | words
    model = get_peft_model(base.model(), IA3Config(**words)).eval()
    fill(p for n, p in model.named_parameters() if "ia3_" in n)
    model.save_pretrained(str(folder))
    return outputs(model)


def by_peft(base: Base, folder: Path) -> Tensor:
    return outputs(PeftModel.from_pretrained(base.model(), str(folder)).eval())


def ia3(base: Base, targets: Any = None, **options: Any) -> Any:
    """The base with a filled (IA)³ on it."""
    model = base.model()
    lorary.attach(model, lorary.plan(model, lorary.method("ia3", **options), targets))
    fill(p for n, p in model.named_parameters() if ".params." in n)
    return model.eval()


@pytest.mark.parametrize("base", BASES, ids=str)
def test_saved_by_peft_loads_here(base: Base, tmp_path: Path) -> None:
    theirs = saved_by_peft(base, tmp_path)
    model = lorary.load(base.model(), tmp_path)
    close(outputs(model), theirs)
    assert (theirs - outputs(base.model())).abs().max() > 1e-3, "the adapter must change something"
    assert lorary.attached(model).method == lorary.method("ia3", feed_forward=NAMES[base.name][1])
    lorary.save(model, tmp_path / "again")
    close(by_peft(base, tmp_path / "again"), theirs)
    assert load_file(tmp_path / "again" / "adapter_model.safetensors").keys() == (
        load_file(tmp_path / "adapter_model.safetensors").keys()
    )


MADE: dict[str, Any] = {
    "Llama": (LLAMA, lambda: ia3(LLAMA)),
    "GPT-2, keys and values": (GPT2, lambda: ia3(GPT2)),
    "GPT-2, whole": (GPT2, lambda: ia3(GPT2, ["c_attn", "mlp.c_proj"])),
    "BERT": (BERT, lambda: ia3(BERT)),
    "a convolution": (CONV, lambda: ia3(CONV, ["conv2"])),
    "all linear layers": (LLAMA, lambda: ia3(LLAMA, "all-linear")),
    "inputs alone": (LLAMA, lambda: ia3(LLAMA, ["o_proj"], feed_forward=("o_proj",))),
    "some inputs of a name": (LLAMA, lambda: ia3(LLAMA, ["k_proj"], feed_forward=("layers.0.self_attn.k_proj",))),
}


@pytest.mark.parametrize(("base", "make"), MADE.values(), ids=MADE)
def test_saved_here_loads_in_peft(base: Base, make: Any, tmp_path: Path) -> None:
    model = make()
    y = outputs(model)
    lorary.save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "IA3"
    close(by_peft(base, tmp_path), y)
    same(lorary.load_adapter(tmp_path), lorary.Adapter.of(model))
    assert torch.equal(outputs(lorary.load(base.model(), tmp_path)), y)
    (tmp_path / "lorary.json").unlink()
    close(outputs(lorary.load(base.model(), tmp_path)), y)


def test_without_the_base_the_same_files(tmp_path: Path) -> None:
    model = ia3(LLAMA)
    lorary.save_adapter(lorary.Adapter.of(model), tmp_path)
    close(by_peft(LLAMA, tmp_path), outputs(model))


def test_exported_as_what_it_is(tmp_path: Path) -> None:
    """There is no LoRA with its function, and PEFT has (IA)³ itself."""
    model = ia3(GPT2)
    export_peft(lorary.Adapter.of(model), tmp_path / "out", model=GPT2.model())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    close(by_peft(GPT2, tmp_path / "out"), outputs(model))
    verdicts = {v.reader: v for v in lorary.check(tmp_path / "out", "peft", "transformers", "vllm", "sglang")}
    assert {name: str(v.outcome) for name, v in verdicts.items()} == {
        "peft": "accepted",
        "transformers": "accepted",
        "vllm": "rejected",
        "sglang": "rejected",
    }
    assert [(p.what, p.fix) for p in verdicts["vllm"].reasons] == [
        ("vLLM refuses the PEFT type IA3", "lorary export ADAPTER OUT --to merged")
    ]


def test_trained_biases_are_kept_in_our_own_form(tmp_path: Path) -> None:
    model = BERT.model()
    lorary.attach(model, lorary.plan(model, lorary.method("ia3", "bitfit")))
    fill(p for n, p in model.named_parameters() if p.requires_grad)
    lorary.save(model.eval(), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.safetensors", "lorary.json"]
    assert torch.equal(outputs(lorary.load(BERT.model(), tmp_path)), outputs(model))


@pytest.mark.parametrize(
    "words",
    [
        {"feedforward_modules": r".*\.(down|o)_proj", "target_modules": ["k_proj", "o_proj", "down_proj"]},
        {"feedforward_modules": ["n_proj"], "target_modules": r".*\.(down_proj|k_proj)"},  # the end of `down_proj`
        {"feedforward_modules": [], "target_modules": ["down_proj", "k_proj"]},
        {"feedforward_modules": [], "target_modules": "all-linear"},
        {"feedforward_modules": ["q_proj"], "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "model.norm"]},
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "exclude_modules": ["model.layers.1.self_attn.k_proj"]},
    ],
    ids=lambda words: str(list(words.values())),
)
def test_ways_to_name_modules_in_peft(words: dict[str, Any], tmp_path: Path) -> None:
    theirs = saved_by_peft(LLAMA, tmp_path, **words)
    model = lorary.load(LLAMA.model(), tmp_path)
    close(outputs(model), theirs)
    lorary.save(model, tmp_path / "again")
    assert torch.equal(outputs(lorary.load(LLAMA.model(), tmp_path / "again")), outputs(model))
    close(by_peft(LLAMA, tmp_path / "again"), theirs)


# --- refused ----------------------------------------------------------------------------------------------------------


def rewrite(folder: Path, what: Any) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    what(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def say(folder: Path, **words: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | words))


K, DOWN = (f"base_model.model.model.layers.0.{name}.ia3_l" for name in ("self_attn.k_proj", "mlp.down_proj"))
AT_K, AT_DOWN = (name.removeprefix("base_model.model.") for name in (K, DOWN))
BAD: dict[str, tuple[Any, str]] = {
    "a vector missing": (lambda f: rewrite(f, lambda t: t.pop(K)), f"{AT_K}: is missing"),
    "a vector of NaN": (
        lambda f: rewrite(f, lambda t: t[K].fill_(float("nan"))),
        f"{AT_K}: 8 of 8 values are NaN or infinite, the first at [0, 0]",
    ),
    "a vector that is too large": (
        lambda f: rewrite(f, lambda t: t[K].fill_(1e9)),
        f"{AT_K}: its largest value is 1e+09; a trained adapter's stay far below 1,000,000",
    ),
    "a vector of the inputs at the outputs": (
        lambda f: rewrite(f, lambda t: t.update({DOWN: torch.ones(16, 1)})),
        f"{AT_DOWN}: has the shape [16, 1], expected [1, 24]",
    ),
    "a transposed vector": (
        lambda f: rewrite(f, lambda t: t.update({K: torch.ones(1, 8)})),
        f"{AT_K}: has the shape [1, 8], expected [8, 1]\n      hint: it is transposed",
    ),
    "no word of the inputs": (
        lambda f: say(f, feedforward_modules=None),
        "adapter_config.json: feedforward_modules: is null: nothing says at which layers the inputs are scaled",
    ),
    "a number for names": (
        lambda f: say(f, feedforward_modules=3),
        "adapter_config.json: feedforward_modules: is 3, not a list of names",
    ),
    "a pattern that is none": (
        lambda f: say(f, feedforward_modules="(down_proj"),
        "adapter_config.json: feedforward_modules: ",
    ),
    "a rank": (
        lambda f: say(f, r=8),
        "adapter_config.json: r: is not a field that lorary knows",
    ),
    "an embedding": (
        lambda f: say(f, target_modules=["k_proj", "v_proj", "down_proj", "embed_tokens"]),
        "model.embed_tokens: is of kind embedding, which PEFT's (IA)³ never adapts",
    ),
    "LoRA's factors": (
        lambda f: rewrite(f, lambda t: t.update({K.replace("ia3_l", "lora_A.weight"): torch.ones(2, 16)})),
        "model.layers.0.self_attn.k_proj.lora_A.weight: belongs to LoRA, which the configuration does not name",
    ),
    "a module that the model lacks": (
        lambda f: rewrite(f, lambda t: t.update({DOWN.replace("s.0.", "s.7."): t[DOWN].clone()})),
        "model.layers.7.mlp.down_proj.ia3_l: adapts a module that the model does not have",
    ),
    "a file that ends too early": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:-8]),
        "adapter_model.safetensors: ",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD)
def test_a_bad_ia3_of_peft_is_refused(spoil: Any, message: str, tmp_path: Path) -> None:
    saved_by_peft(LLAMA, tmp_path)
    spoil(tmp_path)
    model = LLAMA.model()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(FileError) as caught:
        lorary.load(model, tmp_path)
    assert str(caught.value).startswith(f"cannot load the adapter {str(tmp_path)!r}\n")
    assert f"  - {message}" in str(caught.value)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_without_a_model_one_of_peft_is_refused(tmp_path: Path) -> None:
    saved_by_peft(LLAMA, tmp_path)
    with pytest.raises(FileError, match=r"the shapes of the layers that PEFT's .* adapts are known only to the model"):
        lorary.load_adapter(tmp_path)


def test_factors_beside_the_adapted_projections_are_refused(tmp_path: Path) -> None:
    """PEFT could train those of the queries, which the record does not name: they are not dropped in silence."""
    lorary.save(ia3(GPT2), tmp_path)
    rewrite(tmp_path, lambda t: t["base_model.model.transformer.h.0.attn.c_attn.ia3_l"][0].fill_(2.0))
    with pytest.raises(FileError, match="is not the file that was saved"):
        lorary.load_adapter(tmp_path)
    (site,) = [a for a in lorary.Adapter.of(ia3(GPT2)).sites if a.site.name == "transformer.h.0.attn.c_attn"]
    with pytest.raises(FileError) as refusal:
        PEFT_TYPES["IA3"].decode(site, {f"{site.site.name}.ia3_l": torch.full((48, 1), 2.0)})
    assert [p.what for p in refusal.value.problems] == ["scales rows outside the projections that are adapted"]
    (tmp_path / "lorary.json").unlink()
    model = lorary.load(GPT2.model(), tmp_path)
    assert lorary.Adapter.of(model).sites[0].shapes == {"l": (48,)}
