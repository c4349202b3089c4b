"""Layers that train one set of tensors (LoRA-drop): once in our file, at every site in PEFT's, one tensor when read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lorary
from lorary.adapters import export_peft
from lorary.errors import FileError
from tests.adapters.hostile import PREFIX, Spoil, Spoiled, drop, note, put, refusal
from tests.adapters.models import BASES, Base, by_peft, close, fill, outputs, same

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
LLAMA, GPT2, _, CONV = BASES
Q0, Q1 = (f"model.layers.{i}.self_attn.q_proj" for i in (0, 1))
V0 = "model.layers.0.self_attn.v_proj"


def shared(base: Base = LLAMA, *names: str, **options: Any) -> nn.Module:
    """The base with a filled adapter whose layers of one kind share what they learn; but v_proj, which does not."""
    model = base.model()
    method = lorary.method(*(names or ("lora",)), **({"r": 4, "alpha": 6} | options))
    plan = lorary.plan(model, method, base.targets)
    kinds = [p.site.name.rpartition(".")[2] for p in plan.sites]
    placed = tuple(
        dataclasses.replace(p, share="" if kind == "v_proj" else f"{kind} 2")
        for p, kind in zip(plan.sites, kinds, strict=True)
    )
    lorary.attach(model, dataclasses.replace(plan, sites=placed))
    fill(p for n, p in model.named_parameters() if ".params." in n)
    return model.eval()


def one_tensor(adapter: lorary.Adapter) -> None:
    """Sites of one share have the very same tensors, and no others have."""
    held: dict[int, set[str]] = {}
    for p in adapter.sites:
        for t in adapter.tensors[p.site.name].values():
            held.setdefault(id(t), set()).add(p.share or p.site.name)
    assert all(len(names) == 1 for names in held.values())
    shares = {p.share or p.site.name for p in adapter.sites}
    roles = len(next(iter(adapter.tensors.values())))
    assert len(held) == roles * len(shares)


def peft_like(base: Base = LLAMA) -> nn.Module:
    return shared(base)


def ours() -> nn.Module:
    """Of a method that PEFT has not."""
    return shared(LLAMA, "melora")


@pytest.mark.parametrize("base", [LLAMA, GPT2, CONV], ids=str)
def test_in_pefts_files_every_site_has_a_copy(base: Base, tmp_path: Path) -> None:
    model = shared(base)
    adapter = lorary.Adapter.of(model)
    lorary.save(model, tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 2 * len(adapter.sites)
    close(by_peft(base, tmp_path), outputs(model))
    read = lorary.load_adapter(tmp_path)
    same(read, adapter)
    one_tensor(read)
    assert read.size == adapter.size
    again = lorary.load(base.model(), tmp_path, trainable=True)
    assert torch.equal(outputs(again), outputs(model))
    trained = sum(p.numel() for p in again.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    (tmp_path / "lorary.json").unlink()
    close(outputs(lorary.load(base.model(), tmp_path)), outputs(model))


@pytest.mark.parametrize("names", [("melora",), ("multilora",), ("adalora",), ("delta-lora",)], ids="+".join)
def test_in_our_own_file_they_are_once(names: tuple[str, ...], tmp_path: Path) -> None:
    options: dict[str, Any] = {"target": 2} if names == ("adalora",) else {}
    model = shared(LLAMA, *names, **options)
    adapter = lorary.Adapter.of(model)
    if names == ("adalora",):  # PEFT has it, but not with a rank for one site alone
        first = next(p for p in adapter.sites if not p.share)
        other = first.method.replace(scale=lorary.method("rslora", r=4).scale)
        placed = tuple(dataclasses.replace(p, method=other) if p is first else p for p in adapter.sites)
        adapter = dataclasses.replace(adapter, sites=placed)
    lorary.save_adapter(adapter, tmp_path)
    names_in_file = load_file(tmp_path / "adapter.safetensors").keys()
    roles = set(adapter.tensors[Q0])
    assert {name for name in names_in_file if "q_proj" in name} == {f"|q_proj 2|{role}" for role in roles}
    assert {name for name in names_in_file if "v_proj" in name} == {
        f"model.layers.{i}.self_attn.v_proj|{role}" for i in (0, 1) for role in roles
    }
    read = lorary.load_adapter(tmp_path)
    same(read, adapter)
    one_tensor(read)
    records = json.loads((tmp_path / "lorary.json").read_text())["sites"]
    assert [r.get("share") for r in records if r["name"] in (Q0, V0)] == ["q_proj 2", None]
    lorary.save_adapter(adapter, tmp_path / "again")
    lorary.save_adapter(read, tmp_path / "read")
    for path in (tmp_path / "read").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_exported_every_site_has_a_copy(tmp_path: Path) -> None:
    model = ours()
    export_peft(lorary.Adapter.of(model), tmp_path)
    close(by_peft(LLAMA, tmp_path), outputs(model))


# --- not written -----------------------------------------------------------------------------------------------


def unsaved(adapter: lorary.Adapter, folder: Path) -> str:
    with pytest.raises(FileError) as caught:
        lorary.save_adapter(adapter, folder)
    headline, _, rest = str(caught.value).partition("\n")
    assert headline == f"cannot save an adapter to {str(folder)!r}"
    assert not folder.exists()
    return rest


def changed(adapter: lorary.Adapter, **roles: Tensor) -> lorary.Adapter:
    """With other tensors at the second layer's q_proj."""
    tensors = {name: dict(own) for name, own in adapter.tensors.items()}
    tensors[Q1] |= roles
    return dataclasses.replace(adapter, tensors=tensors)


