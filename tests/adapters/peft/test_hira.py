"""HiRA between PEFT and here: a weight scaled by two factors, on every kind of layer that both adapt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import HiraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorary
from lorary.adapters import export_peft
from lorary.errors import FileError, MethodError
from lorary.layers.adapted import adapted_layers
from tests.adapters.models import BASES, Base, by_peft, close, fill, outputs, same

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
]
LLAMA, GPT2, BERT, CONV = BASES


def saved_by_peft(base: Base, folder: Path, **words: Any) -> Tensor:
    """Saves a HiRA with PEFT; returns PEFT's outputs."""
    words = {"target_modules": list(base.targets), "r": 3, "fan_in_fan_out": base.transposed} | words
    model = get_peft_model(base.model(), HiraConfig(**words)).eval()
    fill(p for n, p in model.named_parameters() if "hira_" in n)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return outputs(model)


def hira(base: Base, targets: Any = None, *names: str, ranks: Any = None, **options: Any) -> Any:
    """The base with a filled HiRA on it."""
    model = base.model()
    method = lorary.method("hira", *names, **({"r": 3} | options))
    lorary.attach(model, lorary.plan(model, method, targets or list(base.targets), ranks=ranks))
    fill(p for n, p in model.named_parameters() if ".params." in n)
    return model.eval()


@pytest.mark.parametrize("base", BASES, ids=str)
def test_saved_by_peft_loads_here(base: Base, tmp_path: Path) -> None:
    """With an embedding beside the layers."""
    targets = [*base.targets, base.embedding]
    theirs = saved_by_peft(base, tmp_path, target_modules=targets, hira_dropout=0.25)
    model = lorary.load(base.model(), tmp_path)
    close(outputs(model), theirs)
    assert (theirs - outputs(base.model())).abs().max() > 1e-3, "the adapter must change something"
    assert lorary.attached(model).method == lorary.method("hira", r=3, dropout=0.25)
    lorary.save(model, tmp_path / "again")
    close(by_peft(base, tmp_path / "again"), theirs)
    name = "adapter_model.safetensors"
    mine, other = (load_file(folder / name) for folder in (tmp_path / "again", tmp_path))
    assert {n: t.shape for n, t in mine.items()} == {n: t.shape for n, t in other.items()}
    assert all(torch.equal(t, other[n]) for n, t in mine.items())
    lorary.merge(model)
    torch.testing.assert_close(outputs(model), theirs, rtol=1e-5, atol=1e-5)


MADE: dict[str, tuple[Base, Any]] = {
    "Llama": (LLAMA, lambda: hira(LLAMA)),
    "GPT-2, q and v": (GPT2, lambda: hira(GPT2, ["c_attn[q,v]"])),
    "GPT-2, whole": (GPT2, lambda: hira(GPT2)),
    "BERT": (BERT, lambda: hira(BERT)),
    "an embedding": (LLAMA, lambda: hira(LLAMA, ["embed_tokens", "q_proj"])),
    "convolutions": (CONV, lambda: hira(CONV)),
    "A frozen": (LLAMA, lambda: hira(LLAMA, None, "lora-fa")),
}


@pytest.mark.parametrize(("base", "make"), MADE.values(), ids=MADE)
def test_saved_here_loads_in_peft(base: Base, make: Any, tmp_path: Path) -> None:
    model = make()
    y = outputs(model)
    lorary.save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "HIRA"
    close(by_peft(base, tmp_path), y)
    same(lorary.load_adapter(tmp_path), lorary.Adapter.of(model))
    (tmp_path / "lorary.json").unlink()
    close(outputs(lorary.load(base.model(), tmp_path)), y)
    if base is not GPT2:
        assert len(lorary.load_adapter(tmp_path).sites) == len(adapted_layers(model))  # shapes tell them


def test_the_start_is_pefts_too() -> None:
    """Same bounds of A, zeros in B."""
    torch.manual_seed(0)
    model: Any = get_peft_model(nn.Sequential(nn.Linear(256, 64)), HiraConfig(r=32, target_modules=["0"]))
    mine = nn.Sequential(nn.Linear(256, 64))
    lorary.attach(mine, lorary.plan(mine, lorary.method("hira"), "0"))
    for A, B in (
        (model.base_model.model[0].hira_A["default"], model.base_model.model[0].hira_B["default"]),
        (mine[0].params["A"], mine[0].params["B"]),
    ):
        assert A.shape == (32, 256)
        assert 0.97 / 16 < A.abs().max() <= 1 / 16
        assert not B.any()


