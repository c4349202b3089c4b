"""AdaLoRA between PEFT and here: P, E and Q, masks of what is left, a rank of zero, and the scale of the start."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import lorary
from lorary.adapters import AdapterWarning, export_peft, save_adapter
from lorary.errors import FileError
from lorary.methods.adalora import AlphaOverInitialRank, OrthogonalityPenalty, SVDDelta
from lorary.methods.adalora_budget import RankBudget
from lorary.methods.rslora import AlphaOverSqrtRank
from tests.adapters.models import BASES, Base, close, fill, outputs, same

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT takes its AdaLoRA's masks for a LoRA's patterns of ranks, whoever wrote them
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),
    # and layers of which nothing is left for pieces of sharded ones
    pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor.s. have invalid shape"),
]
LLAMA, GPT2, BERT, CONV = BASES
TARGETS = {CONV.name: ["conv2", "head.1"]}  # PEFT's AdaLoRA has no one-dimensional convolutions
LEFT = (4, 0, 2, 1)
Q = "model.layers.0.self_attn.q_proj"


def adalora(base: Base, left: tuple[int, ...] = LEFT, targets: Any = None, **options: Any) -> nn.Module:
    """The base with a filled AdaLoRA on it, of which so many directions are left, layer by layer."""
    model = base.model()
    method = lorary.method("adalora", **({"r": 4, "target": 2, "alpha": 60} | options))
    plan = lorary.plan(model, method, targets or TARGETS.get(base.name, base.targets))
    placed = plan.sites
    if left:
        deltas = [SVDDelta(p.r, left[i % len(left)]) for i, p in enumerate(placed)]
        placed = tuple(
            dataclasses.replace(p, method=p.method.replace(delta=d)) for p, d in zip(placed, deltas, strict=True)
        )
    lorary.attach(model, dataclasses.replace(plan, sites=placed))
    fill(p for n, p in model.named_parameters() if ".params." in n)
    return model.eval()


def by_peft(base: Base, folder: Path) -> torch.Tensor:
    return outputs(PeftModel.from_pretrained(base.model(), str(folder)).eval())


def saved_by_peft(base: Base, folder: Path, left: tuple[int, ...] = (), **words: Any) -> torch.Tensor:
    """Saves an AdaLoRA with PEFT, as after its allocation where some is left; returns PEFT's outputs."""
    words = {"init_r": 4, "target_r": 2, "lora_alpha": 60, "total_step": 100, "tinit": 10, "tfinal": 20} | words
    words = {"target_modules": list(TARGETS.get(base.name, base.targets)), "fan_in_fan_out": base.transposed} | words
    model: Any = get_peft_model(base.model(), AdaLoraConfig(**words)).eval()
    fill(p for n, p in model.named_parameters() if "lora_" in n)
    values = [(n, p) for n, p in model.base_model.model.named_parameters() if ".lora_E." in n]
    if left:
        masks = {n: [(i * 3) % 4 < left[k % len(left)] for i in range(4)] for k, (n, _) in enumerate(values)}
        for name, E in values:
            E.data *= torch.tensor(masks[name])[:, None]
        model.peft_config["default"].rank_pattern = masks
    model.save_pretrained(str(folder))
    return outputs(model)


@pytest.mark.parametrize("left", [(), LEFT], ids=["all", "some"])
@pytest.mark.parametrize("base", BASES, ids=str)
def test_saved_here_loads_in_peft(base: Base, left: tuple[int, ...], tmp_path: Path) -> None:
    model = adalora(base, left)
    expected = outputs(model)
    assert (outputs(base.model()) - expected).abs().max() > 1e-3, "the adapter must change something"
    lorary.save(model, tmp_path)
    close(by_peft(base, tmp_path), expected)
    words = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (words["peft_type"], words["init_r"], words["target_r"], words["lora_alpha"]) == ("ADALORA", 4, 2, 60)
    same(lorary.load_adapter(tmp_path), lorary.Adapter.of(model))
    assert torch.equal(outputs(lorary.load(base.model(), tmp_path)), expected)
    (tmp_path / "lorary.json").unlink()
    again = lorary.load(base.model(), tmp_path)
    assert torch.equal(outputs(again), expected)
    assert [p.delta for p in lorary.Adapter.of(again).sites] == [
        p.delta if p.delta != SVDDelta(4, 4) else SVDDelta(4) for p in lorary.Adapter.of(model).sites
    ]


