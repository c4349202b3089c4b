"""A PEFT type that comes from outside the package: one file has the method and its PEFT form, for both directions.

LoHa is a method that lorary does not have and PEFT does: its update is the elementwise product of two low-rank
matrices, which has rank r^2 and two factors of that rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorary
from lorary.adapters import export_peft
from lorary.adapters.adapter import Adapter
from lorary.adapters.peft import fields
from lorary.adapters.peft.config import PeftConfig
from lorary.adapters.peft.types import PEFT_TYPES, PeftType, register
from lorary.adapters.shared_tensors import SharedTensors
from lorary.errors import FileError
from lorary.methods.lora import Add, AlphaOverRank
from lorary.spec.fields import COUNT, FLAG
from lorary.spec.interfaces import COMPONENTS, Delta, Init, Shapes, Tensors, component
from lorary.spec.method import Method
from lorary.spec.site import Site
from tests.adapters.models import BASES, Base, by_peft, close, fill, outputs, same

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
LLAMA, _, BERT, CONV = BASES
Q = "model.layers.0.self_attn.q_proj"
ROLES = ("B1", "A1", "B2", "A2")


@dataclass(frozen=True)
class Hadamard(Delta):
    """(B1 A1) * (B2 A2), whose factors are all products of a direction of one with a direction of the other."""

    r: int = field(metadata=COUNT)

    roles = frozenset(ROLES)

    def shapes(self, site: Site) -> Shapes:
        return {role: (site.out_features, self.r) if role[0] == "B" else (self.r, site.in_features) for role in ROLES}

    def factors(self, site: Site, p: Tensors) -> tuple[Tensor, Tensor]:
        B = (p["B1"][:, :, None] * p["B2"][:, None, :]).flatten(1)
        return B, (p["A1"][:, None, :] * p["A2"][None, :, :]).flatten(0, 1)


@dataclass(frozen=True)
class HadamardStart(Init):
    """B1, A1, B2 ~ N(0, 1), A2 = 0."""

    fills = frozenset(ROLES)

    def zeros(self, site: Site) -> frozenset[str]:
        return frozenset({"A2"})

    def __call__(self, p: Tensors, W: Tensor, site: Site, scale: float, generator: torch.Generator) -> None:
        for role in ROLES[:3]:
            torch.nn.init.normal_(p[role], generator=generator)
        torch.nn.init.zeros_(p["A2"])


class LoHa(PeftType):
    """PEFT's LOHA: <site>.hada_w1_a (out, r), hada_w1_b (r, in), and the same with w2."""

    name, title = "LOHA", "LoHa"
    methods = ((Hadamard, Add),)
    fields = {  # noqa: RUF012 (never written)
        **{key: f for key, f in fields.SHARED.items() if key not in ("bias", "fan_in_fan_out")},
        "exclude_modules": fields.EXCLUDE,
        "r": fields.field(fields.RANK, 8),
        "alpha": fields.field(fields.ALPHA, 8.0),
        "rank_dropout": fields.unsupported("a dropout of ranks is not supported"),
        "module_dropout": fields.unsupported("a dropout of modules is not supported"),
        "use_effective_conv2d": fields.field(FLAG, False),
        "rank_pattern": fields.by_pattern(fields.field(fields.RANK)),
        "alpha_pattern": fields.by_pattern(fields.field(fields.ALPHA, 8.0)),
        "init_weights": fields.field(FLAG, True),
    }
    leaves = {"hada_w1_a": "B1", "hada_w1_b": "A1", "hada_w2_a": "B2", "hada_w2_b": "A2"}  # noqa: RUF012
    kinds = ("linear",)

    def to_method(self, config: PeftConfig, site: str = "") -> Method:
        return Method(Hadamard(config["r"]), HadamardStart(), AlphaOverRank(config["alpha"]), Add())

    def peft_incompatibilities(self, adapter: Adapter, shared: SharedTensors) -> list[str]:
        one = len({p.method for p in adapter.sites}) == 1 and type(adapter.sites[0].method.scale) is AlphaOverRank
        return [] if one else ["one rank and one alpha are written here"]

    def from_adapter(self, adapter: Adapter, shared: SharedTensors) -> dict[str, Any]:
        return {"r": adapter.sites[0].r, "alpha": adapter.sites[0].alpha}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """As importing a file of one's own would leave it; taken back, for other tests list what there is."""
    component(Hadamard), component(HadamardStart)
    register(LoHa())
    yield
    del PEFT_TYPES["LOHA"], COMPONENTS["Hadamard"], COMPONENTS["HadamardStart"]


def loha(base: Base, targets: Any = None, **words: Any) -> torch.nn.Module:
    """The base with a filled LoHa on it."""
    model = base.model()
    method = Method(Hadamard(3), HadamardStart(), AlphaOverRank(60.0), Add(), **words)
    lorary.attach(model, lorary.plan(model, method, targets or base.targets))
    fill(p for p in model.parameters() if p.requires_grad)
    return model.eval()


def saved_by_peft(folder: Path, **words: Any) -> Tensor:
    """Saves a LoHa with PEFT; returns PEFT's outputs."""
    words = {"r": 3, "alpha": 60, "target_modules": list(LLAMA.targets), "init_weights": False} | words
    model = get_peft_model(LLAMA.model(), LoHaConfig(**words)).eval()
    fill(p for n, p in model.named_parameters() if "hada_" in n)
    model.save_pretrained(str(folder))
    return outputs(model)


