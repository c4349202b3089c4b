"""VeRA between PEFT and here: the vectors, the projections that all layers share, and their seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import lorary
from lorary.adapters import shared_tensors
from lorary.errors import FileError
from tests.adapters.models import BASES, Base, close, fill, outputs, same, vera

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT's own words about what is tested here
    pytest.mark.filterwarnings("ignore:Specified to not (save|load) vera_A and vera_B:UserWarning"),
]
LLAMA, GPT2, BERT, CONV = BASES


def saved_by_peft(base: Base, folder: Path, **words: Any) -> torch.Tensor:
    """Saves a VeRA with PEFT; returns PEFT's outputs."""
    words = {"r": 6, "target_modules": list(base.targets), "fan_in_fan_out": base.transposed} | words
    model = get_peft_model(base.model(), VeraConfig(**words)).eval()
    fill(p for _, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(str(folder))
    return outputs(model)


def by_peft(base: Base, folder: Path) -> torch.Tensor:
    return outputs(PeftModel.from_pretrained(base.model(), str(folder)).eval())


@pytest.mark.parametrize("saved", [True, False], ids=["saved", "drawn"])
@pytest.mark.parametrize("base", [LLAMA, GPT2, BERT], ids=str)
def test_saved_by_peft_loads_here(base: Base, saved: bool, tmp_path: Path) -> None:
    theirs = saved_by_peft(base, tmp_path, projection_prng_key=7, save_projection=saved)
    model = lorary.load(base.model(), tmp_path)
    close(outputs(model), theirs)
    assert (theirs - outputs(base.model())).abs().max() > 1e-3, "the adapter must change something"
    adapter = lorary.Adapter.of(model)
    assert adapter.method == lorary.method("vera", r=6, seed=7, save_projections=saved)
    lorary.save(model, tmp_path / "again")
    assert load_file(tmp_path / "again" / "adapter_model.safetensors").keys() == (
        load_file(tmp_path / "adapter_model.safetensors").keys()
    )
    close(by_peft(base, tmp_path / "again"), theirs)


@pytest.mark.parametrize("saved", [True, False], ids=["saved", "drawn"])
@pytest.mark.parametrize("base", [LLAMA, GPT2, BERT], ids=str)
def test_saved_here_loads_in_peft(base: Base, saved: bool, tmp_path: Path) -> None:
    model = vera(base, seed=5, save_projections=saved)
    lorary.save(model, tmp_path)
    close(by_peft(base, tmp_path), outputs(model))
    words = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (words["peft_type"], words["projection_prng_key"], words["save_projection"]) == ("VERA", 5, saved)
    same(lorary.load_adapter(tmp_path), lorary.Adapter.of(model))
    (tmp_path / "lorary.json").unlink()
    close(outputs(lorary.load(base.model(), tmp_path)), outputs(model))


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_one_seed_draws_the_same_numbers_here_and_in_peft(seed: int) -> None:
    theirs = get_peft_model(
        LLAMA.model(), VeraConfig(r=6, target_modules=list(LLAMA.targets), projection_prng_key=seed)
    ).state_dict()
    layers = [m for m in vera(LLAMA, seed=seed).modules() if isinstance(m, lorary.Adapted)]
    assert layers[0].shared is not None
    for role, tensor in layers[0].shared.tensors.items():
        assert torch.equal(tensor, theirs[f"base_model.vera_{role}.default"])


@pytest.mark.parametrize(
    "words",
    [
        {"target_modules": r".*layers\.\d+\.self_attn\.(q|v)_proj"},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "model.norm"]},
        {"target_modules": ["down_proj"], "d_initial": 0.5, "vera_dropout": 0.25, "task_type": "CAUSAL_LM"},
    ],
    ids=lambda words: next(reversed(words)) + "=" + str(next(reversed(words.values()))),
)
def test_ways_to_name_sites_in_peft(words: dict[str, Any], tmp_path: Path) -> None:
    theirs = saved_by_peft(LLAMA, tmp_path, **words)
    close(outputs(lorary.load(LLAMA.model(), tmp_path)), theirs)