@pytest.mark.parametrize("what", ["grouped", "reflecting"])
def test_convolutions_of_which_peft_computes_something_else_are_kept_in_our_own_form(what: str, tmp_path: Path) -> None:
    words: dict[str, Any] = {"groups": 2} if what == "grouped" else {"padding": 1, "padding_mode": "reflect"}

    def base() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(4, 6, 3, **words))

    model = base()
    lorary.attach(model, lorary.plan(model, lorary.method("hira", r=2), "0"))
    fill(p for n, p in model.named_parameters() if ".params." in n)
    lorary.save(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.safetensors", "lorary.json"]
    x = torch.randn(2, 4, 7, 7)
    assert torch.equal(lorary.load(base(), tmp_path)(x), model(x))


def test_a_dilated_convolution_is_pefts_too(tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(4, 6, 3, dilation=2))

    model = base()
    lorary.attach(model, lorary.plan(model, lorary.method("hira", r=2), "0"))
    fill(p for n, p in model.named_parameters() if ".params." in n)
    lorary.save(model, tmp_path)
    x = torch.randn(2, 4, 7, 7)
    theirs: Any = PeftModel.from_pretrained(base(), str(tmp_path))
    close(theirs(x).detach(), model(x).detach())


@pytest.mark.parametrize("what", ["ranks", "a part beside a whole layer"])
def test_several_ranks_are_kept_in_our_own_form(what: str, tmp_path: Path) -> None:
    base = LLAMA if what == "ranks" else GPT2
    model = hira(LLAMA, ranks={"down_proj": 2}) if what == "ranks" else hira(GPT2, ["c_attn[q,v]", "c_fc"])
    lorary.save(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.safetensors", "lorary.json"]
    assert torch.equal(outputs(lorary.load(base.model(), tmp_path)), outputs(model))


def test_trained_biases_are_kept_in_our_own_form(tmp_path: Path) -> None:
    model = hira(BERT, None, "bitfit")
    lorary.save(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.safetensors", "lorary.json"]
    assert torch.equal(outputs(lorary.load(BERT.model(), tmp_path)), outputs(model))


def test_exported_as_what_it_is(tmp_path: Path) -> None:
    """There is no LoRA with its function, and PEFT has HiRA itself."""
    model = hira(LLAMA)
    export_peft(lorary.Adapter.of(model), tmp_path / "out", model=LLAMA.model())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    close(by_peft(LLAMA, tmp_path / "out"), outputs(model))
    verdicts = {v.reader: v for v in lorary.check(tmp_path / "out", "peft", "vllm")}
    assert {name: str(v.outcome) for name, v in verdicts.items()} == {"peft": "accepted", "vllm": "rejected"}
    assert [(p.what, p.fix) for p in verdicts["vllm"].reasons] == [
        ("vLLM refuses the PEFT type HIRA", "lorary export ADAPTER OUT --to merged")
    ]


def test_what_pefts_type_cannot_say_is_not_exported(tmp_path: Path) -> None:
    model = hira(LLAMA, ranks={"down_proj": 2})
    with pytest.raises(MethodError) as refusal:
        export_peft(lorary.Adapter.of(model), tmp_path / "out", model=LLAMA.model())
    assert "HiRA is not a low-rank change of W" in str(refusal.value)
    assert "hint: merge it into the base" in str(refusal.value)
    assert not (tmp_path / "out").exists()


# --- refused ----------------------------------------------------------------------------------------------------------


def rewrite(folder: Path, what: Any) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    what(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def say(folder: Path, **words: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | words))


Q = "model.layers.0.self_attn.q_proj"
A, B = (f"base_model.model.{Q}.hira_{role}" for role in "AB")
BAD: dict[str, tuple[Any, str]] = {
    "a factor missing": (lambda f: rewrite(f, lambda t: t.pop(A)), f"{Q}.hira_A: is missing"),
    "a factor of NaN": (
        lambda f: rewrite(f, lambda t: t[B].fill_(float("nan"))),
        f"{Q}.hira_B: 48 of 48 values are NaN or infinite, the first at [0, 0]",
    ),
    "a factor of another layer": (
        lambda f: rewrite(f, lambda t: t.update({A: torch.ones(3, 24)})),
        f"{Q}.hira_A: has the shape [3, 24], expected [3, 16]",
    ),
    "a rank that the configuration does not say": (
        lambda f: say(f, r=4),
        f"{Q}.hira_A: has the shape [3, 16], expected [4, 16]",
    ),
    "a LoRA's tensors": (
        lambda f: rewrite(f, lambda t: t.update({A.replace("hira_A", "lora_A.weight"): t.pop(A)})),
        "belongs to LoRA, which the configuration does not name",
    ),
    "a start of another tool": (
        lambda f: say(f, init_weights="pissa"),
        "init_weights: is 'pissa'; it takes true, false or gaussian",
    ),
    "a word that is not known": (lambda f: say(f, lora_alpha=8), "adapter_config.json: lora_alpha"),
    "ranks by name": (
        lambda f: say(f, rank_pattern={"q_proj": 5}),
        'rank_pattern: is {"q_proj": 5}, and PEFT\'s HiRA computes without it',
    ),
    "a dropout of one": (lambda f: say(f, hira_dropout=1.0), "hira_dropout: is 1.0; it takes a probability in [0, 1)"),
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