def replaced(adapter: lorary.Adapter, name: str, **words: Any) -> lorary.Adapter:
    placed = tuple(dataclasses.replace(p, **words) if p.site.name == name else p for p in adapter.sites)
    return dataclasses.replace(adapter, sites=placed)


def test_sites_that_have_not_the_same_cannot_be_saved(tmp_path: Path) -> None:
    adapter = lorary.Adapter.of(shared())
    A = adapter.tensors[Q1]["A"]
    line = f"  - {Q1}: its A differs from that of {Q0}, to which it is tied"
    for other in (A + 1, A.bfloat16()):
        assert unsaved(changed(adapter, A=other), tmp_path / "a") == line
    lorary.save_adapter(changed(adapter, A=A.clone()), tmp_path / "a")
    same(lorary.load_adapter(tmp_path / "a"), adapter)


def test_sites_that_cannot_share_cannot_be_saved(tmp_path: Path) -> None:
    adapter = lorary.Adapter.of(shared())
    what = f"{V0}: shares its tensors with {Q0}, which has other shapes or another method"
    assert unsaved(replaced(adapter, V0, share="q_proj 2"), tmp_path / "a") == (
        f"  - {what}\n      hint: give it tensors of its own"
    )
    what = "`share` is 'a|b'; it is a name of printable ASCII without |"
    assert unsaved(replaced(adapter, V0, share="a|b"), tmp_path / "a") == f"  - {V0}: {what}"


# --- not read --------------------------------------------------------------------------------------------------


def site(name: str, /, **words: Any) -> Spoil:
    return note(lambda r: next(s for s in r["sites"] if s["name"] == name).update(words))