@pytest.mark.parametrize("bias", ["all", "vera_only"])
def test_biases_of_peft(bias: str, tmp_path: Path) -> None:
    theirs = saved_by_peft(BERT, tmp_path, target_modules=["query"], bias=bias)
    model = lorary.load(BERT.model(), tmp_path)
    close(outputs(model), theirs)
    assert any("query" in name for name in lorary.Adapter.of(model).full)


def test_our_biases_and_whole_modules_in_peft(tmp_path: Path) -> None:
    model = vera(BERT, targets=["query"], full=("bias", "*.output.LayerNorm.*"))
    fill(p for p in model.parameters() if p.requires_grad)
    lorary.save(model, tmp_path)
    words = json.loads((tmp_path / "adapter_config.json").read_text())
    assert words["bias"] == "all"
    assert "bert.encoder.layer.0.output.LayerNorm" in words["modules_to_save"]
    close(by_peft(BERT, tmp_path), outputs(model))
    (tmp_path / "lorary.json").unlink()
    close(outputs(lorary.load(BERT.model(), tmp_path)), outputs(model))


NOT_PEFTS: dict[str, Any] = {
    "parts of a fused weight": lambda: vera(GPT2, targets=["c_attn[q,v]"]),
    "a convolution": lambda: vera(CONV),
    "an embedding": lambda: vera(LLAMA, targets=["embed_tokens", "q_proj"]),
    "magnitudes": lambda: vera(LLAMA, "dora"),
}


