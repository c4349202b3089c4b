"""Every method that is a change B A of the unmodified weight is a plain LoRA for PEFT, and DoRA's kin a DoRA."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lorary
from lorary.adapters import export_peft
from lorary.adapters.peft import writer
from lorary.errors import FileError, MethodError
from tests import tiny
from tests.adapters import models
from tests.adapters.models import BASES, Base, adapted, by_peft, close, outputs, same
from tests.adapters.test_save_load import GROUPED

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT warns that it cannot merge biases that the base lacks
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer"),
]
LLAMA, GPT2, BERT, CONV = BASES

# the presets, and how many times its rank an adapter of them has as a plain LoRA
EXPORTED: dict[str, tuple[tuple[str, ...], int]] = {
    "PiSSA": (("pissa",), 2),
    "rsPiSSA": (("pissa", "rslora"), 2),
    "OLoRA": (("olora",), 2),
    "OLoRA frozen": (("olora", "lora-fa"), 2),
    "MELoRA": (("melora",), 2),
    "MultiLoRA": (("multilora",), 3),
    "VeRA": (("vera",), 1),
    "PiSSA and DoRA": (("pissa", "dora"), 2),
    "MELoRA and DoRA": (("melora", "dora"), 2),
    "VeRA and DoRA": (("vera", "dora"), 1),
}


def made(base: Base, names: tuple[str, ...], **options: Any) -> nn.Module:
    if "melora" in names and base is CONV:
        options["targets"] = ["conv1", "conv2"]  # two blocks do not divide the head's five outputs
    if "vera" in names:
        return models.vera(base, *(n for n in names if n != "vera"), r=4, **options)
    return adapted(base, *names, **options)


@pytest.mark.parametrize(("names", "times"), EXPORTED.values(), ids=EXPORTED)
@pytest.mark.parametrize("base", BASES, ids=str)
def test_exported_it_is_the_same_function_of_the_unmodified_base(
    base: Base, names: tuple[str, ...], times: int, tmp_path: Path
) -> None:
    model = made(base, names)
    expected = outputs(model)
    assert (outputs(base.model()) - expected).abs().max() > 1e-3, "the adapter must change something"
    export_peft(lorary.Adapter.of(model), tmp_path)
    words = json.loads((tmp_path / "adapter_config.json").read_text())
    assert words["r"] == times * 4
    assert (words["use_dora"], words["init_lora_weights"], words["use_rslora"]) == ("dora" in names, True, False)
    close(by_peft(base, tmp_path), expected)
    close(outputs(lorary.load(base.model(), tmp_path)), expected)
    close(outputs(lorary.merge(lorary.load(base.model(), tmp_path))), expected)


@pytest.mark.parametrize("names", [("pissa",), ("olora", "dora"), ("melora",), ("multilora",), ("vera",)], ids="+".join)
def test_saved_it_keeps_its_own_tensors(names: tuple[str, ...], tmp_path: Path) -> None:
    """PEFT has no such adapter, or (VeRA) one with these very tensors; nothing is turned into a LoRA unasked."""
    model = made(LLAMA, names)
    lorary.save(model, tmp_path)
    same(lorary.load_adapter(tmp_path), lorary.Adapter.of(model))
    assert (tmp_path / "adapter_config.json").exists() == (names == ("vera",))
    loaded = lorary.load(LLAMA.model(), tmp_path)
    assert torch.equal(outputs(loaded), outputs(model))
    lorary.detach(loaded)
    assert torch.equal(outputs(loaded), outputs(LLAMA.model()))


def test_each_part_of_a_fused_weight_is_exported(tmp_path: Path) -> None:
    for names in (("pissa",), ("multilora",), ("vera",), ("dora",)):
        model = made(GPT2, names, targets=["c_attn[q,v]"])
        export_peft(lorary.Adapter.of(model), tmp_path / names[0])
        close(by_peft(GPT2, tmp_path / names[0]), outputs(model))


def test_a_site_with_a_method_of_its_own_is_saved_and_exported(tmp_path: Path) -> None:
    """MELoRA in one layer, PiSSA in another."""
    melora, pissa = (lorary.method(name, r=4, alpha=6) for name in ("melora", "pissa"))
    base = LLAMA.model()
    planned = lorary.plan(base, melora, targets=["q_proj", "v_proj"])
    own = (planned.sites[0], *(dataclasses.replace(p, method=pissa) for p in planned.sites[1:]))
    lorary.attach(base, dataclasses.replace(planned, sites=own))
    models.fill(p for n, p in base.named_parameters() if ".params." in n)
    adapter = lorary.Adapter.of(base.eval())
    lorary.save(base, tmp_path / "a")
    record = json.loads((tmp_path / "a" / "lorary.json").read_text())
    assert ["method" in site for site in record["sites"]] == [False, True, True, True]
    same(lorary.load_adapter(tmp_path / "a"), adapter)
    export_peft(adapter, tmp_path / "b")
    close(by_peft(LLAMA, tmp_path / "b"), outputs(base))


def test_a_site_whose_scale_has_an_alpha_that_the_others_lack_is_saved(tmp_path: Path) -> None:
    """O-LoRA after another task in one layer, VeRA in the others."""
    base = LLAMA.model()
    vera, task = lorary.method("vera", r=4), lorary.method("o-lora", r=4)
    planned = lorary.plan(base, vera, targets=["q_proj"])
    own = (planned.sites[0], dataclasses.replace(planned.sites[1], method=task))
    lorary.attach(base, dataclasses.replace(planned, sites=own))
    models.fill(p for n, p in base.named_parameters() if ".params." in n)
    adapter = lorary.Adapter.of(base.eval())
    lorary.save_adapter(adapter, tmp_path)
    same(lorary.load_adapter(tmp_path), adapter)


def test_sixteen_bit_starts_stay_sixteen_bits(tmp_path: Path) -> None:
    adapter = lorary.Adapter.of(adapted(LLAMA, "pissa"))
    half = {site: {role: t.bfloat16() for role, t in roles.items()} for site, roles in adapter.tensors.items()}
    halved = lorary.Adapter(adapter.method, adapter.sites, half, base=adapter.base)
    lorary.save_adapter(halved, tmp_path)
    same(lorary.load_adapter(tmp_path), halved)


def test_an_adapter_that_has_not_moved_is_told_to_do_nothing(tmp_path: Path) -> None:
    """The start of PiSSA is not zero, but its update is."""
    model = LLAMA.model()
    lorary.attach(model, lorary.plan(model, lorary.method("pissa", r=4), targets=["q_proj"]))
    lorary.save(model, tmp_path)
    with pytest.warns(lorary.adapters.AdapterWarning, match="this adapter changes nothing"):
        lorary.load_adapter(tmp_path)


def test_magnitudes_alone_are_something(tmp_path: Path) -> None:
    """DoRA's B may be zero while its magnitudes have moved."""
    model = LLAMA.model()
    lorary.attach(model, lorary.plan(model, lorary.method("dora", r=4), targets=["q_proj"]))
    models.fill(p for n, p in model.named_parameters() if n.endswith(".params.m"))
    lorary.save(model, tmp_path)
    assert lorary.load_adapter(tmp_path).notes == ()
    close(by_peft(LLAMA, tmp_path), outputs(model.eval()))