@pytest.mark.parametrize("base", [LLAMA, BERT], ids=str)
def test_saved_here_loads_in_peft(base: Base, tmp_path: Path) -> None:
    model = loha(base)
    expected = outputs(model)
    assert (outputs(base.model()) - expected).abs().max() > 1e-3, "the adapter must change something"
    lorary.save(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["alpha"]) == ("LOHA", 3, 60)
    assert not {"bias", "fan_in_fan_out"} & config.keys(), "PEFT's LoHa has no such fields"
    close(by_peft(base, tmp_path), expected)
    same(lorary.load_adapter(tmp_path), lorary.Adapter.of(model))
    (tmp_path / "lorary.json").unlink()
    close(outputs(lorary.load(base.model(), tmp_path)), expected)


def test_saved_by_peft_loads_here(tmp_path: Path) -> None:
    theirs = saved_by_peft(tmp_path)
    model = lorary.load(LLAMA.model(), tmp_path)
    close(outputs(model), theirs)
    assert (theirs - outputs(LLAMA.model())).abs().max() > 1e-3
    assert lorary.Adapter.of(model).method == Method(Hadamard(3), HadamardStart(), AlphaOverRank(60.0), Add())
    lorary.save(model, tmp_path / "again")
    close(outputs(PeftModel.from_pretrained(LLAMA.model(), str(tmp_path / "again")).eval()), theirs)


def test_exported_it_is_a_plain_lora(tmp_path: Path) -> None:
    model = loha(LLAMA)
    export_peft(lorary.Adapter.of(model), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 9)
    close(by_peft(LLAMA, tmp_path), outputs(model))


NOT_PEFTS: dict[str, Any] = {
    "a field that the type lacks": lambda: loha(BERT, full=("bias",)),
    "a kind of layer that the type lacks": lambda: loha(CONV),
}


@pytest.mark.parametrize("make", NOT_PEFTS.values(), ids=NOT_PEFTS)
def test_what_the_type_cannot_express_is_saved_in_our_own_format(make: Any, tmp_path: Path) -> None:
    model = make()
    lorary.save(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.safetensors", "lorary.json"]
    same(lorary.load_adapter(tmp_path), lorary.Adapter.of(model))


def refusal(folder: Path, model: torch.nn.Module | None = None) -> str:
    with pytest.raises(FileError) as caught:
        lorary.load(model, folder) if model is not None else lorary.load_adapter(folder)
    headline, _, rest = str(caught.value).partition("\n")
    assert headline == f"cannot load the adapter {str(folder)!r}"
    return rest


def test_its_own_checks_are_made(tmp_path: Path) -> None:
    saved_by_peft(tmp_path, module_dropout=0.5)
    what = "is 0.5: a dropout of modules is not supported"
    assert refusal(tmp_path, LLAMA.model()) == f"  - adapter_config.json: module_dropout: {what}"


def test_without_factors_to_tell_the_layers_it_needs_the_model(tmp_path: Path) -> None:
    saved_by_peft(tmp_path)
    assert refusal(tmp_path) == (
        "  - the shapes of the layers that PEFT's LoHa adapts are known only to the model\n"
        "      hint: read it onto its base: lorary.load(model, folder)"
    )


@pytest.mark.parametrize("inside", ["LOHA", "LORA"])
def test_its_tensors_in_another_types_file_are_told_from_strangers(inside: str, tmp_path: Path) -> None:
    """And another type's tensors in its own file."""
    leaf = {"LOHA": "lora_A.weight", "LORA": "hada_w1_a"}[inside]
    if inside == "LOHA":
        saved_by_peft(tmp_path)
    else:
        export_peft(lorary.Adapter.of(loha(LLAMA)), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file(load_file(path) | {f"base_model.model.{Q}.{leaf}": torch.ones(3, 16)}, path)
    other = "LoRA" if inside == "LOHA" else "LoHa"
    what = f"  - {Q}.{leaf}: belongs to {other}, which the configuration does not name"
    assert refusal(tmp_path, LLAMA.model()) == what


def test_two_types_of_one_name_or_method_are_refused() -> None:
    class Named(LoHa):
        methods = ()

    class Same(LoHa):
        name = "ANOTHER"

    for other in (Named(), Same()):
        with pytest.raises(TypeError, match="the PEFT type LOHA has the name or a method of"):
            register(other)
    assert [*PEFT_TYPES] == ["LORA", "ADALORA", "VERA", "IA3", "HIRA", "MISS", "TRAINABLE_TOKENS", "LOHA"]


def test_pefts_files_of_a_method_that_it_lacks_are_refused(tmp_path: Path) -> None:
    """A record that lies about which of the two formats its tensors are in."""
    lorary.save(loha(LLAMA), tmp_path)
    del PEFT_TYPES["LOHA"]
    try:
        what = "adapter_model.safetensors is listed, but no PEFT adapter type has the tensors of this method"
        assert refusal(tmp_path) == f"  - lorary.json: files: {what}"
    finally:
        register(LoHa())