@pytest.mark.parametrize("left", [(), LEFT], ids=["all", "some"])
@pytest.mark.parametrize("base", BASES, ids=str)
def test_saved_by_peft_loads_here(base: Base, left: tuple[int, ...], tmp_path: Path) -> None:
    theirs = saved_by_peft(base, tmp_path, left)
    model = lorary.load(base.model(), tmp_path)
    close(outputs(model), theirs)
    assert (theirs - outputs(base.model())).abs().max() > 1e-3
    adapter = lorary.Adapter.of(model)
    assert adapter.method.rules == (RankBudget(2, 10, 20, 1, 0.85, 0.85), OrthogonalityPenalty(0.5))
    assert adapter.method.scale == AlphaOverInitialRank(60.0)
    if left:
        assert [p.shapes["E"][0] for p in adapter.sites] == [left[i % len(left)] for i in range(len(adapter.sites))]
    lorary.save(model, tmp_path / "again")
    close(by_peft(base, tmp_path / "again"), theirs)


@pytest.mark.parametrize("words", [{"bias": "all"}, {"bias": "lora_only"}, {"modules_to_save": ["decoder"]}], ids=str)
def test_biases_and_whole_modules_of_peft(words: dict[str, Any], tmp_path: Path) -> None:
    words = {"init_r": 4, "lora_alpha": 60, "total_step": 9, "target_modules": ["query"]} | words
    there: Any = get_peft_model(BERT.model(), AdaLoraConfig(**words)).eval()
    fill(p for _, p in there.named_parameters() if p.requires_grad)
    there.save_pretrained(str(tmp_path))
    model = BERT.model()
    if "modules_to_save" in words:  # in BERT it is tied to the embedding, of which PEFT trained a copy
        model.cls.predictions.decoder.weight = nn.Parameter(model.cls.predictions.decoder.weight.detach().clone())
        model.cls.predictions.decoder.bias = nn.Parameter(model.cls.predictions.decoder.bias.detach().clone())
    close(outputs(lorary.load(model, tmp_path)), outputs(there))
    assert lorary.Adapter.of(model).full


def test_our_biases_in_peft(tmp_path: Path) -> None:
    model = adalora(BERT, (), targets=["query"], full=("bias",))
    fill(p for n, p in model.named_parameters() if n.endswith("bias"))
    lorary.save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["bias"] == "all"
    close(by_peft(BERT, tmp_path), outputs(model))


def test_masked_but_not_yet_dropped_directions_are_kept(tmp_path: Path) -> None:
    """In the middle of a run E is zero where a direction is masked; it may come back."""
    model = adalora(LLAMA, ())
    for name, p in model.named_parameters():
        if name.endswith("params.E"):
            p.data[1:3] = 0
    lorary.save(model, tmp_path / "a")
    same(lorary.load_adapter(tmp_path / "a"), lorary.Adapter.of(model))
    close(by_peft(LLAMA, tmp_path / "a"), outputs(model))
    lorary.save_adapter(lorary.Adapter.of(model).compact(), tmp_path / "b")
    records = json.loads((tmp_path / "b" / "lorary.json").read_text())["sites"]
    assert [set(r) - set(records[0]) for r in records] == [set()] * len(records)
    assert all(r["kept"] == 2 and "method" not in r for r in records), "a site says what is left, and no more"
    close(outputs(lorary.load(LLAMA.model(), tmp_path / "b")), outputs(model))