@pytest.mark.parametrize("make", NOT_PEFTS.values(), ids=NOT_PEFTS)
def test_what_pefts_vera_has_not_is_kept_in_our_own_words(make: Any, tmp_path: Path) -> None:
    model = make()
    lorary.save(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.safetensors", "lorary.json"]
    names = load_file(tmp_path / "adapter.safetensors")
    assert {"|A", "|B"} < names.keys()
    assert not any(name.endswith(("_proj|A", "_attn|B")) for name in names), "what is shared is there once"
    same(lorary.load_adapter(tmp_path), lorary.Adapter.of(model))


def test_ranks_of_sites_have_no_words_in_pefts_vera(tmp_path: Path) -> None:
    base = LLAMA.model()
    plan = lorary.plan(base, lorary.method("vera", r=6), targets=["q_proj", "down_proj"], ranks={"down_proj": 3})
    lorary.attach(base, plan)
    fill(p for n, p in base.named_parameters() if ".params." in n)
    lorary.save(base.eval(), tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    adapter = lorary.load_adapter(tmp_path)
    same(adapter, lorary.Adapter.of(base))
    assert load_file(tmp_path / "adapter.safetensors")["|A"].shape == (6, 24)
    assert torch.equal(outputs(lorary.load(LLAMA.model(), tmp_path)), outputs(base))


def test_the_parts_that_were_read_are_views_of_one_tensor(tmp_path: Path) -> None:
    lorary.save(vera(LLAMA), tmp_path)
    adapter = lorary.load_adapter(tmp_path)
    for role in "AB":
        assert len({roles[role].untyped_storage().data_ptr() for roles in adapter.tensors.values()}) == 1
    own = sum(t.nbytes for roles in adapter.tensors.values() for role, t in roles.items() if role in "bd")
    assert adapter.size == own + 4 * (6 * 24 + 16 * 6)


@pytest.mark.parametrize(("saved", "times"), [(True, 1), (False, 2)], ids=["saved", "drawn"])
def test_the_parts_are_put_together_once(
    saved: bool, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And once more where they are compared with what the seed gives."""
    adapter, calls, original = lorary.Adapter.of(vera(LLAMA, save_projections=saved)), [], shared_tensors.whole_tensors
    monkeypatch.setattr(shared_tensors, "whole_tensors", lambda *words: calls.append(words) or original(*words))
    lorary.save_adapter(adapter, tmp_path)
    assert len(calls) == times


# --- drawn again -----------------------------------------------------------------------------------------------


def drawn(folder: Path) -> Path:
    """A folder of our own without projections."""
    lorary.save(vera(LLAMA, "dora", seed=3, save_projections=False), folder)
    return folder


def change(folder: Path, what: Any) -> None:
    record = json.loads((folder / "lorary.json").read_text())
    what(record)
    (folder / "lorary.json").write_text(json.dumps(record))


def refusal(folder: Path) -> str:
    with pytest.raises(FileError) as caught:
        lorary.load_adapter(folder)
    headline, _, rest = str(caught.value).partition("\n")
    assert headline == f"cannot load the adapter {str(folder)!r}"
    return rest


def test_projections_that_can_be_drawn_are_left_out(tmp_path: Path) -> None:
    model = vera(LLAMA, "dora", seed=3, save_projections=False)
    lorary.save(model, tmp_path)
    assert not {"|A", "|B"} & load_file(tmp_path / "adapter.safetensors").keys()
    assert json.loads((tmp_path / "lorary.json").read_text())["drawn"].keys() == {"A", "B"}
    same(lorary.load_adapter(tmp_path), lorary.Adapter.of(model))
    assert torch.equal(outputs(lorary.load(LLAMA.model(), tmp_path)), outputs(model))


def test_sixteen_bit_projections_are_drawn_to_the_same_bits(tmp_path: Path) -> None:
    model = LLAMA.model()
    method = lorary.method("vera", r=6, save_projections=False)
    lorary.attach(model, lorary.plan(model, method, targets=["q_proj"]), dtype=torch.bfloat16)
    fill(p for n, p in model.named_parameters() if ".params." in n)
    lorary.save(model, tmp_path)
    assert not (tmp_path / "adapter_config.json").exists(), "PEFT draws them in 32 bits"
    assert json.loads((tmp_path / "lorary.json").read_text())["drawn"]["A"]["dtype"] == "BF16"
    same(lorary.load_adapter(tmp_path), lorary.Adapter.of(model))


def test_projections_that_the_seed_does_not_give_are_kept(tmp_path: Path) -> None:
    """As after a loaded adapter of another library, or of another machine's random numbers."""
    model = vera(LLAMA, save_projections=False)
    layer = next(m for m in model.modules() if isinstance(m, lorary.Adapted))
    assert layer.shared is not None
    layer.shared.tensors["A"][0, 0] += 1
    lorary.save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["save_projection"] is True
    assert "drawn" not in json.loads((tmp_path / "lorary.json").read_text())
    same(lorary.load_adapter(tmp_path), lorary.Adapter.of(model))
    close(by_peft(LLAMA, tmp_path), outputs(model))


def test_another_draw_is_refused(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "a")
    change(folder, lambda record: record["method"]["init"].update(seed=4))
    what = "its seed gives other numbers here than in training (SHA-256 differs)"
    fix = "      hint: save it again with save_projections=True, on the base that it was trained on"
    assert refusal(folder) == "\n".join(f"  - lorary.json: drawn: {role}: {what}\n{fix}" for role in "AB")


def test_sites_that_do_not_share_cannot_be_saved(tmp_path: Path) -> None:
    adapter = lorary.Adapter.of(vera(LLAMA))
    first = adapter.sites[0].site.name
    tensors = {name: dict(roles) for name, roles in adapter.tensors.items()}
    tensors[first]["A"] = tensors[first]["A"] + 1
    with pytest.raises(FileError) as caught:
        lorary.save_adapter(lorary.Adapter(adapter.method, adapter.sites, tensors, base=adapter.base), tmp_path / "a")
    line = f"  - {first}: its A differs from the other sites', which all share one"
    assert str(caught.value) == f"cannot save an adapter to {str(tmp_path / 'a')!r}\n{line}"
    assert not (tmp_path / "a").exists()


# --- refused ---------------------------------------------------------------------------------------------------


def test_without_a_model_a_vera_of_peft_is_refused(tmp_path: Path) -> None:
    saved_by_peft(LLAMA, tmp_path)
    assert refusal(tmp_path) == (
        "  - the shapes of the layers that PEFT's VeRA adapts are known only to the model\n"
        "      hint: read it onto its base: lorary.load(model, folder)"
    )


def rewrite(folder: Path, what: Any) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    what(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def say(folder: Path, **words: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | words))


ENTRY = "base_model.model.model.layers.0.self_attn.q_proj.vera_lambda_b"
BAD: dict[str, tuple[Any, str]] = {
    "a projection missing": (
        lambda f: rewrite(f, lambda t: t.pop("base_model.vera_A")),
        "  - vera_A: is missing",
    ),
    "a projection of another shape": (
        lambda f: rewrite(f, lambda t: t.update({"base_model.vera_B": torch.ones(6, 16)})),
        "  - vera_B: has the shape [6, 16], expected [16, 6]\n      hint: it is transposed",
    ),
    "projections that are to be drawn": (
        lambda f: say(f, save_projection=False),
        "  - vera_A: is there, and the configuration says that it is drawn from its seed\n"
        "  - vera_B: is there, and the configuration says that it is drawn from its seed",
    ),
    "a vector missing": (
        lambda f: rewrite(f, lambda t: t.pop(ENTRY)),
        "  - model.layers.0.self_attn.q_proj.vera_lambda_b: is missing",
    ),
    "a vector of NaN": (
        lambda f: rewrite(f, lambda t: t[ENTRY].fill_(float("nan"))),
        "  - model.layers.0.self_attn.q_proj.vera_lambda_b: 16 of 16 values are NaN or infinite, the first at [0]",
    ),
    "a projection of NaN": (
        lambda f: rewrite(f, lambda t: t["base_model.vera_A"].fill_(float("nan"))),
        "  - vera_A: 144 of 144 values are NaN or infinite, the first at [0, 0]",
    ),
    "another rank": (
        lambda f: say(f, r=5),
        "  - model.layers.0.self_attn.q_proj.vera_lambda_d: has the shape [6], expected [5]\n"
        "  - model.layers.0.mlp.down_proj.vera_lambda_d: has the shape [6], expected [5]\n"
        "  - model.layers.1.self_attn.q_proj.vera_lambda_d: has the shape [6], expected [5]\n"
        "  - model.layers.1.mlp.down_proj.vera_lambda_d: has the shape [6], expected [5]\n"
        "  - vera_A: has the shape [6, 24], expected [5, 24]\n"
        "  - vera_B: has the shape [16, 6], expected [16, 5]",
    ),
    "a seed below zero": (
        lambda f: say(f, projection_prng_key=-1),
        "  - adapter_config.json: projection_prng_key: is -1; it takes a whole number of at least 0",
    ),
    "a flag that is a text": (
        lambda f: say(f, save_projection="no"),
        "  - adapter_config.json: save_projection: is 'no'; it takes true or false",
    ),
    "a field of LoRA's": (
        lambda f: say(f, use_dora=True),
        "  - adapter_config.json: use_dora: is not a field that lorary knows\n"
        "      hint: a newer PEFT may have written it; strict=False ignores it",
    ),
    "an embedding": (
        lambda f: say(f, target_modules=["q_proj", "down_proj", "embed_tokens"]),
        "  - model.embed_tokens: is of kind embedding, which PEFT's VeRA never adapts",
    ),
    "LoRA's factors": (
        lambda f: rewrite(f, lambda t: t.update({ENTRY.replace("vera_lambda_b", "lora_A.weight"): torch.ones(2, 16)})),
        "  - model.layers.0.self_attn.q_proj.lora_A.weight: belongs to LoRA, which the configuration does not name",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD)
def test_a_bad_vera_of_peft_is_refused(spoil: Any, message: str, tmp_path: Path) -> None:
    saved_by_peft(LLAMA, tmp_path, target_modules=["q_proj", "down_proj"])
    spoil(tmp_path)
    model = LLAMA.model()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(FileError) as caught:
        lorary.load(model, tmp_path)
    assert str(caught.value) == f"cannot load the adapter {str(tmp_path)!r}\n{message}"
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
