"""An adapter from two checkpoints: the tuned model again, the tail of the spectrum as its error, and clear refusals."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorary
from lorary.adapters.content_hash import content_hash
from lorary.errors import FileError, LoraryError, MethodError, PlanError
from lorary.model.loading.weight_files import WeightFiles
from tests.tiny import ids, seeded

IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def outputs(model: Any) -> Tensor:
    if "Image" in type(model).__name__:
        size = model.config.image_size
        inputs: dict[str, Tensor] = {"pixel_values": IMAGE[..., :size, :size]}
    else:
        inputs = {"input_ids": ids()}
        inputs |= {"decoder_input_ids": ids()} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        y: Tensor = model(**inputs).logits
    return y


def loaded(folder: Path, name: str, **options: Any) -> Any:
    return getattr(transformers, name).from_pretrained(folder, **options).eval()


def merged(name: str, folder: Path, *, targets: Any = "all-linear", **changes: Any) -> Tensor:
    """Saves `base` and, with a LoRA of rank 8 merged into it, `tuned`; the outputs of the adapted model."""
    model = seeded(name, **changes)
    model.save_pretrained(folder / "base", max_shard_size="10KB")
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=8), targets))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    y = outputs(model)
    lorary.merge(model)
    model.save_pretrained(folder / "tuned")
    return y


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "BertForMaskedLM"])
def test_a_merged_lora_is_the_same_model_again(name: str, tmp_path: Path) -> None:
    y = merged(name, tmp_path)
    found = lorary.extract(tmp_path / "base", tmp_path / "tuned", rank=8)
    assert {s.rank for s in found.sites} == {8}
    assert (found.adapter.full, found.left_out) == ({}, {})
    assert found.error < 1e-6
    lorary.save_adapter(found.adapter, tmp_path / "adapter")
    base = loaded(tmp_path / "base", name)
    assert float((outputs(base) - y).abs().max()) > 0.05
    model = lorary.load(base, tmp_path / "adapter")  # of this base: the fingerprint says so
    assert float((outputs(model) - y).abs().max()) < 1e-5
    lorary.detach(model)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    assert float((outputs(theirs.get_base_model()) - y).abs().max()) < 1e-5


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "float32"), ("float16", "bfloat16")], ids=str)
def test_the_errors_are_the_tail_of_the_spectrum(dtypes: tuple[str, str], tmp_path: Path) -> None:
    merged("GPT2LMHeadModel", tmp_path)
    for folder, dtype in zip(("base", "tuned"), dtypes, strict=True):
        model = loaded(tmp_path / folder, "GPT2LMHeadModel", dtype=getattr(torch, dtype))
        shutil.rmtree(tmp_path / folder)
        model.save_pretrained(tmp_path / folder)
    W, tuned = (loaded(tmp_path / folder, "GPT2LMHeadModel", dtype=torch.float32) for folder in ("base", "tuned"))
    found = lorary.extract(tmp_path / "base", tmp_path / "tuned", rank=3)
    lost = total = 0.0
    for s in found.sites:
        old, new = (m.get_submodule(s.site).weight.detach().double() for m in (W, tuned))
        S = torch.linalg.svdvals(new - old)
        assert s.lost == pytest.approx(float(S[3:].norm()), rel=1e-5)
        assert s.change == pytest.approx(float(S.norm()), rel=1e-6)
        assert s.weight == pytest.approx(float(old.norm()), rel=1e-6)
        assert s.exact
        lost, total = lost + float(S[3:].square().sum()), total + float(S.square().sum())
    assert found.error == pytest.approx((lost / total) ** 0.5, rel=1e-5)
    assert lorary.switch(W, found.adapter) is W


def shaken(name: str, folder: Path, **changes: Any) -> Tensor:
    """Saves `base`, and `tuned` with every parameter and buffer changed; the outputs of the latter."""
    model = seeded(name, **changes)
    model.save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, t in [*model.named_parameters(), *model.named_buffers()]:
            if t.is_floating_point() and "inv_freq" not in key:
                t.add_(torch.randn(t.shape, generator=generator).abs() * 0.02)
    model.save_pretrained(folder / "tuned")
    return outputs(model)


# fused and transposed projections, tied embeddings, an encoder-decoder, experts in one parameter, convolutions with
# running statistics
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    **{
        kind: (name, {})
        for kind, name in {
            "fused": "Phi3ForCausalLM",
            "transposed": "GPT2LMHeadModel",
            "encoder-decoder": "BartForConditionalGeneration",
            "experts": "MixtralForCausalLM",
            "convolution": "MobileNetV2ForImageClassification",
            "patches": "ViTForImageClassification",
        }.items()
    },
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_everything_that_differs_is_in_the_adapter(kind: str, tmp_path: Path) -> None:
    name, changes = ARCHITECTURES[kind]
    y = shaken(name, tmp_path, **changes)
    found = lorary.extract(tmp_path / "base", tmp_path / "tuned", energy=1.0)
    base = loaded(tmp_path / "base", name)
    assert float((outputs(base) - y).abs().max()) > 0.05
    assert found.error < 1e-6
    lorary.save_adapter(found.adapter, tmp_path / "adapter", model=base)
    model = lorary.load(base, tmp_path / "adapter")
    assert float((outputs(model) - y).abs().max()) < 1e-5
    adapted = {s.site for s in found.sites}
    if kind == "tied":  # the shared weight is adapted at both of its layers
        assert {"model.embed_tokens", "lm_head"} <= adapted
    if kind == "experts":
        assert "model.layers.0.mlp.experts.down_proj" in found.adapter.full
    if kind == "convolution":
        assert any(key.endswith("running_mean") for key in found.adapter.full)
    assert "kept in full, exactly (" in str(found)


def test_a_head_that_tuning_has_untied(tmp_path: Path) -> None:
    model = seeded("LlamaForCausalLM", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2), ["lm_head"]))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    y = outputs(model)
    lorary.merge(model)
    model.save_pretrained(tmp_path / "tuned")
    found = lorary.extract(tmp_path / "base", tmp_path / "tuned", rank=2)
    assert [s.site for s in found.sites] == ["lm_head"]
    assert found.error < 1e-6
    base = lorary.switch(loaded(tmp_path / "base", "LlamaForCausalLM"), found.adapter)
    torch.testing.assert_close(outputs(base), y, rtol=1e-5, atol=1e-4)


def test_targets_restrict_it_and_the_rest_is_told(tmp_path: Path) -> None:
    shaken("LlamaForCausalLM", tmp_path)
    found = lorary.extract(tmp_path / "base", tmp_path / "tuned", rank=2, targets="attention-qv")
    assert {s.site.rpartition(".")[2] for s in found.sites} == {"q_proj", "v_proj"}
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= found.left_out.keys()
    assert len(found.left_out) == 12
    assert len(found.adapter.full) == 5  # the norms
    assert "12 weights that differ are left out, with " in str(found)
    named = lorary.extract(tmp_path / "base", tmp_path / "tuned", rank=2, targets=["q_proj", "v_proj"])
    assert content_hash(named.adapter) == content_hash(found.adapter)


def test_it_is_told_how_it_was_made(tmp_path: Path) -> None:
    merged("LlamaForCausalLM", tmp_path)
    seen: list[tuple[int, int, str]] = []
    found = lorary.extract(tmp_path / "base", str(tmp_path / "tuned"), rank=2, progress=lambda *step: seen.append(step))
    record = found.adapter.provenance
    assert record is not None
    assert (record.how, [p.name for p in record.parents]) == ("extract", ["base", "tuned"])
    assert record.settings == {"rank": 2, "error": found.error}
    assert [done for done, *_ in seen] == list(range(len(seen)))
    assert seen[0][1:] == (len(seen), "model.embed_tokens.weight")
    assert found.unchanged + len(found.sites) == len(seen)
    lines = str(found).splitlines()
    assert lines[0].startswith("14 layers adapted with rank 2: their change is off by ")
    assert lines[1] == "no factors of these ranks are nearer (Eckart and Young)"
    assert lines[-1] == "and 4 more"
    assert json.loads(json.dumps(found.to_dict()))["sites"][0]["error"] == found.worst[0].error
    assert found.adapter.base == lorary.Fingerprint.of(loaded(tmp_path / "base", "LlamaForCausalLM"))


def test_one_pair_of_tensors_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merged("LlamaForCausalLM", tmp_path)
    alive: list[weakref.ref[Tensor]] = []
    read, most = WeightFiles.tensor, 0

    def watched(files: WeightFiles, name: str) -> Tensor:
        tensor = read(files, name)
        alive.append(weakref.ref(tensor))
        nonlocal most
        most = max(most, sum(t() is not None for t in alive))
        return tensor

    monkeypatch.setattr(WeightFiles, "tensor", watched)
    lorary.extract(tmp_path / "base", tmp_path / "tuned", rank=1)
    assert len(alive) == 42
    assert most == 2


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    merged("LlamaForCausalLM", folder)
    return folder


def changed(folder: Path, **settings: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[0]


def truncated(folder: Path) -> None:
    file = first_shard(folder)
    file.write_bytes(file.read_bytes()[:-100])


def indexed(folder: Path, name: str, file: str) -> None:
    index = folder / "model.safetensors.index.json"
    record = json.loads(index.read_text())
    record["weight_map"][name] = file
    index.write_text(json.dumps(record))


def as_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def as_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def poisoned(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"][3] = float("nan")
    tensors["lm_head.weight"][0, 1] = float("inf")


def resized(tensors: dict[str, Tensor]) -> None:
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.zeros(2, 16)])


def resized_folder(folder: Path) -> None:
    changed(folder, vocab_size=42)
    rewritten(folder, resized)


NORM = "model.norm.weight"
REFUSED: dict[str, tuple[Callable[[Path, Path], object], tuple[str, ...]]] = {
    "no folder": (lambda b, t: shutil.rmtree(t), ("there is no such folder",)),
    "an adapter": (lambda b, t: as_adapter(t), ("it is an adapter, not a model",)),
    "a pickle": (lambda b, t: as_pickle(t), ("weights as a pickle, which can run code when it is opened",)),
    "no weights": (
        lambda b, t: (t / "model.safetensors").unlink(),
        ("there is neither model.safetensors nor model.safetensors.index.json in it",),
    ),
    "truncated": (lambda b, t: truncated(b), ("model-00001-of-", "is not a whole safetensors file")),
    "a path in the index": (
        lambda b, t: indexed(b, NORM, "../tuned/model.safetensors"),
        ("is not the name of a safetensors file in the folder",),
    ),
    "a wrong index": (
        lambda b, t: indexed(b, "model.layers.7.weight", first_shard(b).name),
        ("lacks model.layers.7.weight, which model.safetensors.index.json lists",),
    ),
    "code": (
        lambda b, t: changed(t, auto_map={"AutoModelForCausalLM": "evil.Model"}),
        ("the model would run its own Python code",),
    ),
    "other architecture": (
        lambda b, t: changed(t, architectures=["MistralForCausalLM"], model_type="mistral"),
        ("the base is a LlamaForCausalLM and the tuned model a MistralForCausalLM",),
    ),
    "other settings": (
        lambda b, t: changed(t, hidden_act="gelu", rms_norm_eps=1e-3),
        (
            "config.json: hidden_act: is 'silu' in the base and 'gelu' in the tuned model",
            "config.json: rms_norm_eps: is 1e-06 in the base and 0.001 in the tuned model",
            "config.json: an adapter changes weights alone\n      hint: make the settings equal",
        ),
    ),
    "resized vocabulary": (
        lambda b, t: resized_folder(t),
        (
            "model.embed_tokens.weight: is (40, 16) in the base and (42, 16) in the tuned model",
            "lm_head.weight: is (40, 16) in the base and (42, 16) in the tuned model",
            "resize the base's vocabulary in the same way first",
        ),
    ),
    "every size": (
        lambda b, t: changed(t, hidden_size=24, intermediate_size=32),
        ("model.embed_tokens.weight: is (40, 16) in the base and (40, 24) in the tuned model\n  -",),
    ),
    "fewer layers": (
        lambda b, t: changed(t, num_hidden_layers=1),
        ("model.layers.1.self_attn.q_proj.weight: only the base has this parameter",),
    ),
    "missing tensors": (
        lambda b, t: rewritten(t, lambda tensors: [tensors.pop(n) for n in (NORM, "lm_head.weight")]),
        (f"{NORM}: the tuned model's files hold no weights for it", "lm_head.weight: the tuned model's files hold"),
    ),
    "another name": (
        lambda b, t: rewritten(t, lambda tensors: tensors.update(other=tensors.pop(NORM))),
        (f"{NORM}: the tuned model's files hold no weights for it", "its files hold 'other', which the model does not"),
    ),
    "another shape": (
        lambda b, t: rewritten(t, lambda tensors: tensors.update({NORM: torch.ones(15)})),
        (f"{NORM}: is (16,) in the model and (15,) in the tuned model's files",),
    ),
    "not finite": (
        lambda b, t: rewritten(t, poisoned),
        (
            "model.norm.weight of the tuned model': 1 of 16 values are NaN or infinite, the first at [3]",
            "lm_head.weight of the tuned model': 1 of 640 values are NaN or infinite, the first at [0, 1]",
        ),
    ),
    "quantised": (
        lambda b, t: changed(t, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ("is quantised: the change of a weight is lost in its rounding",),
    ),
    "equal": (
        lambda b, t: (shutil.rmtree(t), shutil.copytree(b, t)),
        ("all parameters are equal in both checkpoints",),
    ),
    "both": (
        lambda b, t: ((b / "config.json").write_text("{"), as_adapter(t)),
        ("config.json: is not valid JSON", "it is an adapter, not a model"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_checkpoints_that_are_refused(case: str, pair: Path, tmp_path: Path) -> None:
    spoil, sentences = REFUSED[case]
    shutil.copytree(pair, tmp_path, dirs_exist_ok=True)
    spoil(tmp_path / "base", tmp_path / "tuned")
    with pytest.raises(FileError) as caught:
        lorary.extract(tmp_path / "base", tmp_path / "tuned", rank=2)
    for sentence in sentences:
        assert sentence in str(caught.value)


ARGUMENTS: list[tuple[dict[str, Any], type[LoraryError], str]] = [
    ({}, MethodError, "rank or energy: one of them says how much to keep; given: none"),
    ({"rank": 2, "energy": 0.5}, MethodError, "given: rank, energy"),
    ({"rank": -1}, MethodError, "rank: is -1, not a whole number"),
    ({"energy": 2}, MethodError, "energy: is 2, not a share"),
    ({"rank": 2, "targets": "q_porj"}, PlanError, "q_proj"),
    ({"rank": 2, "targets": []}, PlanError, "no target is given"),
    ({"rank": 2, "targets": ["model.norm"]}, PlanError, "model.norm"),
    ({"rank": 2, "targets": "embedding"}, FileError, "the layers to adapt are equal in both checkpoints"),
    ({"rank": 2, "tuned": None}, FileError, "is a NoneType, not a path"),
    ({"rank": 2, "base": "builtin:nothing"}, FileError, "no such model"),
]


@pytest.mark.parametrize(("options", "kind", "sentence"), ARGUMENTS, ids=[s for *_, s in ARGUMENTS])
def test_arguments_that_are_refused(
    options: dict[str, Any], kind: type[LoraryError], sentence: str, pair: Path
) -> None:
    with pytest.raises(kind) as caught:
        lorary.extract(**{"base": pair / "base", "tuned": pair / "tuned"} | options)
    assert sentence in str(caught.value)


def test_projections_of_a_fused_weight_are_taken_whole(tmp_path: Path) -> None:
    merged("GPT2LMHeadModel", tmp_path)
    with pytest.raises(PlanError, match=r"names projections of a fused weight(.|\n)*name the layer alone"):
        lorary.extract(tmp_path / "base", tmp_path / "tuned", rank=2, targets="c_attn[q]")