# --- refused ---------------------------------------------------------------------------------------------------


def refused(adapter: lorary.Adapter, folder: Path, model: nn.Module | None = None) -> str:
    with pytest.raises(FileError) as caught:
        export_peft(adapter, folder, model=model)
    headline, _, rest = str(caught.value).partition("\n")
    assert headline == f"cannot export an adapter to {str(folder)!r} for PEFT"
    assert not folder.exists()
    return rest


def test_groups_are_refused(tmp_path: Path) -> None:
    what = "is a convolution with 4 groups: PEFT's LoRA of it does not equal a change of its weight"
    assert refused(lorary.Adapter.of(adapted(GROUPED, "pissa")), tmp_path / "a") == f"  - first: {what}"


def test_magnitudes_at_some_sites_are_refused(tmp_path: Path) -> None:
    base = LLAMA.model()
    planned = lorary.plan(base, lorary.method("dora", r=4), targets=["q_proj"])
    own = (planned.sites[0], dataclasses.replace(planned.sites[1], method=lorary.method("lora", r=4)))
    lorary.attach(base, dataclasses.replace(planned, sites=own))
    what = "some have DoRA's magnitudes and some not; PEFT's adapters have all or none"
    assert refused(lorary.Adapter.of(base), tmp_path / "a") == f"  - sites: {what}"
    lorary.save(base, tmp_path / "b")
    assert not (tmp_path / "b" / "adapter_config.json").exists()
    same(lorary.load_adapter(tmp_path / "b"), lorary.Adapter.of(base))


class Slides(nn.Module):
    """A convolution that PEFT's filters do not follow."""

    def __init__(self, **words: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        self.conv = nn.Conv1d(8, 6, 3, **words)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.conv(self.embed(tokens).transpose(1, 2)).mean(2)
        return out


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ({"dilation": 2}, "is a convolution of dilation (2,), which PEFT's LoRA leaves out"),
        (
            {"padding": 1, "padding_mode": "reflect"},
            "is a convolution with reflect padding, for which PEFT's LoRA pads with zeros",
        ),
    ],
    ids=["dilation", "reflect"],
)
@pytest.mark.parametrize("name", ["lora", "dora", "pissa"])
def test_filters_that_peft_slides_another_way_are_refused(
    name: str, words: dict[str, Any], what: str, tmp_path: Path
) -> None:
    base = Base("slides", lambda: Slides(**words), ("conv",), "", "")
    model = adapted(base, name)
    assert refused(lorary.Adapter.of(model), tmp_path / "a", model) == f"  - conv: {what}"
    lorary.save(model, tmp_path / "b")
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["adapter.safetensors", "lorary.json"]
    assert torch.equal(outputs(lorary.load(base.model(), tmp_path / "b")), outputs(model))