NAME = "it is a name of printable ASCII without |"
BAD: list[tuple[str, Callable[[], nn.Module], Spoil, str]] = [
    ("a number", ours, site(Q0, share=3), f"  - lorary.json: sites[0]: `share` is 3; {NAME}"),
    ("nothing", ours, site(Q0, share=None), f"  - lorary.json: sites[0]: `share` is null; {NAME}"),
    ("an empty name", ours, site(Q0, share=""), f"  - lorary.json: sites[0]: `share` is ''; {NAME}"),
    ("a list", ours, site(Q0, share=[Q1]), f'  - lorary.json: sites[0]: `share` is ["{Q1}"]; {NAME}'),
    ("true", ours, site(Q0, share=True), f"  - lorary.json: sites[0]: `share` is true; {NAME}"),
    ("a bar", ours, site(Q0, share="a|b"), f"  - lorary.json: sites[0]: `share` is 'a|b'; {NAME}"),
    ("a path", ours, site(Q0, share="../a"), f"  - lorary.json: sites[0]: `share` is '../a'; {NAME}"),
    ("a letter of another script", ours, site(Q0, share="ä"), f"  - lorary.json: sites[0]: `share` is 'ä'; {NAME}"),
    (
        "other shapes",
        ours,
        site(V0, share="q_proj 2"),
        f"  - lorary.json: {V0}: shares its tensors with {Q0}, which has other shapes or another method",
    ),
    (
        "another method",
        ours,
        site(Q1, alpha=7),
        f"  - lorary.json: {Q1}: shares its tensors with {Q0}, which has other shapes or another method",
    ),
    (
        "a start in each layer's weight",
        ours,
        note(
            lambda r: r["method"].update(
                delta={"component": "LowRank", "r": 4}, init={"component": "SVDInit", "niter": 4}
            )
        ),
        "\n".join(
            f"  - lorary.json: model.layers.{i}.{name}: shares its tensors, and SVDInit starts at the weight of "
            "each layer"
            for i in (0, 1)
            for name in ("self_attn.q_proj", "mlp.down_proj")
        ),
    ),
    (
        "another name",
        ours,
        site(Q1, share="k_proj 2"),
        "  - '|k_proj 2|A': is missing\n  - '|k_proj 2|B': is missing",
    ),
    (
        "a name that nobody has",
        ours,
        note(lambda r: [s.pop("share", None) for s in r["sites"] if s["name"] in (Q0, Q1)]),
        "\n".join(f"  - {q}|{role}: is missing" for q in (Q0, Q1) for role in "AB")
        + "\n"
        + "\n".join(f"  - '|q_proj 2|{role}': belongs to no site and no parameter of the record" for role in "AB"),
    ),
    ("a tensor missing", ours, drop("|q_proj 2|A"), "  - '|q_proj 2|A': is missing"),
    (
        "a tensor of one site's own",
        ours,
        put(f"{Q1}|A", 8, 8),
        f"  - {Q1}|A: belongs to no site and no parameter of the record",
    ),
    (
        "another shape",
        ours,
        put("|q_proj 2|A", 8, 9),
        "  - '|q_proj 2|A': has the shape [8, 9], expected [8, 8]",
    ),
    (
        "NaN",
        ours,
        put("|q_proj 2|A", 8, 8, value=float("nan")),
        "  - '|q_proj 2|A': 64 of 64 values are NaN or infinite, the first at [0, 0]",
    ),
    (
        "a copy that differs",
        shared,
        put(PREFIX + "1.self_attn.q_proj.lora_A.weight", 4, 16),
        f"  - adapter_model.safetensors: {Q1}: its A differs from that of {Q0}, to which it is tied",
    ),
    (
        "a copy missing",
        shared,
        drop(PREFIX + "1.self_attn.q_proj.lora_A.weight"),
        f"  - {Q1}.lora_A.weight: is missing",
    ),
    (
        "a module's name that begins with a bar",
        ours,
        site(Q0, name="|q_proj 2"),
        "  - lorary.json: '|q_proj 2': begins with |, like the names of shared tensors",
    ),
]


@pytest.mark.parametrize(("make", "spoil", "message"), [c[1:] for c in BAD], ids=[c[0] for c in BAD])
def test_a_bad_share_is_refused(make: Callable[[], nn.Module], spoil: Spoil, message: str, tmp_path: Path) -> None:
    spoiled = Spoiled(tmp_path / "adapter", native=True, make=make)
    spoil(spoiled)
    spoiled.sign()
    assert refusal(spoiled) == message


def test_a_missing_tensor_that_is_tolerated_is_zero_for_all_its_sites(tmp_path: Path) -> None:
    spoiled = Spoiled(tmp_path / "adapter", native=True, make=ours)
    drop("|q_proj 2|B")(spoiled)
    spoiled.sign()
    with pytest.warns(lorary.adapters.AdapterWarning, match=r"'\|q_proj 2\|B': is missing"):
        adapter = lorary.adapters.load_adapter(spoiled.folder, strict=False)
    one_tensor(adapter)
    assert not adapter.tensors[Q1]["B"].any()