def test_ranks_and_alphas_of_sites_are_kept_in_our_own_words(tmp_path: Path) -> None:
    """PEFT's AdaLoRA has one rank at the start and one alpha, and does not say that it ignores others."""
    model = LLAMA.model()
    method = lorary.method("adalora", r=4, target=2)
    plan = lorary.plan(model, method, LLAMA.targets, ranks={"down_proj": 3}, alphas={"q_proj": 7})
    lorary.attach(model, plan)
    fill(p for n, p in model.named_parameters() if ".params." in n)
    lorary.save(model.eval(), tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["adapter.safetensors", "lorary.json"]
    same(lorary.load_adapter(tmp_path / "a"), lorary.Adapter.of(model))
    export_peft(lorary.Adapter.of(model), tmp_path / "b")
    close(by_peft(LLAMA, tmp_path / "b"), outputs(model))


def rescaled() -> nn.Module:
    model = LLAMA.model()
    method = lorary.method("adalora", r=4, target=2).replace(scale=AlphaOverSqrtRank(6.0))
    lorary.attach(model, lorary.plan(model, method, LLAMA.targets))
    fill(p for n, p in model.named_parameters() if ".params." in n)
    return model.eval()


NOT_PEFTS: dict[str, tuple[Base, Callable[[], nn.Module]]] = {
    "an embedding": (LLAMA, lambda: adalora(LLAMA, targets=["embed_tokens", "q_proj"])),
    "a one-dimensional convolution": (CONV, lambda: adalora(CONV, targets=["conv1", "head.1"])),
    "another scale": (LLAMA, rescaled),
}


@pytest.mark.parametrize(("base", "make"), NOT_PEFTS.values(), ids=NOT_PEFTS)
def test_what_pefts_adalora_has_not_is_kept_in_our_own_words(
    base: Base, make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    model = make()
    lorary.save(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.safetensors", "lorary.json"]
    same(lorary.load_adapter(tmp_path), lorary.Adapter.of(model))
    assert torch.equal(outputs(lorary.load(base.model(), tmp_path)), outputs(model))


@pytest.mark.parametrize("base", BASES, ids=str)
def test_exported_it_is_a_lora_of_what_is_left(base: Base, tmp_path: Path) -> None:
    targets = ["embed_tokens", "q_proj", "v_proj"] if base is LLAMA else base.targets
    model = adalora(base, targets=targets)
    export_peft(lorary.Adapter.of(model), tmp_path)
    close(by_peft(base, tmp_path), outputs(model))
    close(outputs(lorary.load(base.model(), tmp_path)), outputs(model))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert all(min(t.shape) > 0 for t in tensors.values()), "a layer of which nothing is left is left out"


def test_where_nothing_is_left_there_is_nothing_to_export(tmp_path: Path) -> None:
    model = adalora(LLAMA, (0,))
    with pytest.raises(FileError) as caught:
        export_peft(lorary.Adapter.of(model), tmp_path / "a")
    line = "  - sites: no layer has a direction left, and PEFT's adapters adapt at least one layer"
    assert str(caught.value).splitlines()[1] == line
    lorary.save(model, tmp_path / "b")
    with pytest.warns(AdapterWarning, match="this adapter changes nothing"):
        same(lorary.load_adapter(tmp_path / "b"), lorary.Adapter.of(model))
    with pytest.warns(AdapterWarning):
        assert torch.equal(outputs(lorary.load(LLAMA.model(), tmp_path / "b")), outputs(LLAMA.model()))


def test_a_dilated_convolution_is_one_in_pefts_adalora(tmp_path: Path) -> None:
    """Unlike in its LoRA: the change of the weight is made, and slides as the weight does."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(30, 8)
            self.conv = nn.Conv2d(1, 6, (3, 2), dilation=(2, 1))

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.conv(self.embed(tokens).unsqueeze(1)).mean((2, 3))
            return out

    base = Base("flat", Flat, ("conv",), "", "")
    theirs = saved_by_peft(base, tmp_path)
    model = lorary.load(base.model(), tmp_path)
    close(outputs(model), theirs)
    save_adapter(lorary.Adapter.of(model), tmp_path / "again", model=base.model())
    close(by_peft(base, tmp_path / "again"), theirs)


# --- refused ---------------------------------------------------------------------------------------------------


def rewrite(folder: Path, what: Any) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    what(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def say(**words: Any) -> Any:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | words))

    return change


def put(role: str, *shape: int, value: float = 1.0) -> Any:
    name = f"base_model.model.{Q}.lora_{role}"
    return lambda f: rewrite(f, lambda t: t.update({name: torch.full(shape, value)}))


C = "  - adapter_config.json: "
BAD: dict[str, tuple[Any, str]] = {
    "E missing": (
        lambda f: rewrite(f, lambda t: t.pop(f"base_model.model.{Q}.lora_E")),
        f"  - {Q}.lora_E: is missing",
    ),
    "E of one dimension": (put("E", 4), f"  - {Q}.lora_E: has the shape [4], expected [4, 1]"),
    "A of another rank": (put("A", 3, 16), f"  - {Q}.lora_A: has the shape [3, 16], expected [4, 16]"),
    "NaN": (
        put("E", 4, 1, value=float("nan")),
        f"  - {Q}.lora_E: 4 of 4 values are NaN or infinite, the first at [0, 0]",
    ),
    "a LoRA's factor": (
        lambda f: rewrite(f, lambda t: t.update({f"base_model.model.{Q}.lora_A.weight": torch.ones(4, 16)})),
        f"  - {Q}.lora_A.weight: belongs to LoRA, which the configuration does not name",
    ),
    "a mask of another length": (
        say(rank_pattern={f"{Q}.lora_E": [True] * 3}),
        f"{C}rank_pattern: has 3 entries for '{Q}', and there were 4 directions at the start",
    ),
    "a mask of a layer that is not adapted": (
        say(rank_pattern={"model.layers.0.self_attn.k_proj.lora_E": [True] * 4}),
        f"{C}rank_pattern: is about 'model.layers.0.self_attn.k_proj', which is not adapted",
    ),
    "a mask that leaves less than there is": (
        say(rank_pattern={f"{Q}.lora_E": [True, False, False, True]}),
        f"  - {Q}.lora_A: has the shape [4, 16], expected [2, 16]\n"
        f"  - {Q}.lora_B: has the shape [16, 4], expected [16, 2]\n"
        f"  - {Q}.lora_E: has the shape [4, 1], expected [2, 1]",
    ),
    "a mask of numbers": (
        say(rank_pattern={f"{Q}.lora_E": [1, 1, 1, 0]}),
        f"{C}rank_pattern: has [1, 1, 1, 0] for '{Q}.lora_E'; an entry is a module's .lora_E, and true and false",
    ),
    "a LoRA's pattern of ranks": (
        say(rank_pattern={"q_proj": 2}),
        f"{C}rank_pattern: has 2 for 'q_proj'; an entry is a module's .lora_E, and true and false",
    ),
    "no rank": (
        say(init_r=0),
        f"{C}init_r: is 0; it takes a whole number from 1 to 65,536",
    ),
    "a target that is a text": (say(target_r="8"), f"{C}target_r: is '8'; it takes a whole number from 1 to 65,536"),
    "steps below zero": (say(tinit=-1), f"{C}tinit: is -1; it takes a whole number of at least 0"),
    "a penalty below zero": (
        say(orth_reg_weight=-0.5),
        f"{C}orth_reg_weight: is -0.5; it takes a finite number of at least 0",
    ),
    "an average of everything": (say(beta1=1.0), f"{C}beta1: is 1.0; it takes a number between 0 and 1"),
    "no length": (say(total_step=None), f"{C}total_step: is null; it takes a whole number of at least 1"),
    "magnitudes": (say(use_dora=True), f"{C}use_dora: is true: PEFT's AdaLoRA has no magnitudes"),
    "an embedding": (
        say(target_modules=["q_proj", "embed_tokens"]),
        "  - model.embed_tokens: is of kind embedding, which PEFT's AdaLoRA never adapts",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD)
def test_a_bad_adalora_of_peft_is_refused(spoil: Any, message: str, tmp_path: Path) -> None:
    saved_by_peft(LLAMA, tmp_path, target_modules=["q_proj"])
    spoil(tmp_path)
    model = LLAMA.model()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(FileError) as caught:
        lorary.load(model, tmp_path)
    assert str(caught.value) == f"cannot load the adapter {str(tmp_path)!r}\n{message}"
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_a_target_above_the_start_asks_for_nothing(tmp_path: Path) -> None:
    """PEFT's default target is 8, whatever the start is."""
    theirs = saved_by_peft(LLAMA, tmp_path, target_modules=["q_proj"], target_r=8)
    model = lorary.load(LLAMA.model(), tmp_path)
    close(outputs(model), theirs)
    (budget, _) = lorary.Adapter.of(model).method.rules
    assert isinstance(budget, RankBudget)
    assert budget.target == 4


def test_without_a_model_the_shapes_tell_the_sites(tmp_path: Path) -> None:
    theirs = saved_by_peft(LLAMA, tmp_path, LEFT)
    adapter = lorary.load_adapter(tmp_path)
    assert {p.site.kind for p in adapter.sites} == {"linear"}
    close(outputs(lorary.switch(LLAMA.model(), adapter)), theirs)