def test_a_dilated_adapter_of_peft_is_refused(tmp_path: Path) -> None:
    plain = Base("plain", Slides, ("conv",), "", "")
    export_peft(lorary.Adapter.of(adapted(plain)), tmp_path)
    assert "base_model.model.conv.lora_A.weight" in load_file(tmp_path / "adapter_model.safetensors")
    with pytest.raises(FileError) as caught:
        lorary.load(Slides(dilation=2), tmp_path)
    assert str(caught.value).splitlines()[1:3] == [
        "  - conv: is a convolution of dilation (2,), which PEFT's LoRA leaves out",
        "      hint: it can neither be merged nor read here",
    ]


# --- GLoRA -----------------------------------------------------------------------------------------------------


def glora(base: Base, **words: Any) -> nn.Module:
    """The base with a filled GLoRA on it, which has no alpha."""
    model = base.model()
    lorary.attach(model, lorary.plan(model, lorary.method("glora", **words), targets=base.targets))
    models.fill(p for n, p in model.named_parameters() if ".params." in n)
    return model.eval()


@pytest.mark.parametrize("words", [{}, {"A": "vector", "C": "vector", "D": "scalar"}, {"supernet": True}], ids=str)
@pytest.mark.parametrize("base", BASES, ids=str)
def test_all_terms_are_saved(base: Base, words: dict[str, Any], tmp_path: Path) -> None:
    model = glora(base, **words)
    lorary.save(model, tmp_path)
    same(lorary.load_adapter(tmp_path), lorary.Adapter.of(model))
    assert torch.equal(outputs(lorary.load(base.model(), tmp_path)), outputs(model))


def test_terms_that_only_add_are_a_lora(tmp_path: Path) -> None:
    model = glora(LLAMA, A="none", C="none", D="none", E="none")
    export_peft(lorary.Adapter.of(model), tmp_path)
    close(by_peft(LLAMA, tmp_path), outputs(model))


@pytest.mark.parametrize("words", [{"C": "none"}, {"E": "none"}], ids=str)
def test_a_shift_is_a_bias_beside_b(words: dict[str, Any], tmp_path: Path) -> None:
    model = glora(LLAMA, **({"A": "none", "D": "none"} | words))
    export_peft(lorary.Adapter.of(model), tmp_path, model=LLAMA.model())
    close(by_peft(LLAMA, tmp_path), outputs(model))


def test_a_gain_is_refused(tmp_path: Path) -> None:
    model = glora(LLAMA, A="vector", C="none", D="none", E="none")
    what = "its output has a gain, which PEFT's LoRA does not have"
    lines = [f"  - {name}: {what}" for name in lorary.Adapter.of(model).tensors]
    assert refused(lorary.Adapter.of(model), tmp_path / "a", LLAMA.model()) == "\n".join(lines)


def test_what_has_no_low_rank_form_is_refused(tmp_path: Path) -> None:
    adapter = lorary.Adapter.of(glora(LLAMA))
    with pytest.raises(MethodError, match="A is low-rank"):
        export_peft(adapter, tmp_path / "a", model=LLAMA.model())
    assert not (tmp_path / "a").exists()


def test_an_export_that_peft_would_read_otherwise_is_refused_with_the_sites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The written folder is read as PEFT reads it: here with a planted fault in the fields that name sites."""
    model = tiny.llama()
    lorary.attach(model, lorary.plan(model, tiny.LORA, ranks={"*down_proj": 3}))
    adapter = lorary.Adapter.of(tiny.shaken(model))
    peft_config = writer.peft_config

    def faulty(*arguments: Any) -> dict[str, Any]:
        config = peft_config(*arguments)
        return config | {"target_modules": ["down_proj", "q_proj", "norm"], "rank_pattern": {"down": 3}}

    monkeypatch.setattr(writer, "peft_config", faulty)
    with pytest.raises(lorary.FileError) as caught:
        export_peft(adapter, tmp_path / "a", model=tiny.llama())
    assert {(p.where, p.what) for p in caught.value.problems} == {
        (
            "model.layers.0.mlp.gate_proj and 9 more",
            "the configuration does not name it, and its tensors are left out",
        ),
        ("model.layers.0.mlp.down_proj and 1 more", "has the rank 3, and the configuration says 2"),
        (
            "model.layers.0.mlp.down_proj and 1 more",
            "PEFT would compute with the scale 4, and its own is 2.66667",
        ),
    }
    assert not (tmp_path / "a").exists()
