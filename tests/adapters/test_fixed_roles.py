"""What a plan or a rule has given beside what trains: O-LoRA's earlier tasks, Delta-LoRA's product, written weights."""

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
from lorary.adapters import AdapterWarning, export_peft
from lorary.errors import FileError
from tests.adapters.models import BASES, Base, by_peft, close, fill, outputs, same
from tests.adapters.peft.test_export import refused

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
LLAMA, GPT2, _, CONV = BASES
SITES: dict[str, tuple[Base, list[str]]] = {
    "Llama": (LLAMA, list(LLAMA.targets)),
    "GPT-2": (GPT2, list(GPT2.targets)),
    "projections of a fused weight": (GPT2, ["c_attn[q,v]", "c_fc"]),
    "convolutions": (CONV, ["conv1", "conv2"]),
    "embedding": (LLAMA, ["embed_tokens", "q_proj"]),
}


def after(base: Base, targets: list[str], *names: str, ranks: tuple[int, ...] = (2, 1, 2), **options: Any) -> nn.Module:
    """The base with one task of O-LoRA after the other on it, each of a rank of its own."""
    past: list[lorary.Adapter] = []
    for r in ranks:
        model = base.model()
        method = lorary.method("o-lora", *names, r=r, alpha=6, **options)
        lorary.attach(model, lorary.plan(model, method, targets, after=past[-1:]), seed=r)
        fill(p for n, p in model.named_parameters() if ".params." in n and p.requires_grad)
        past.append(lorary.Adapter.of(model))
    return model.eval()


def delta(base: Base, targets: list[str], **options: Any) -> nn.Module:
    """The base with a filled Delta-LoRA on it, as after step K."""
    model = base.model()
    lorary.attach(model, lorary.plan(model, lorary.method("delta-lora", r=4, alpha=6, **options), targets))
    fill(p for n, p in model.named_parameters() if ".params." in n)
    for name, p in model.named_parameters():
        if name.endswith(".params.lam"):
            p.data.fill_(2.0)
    return model.eval()


@pytest.mark.parametrize(("base", "targets"), SITES.values(), ids=SITES)
def test_tasks_are_one_lora_for_peft(base: Base, targets: list[str], tmp_path: Path) -> None:
    model = after(base, targets)
    expected = outputs(model)
    lorary.save(model, tmp_path / "a")
    close(by_peft(base, tmp_path / "a"), expected)
    adapter = lorary.Adapter.of(model)
    read = lorary.load_adapter(tmp_path / "a")
    same(read, adapter)
    past = (4, 2) if adapter.sites[0].site.parts else (2, 1)
    assert getattr(adapter.sites[0].delta, "past", None) == past
    assert torch.equal(outputs(lorary.load(base.model(), tmp_path / "a")), expected)
    export_peft(adapter, tmp_path / "b")
    close(by_peft(base, tmp_path / "b"), expected)
    close(outputs(lorary.load(base.model(), tmp_path / "b")), expected)
    weights = "adapter_model.safetensors"
    assert (tmp_path / "a" / weights).read_bytes() == (tmp_path / "b" / weights).read_bytes()


def test_a_rank_stabilised_task_after_others(tmp_path: Path) -> None:
    model = after(LLAMA, ["q_proj"], "rslora", ranks=(4, 4))
    lorary.save(model, tmp_path)
    words = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (words["use_rslora"], words["r"], words["rank_pattern"]) == (True, 8, {})
    close(by_peft(LLAMA, tmp_path), outputs(model))
    same(lorary.load_adapter(tmp_path), lorary.Adapter.of(model))


def test_a_first_task_is_a_lora(tmp_path: Path) -> None:
    model = after(LLAMA, ["q_proj"], ranks=(4,))
    lorary.save(model, tmp_path)
    words = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (words["r"], words["lora_alpha"]) == (4, 6)
    close(by_peft(LLAMA, tmp_path), outputs(model))
    same(lorary.load_adapter(tmp_path), lorary.Adapter.of(model))


def test_a_loaded_past_is_the_past_of_the_next_task(tmp_path: Path) -> None:
    """Saved and read between the tasks, nothing changes."""
    first = after(LLAMA, ["q_proj"], ranks=(4, 2))
    lorary.save(first, tmp_path)
    model = LLAMA.model()
    method = lorary.method("o-lora", r=3, alpha=6)
    plan = lorary.plan(model, method, ["q_proj"], after=[lorary.load_adapter(tmp_path)])
    other = lorary.plan(model, method, ["q_proj"], after=[lorary.Adapter.of(first)])
    assert plan == other
    assert plan.fixed_tensors.keys() == other.fixed_tensors.keys()
    for name, roles in plan.fixed_tensors.items():
        assert all(torch.equal(t, other.fixed_tensors[name][role]) for role, t in roles.items())


def test_tasks_of_two_precisions_keep_their_own(tmp_path: Path) -> None:
    adapter = lorary.Adapter.of(after(LLAMA, ["q_proj"], ranks=(4, 2)))
    tensors = {
        name: {role: t.bfloat16() if role.endswith("_past") else t for role, t in roles.items()}
        for name, roles in adapter.tensors.items()
    }
    mixed = dataclasses.replace(adapter, tensors=tensors)
    lorary.save_adapter(mixed, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.safetensors", "lorary.json"]
    same(lorary.load_adapter(tmp_path), mixed)


@pytest.mark.parametrize(("base", "targets"), SITES.values(), ids=SITES)
@pytest.mark.parametrize("start", [-1, 5])
def test_a_weight_that_follows_is_a_lora_of_twice_the_rank(
    base: Base, targets: list[str], start: int, tmp_path: Path
) -> None:
    model = delta(base, targets, start=start)
    expected = outputs(model)
    lorary.save(model, tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["adapter.safetensors", "lorary.json"]
    adapter = lorary.Adapter.of(model)
    roles = {"A", "B", "A_K", "B_K", "lam"} if start > 0 else {"A", "B"}
    assert {name.rpartition("|")[2] for name in load_file(tmp_path / "a" / "adapter.safetensors")} == roles
    same(lorary.load_adapter(tmp_path / "a"), adapter)
    assert torch.equal(outputs(lorary.load(base.model(), tmp_path / "a")), expected)
    export_peft(adapter, tmp_path / "b")
    close(by_peft(base, tmp_path / "b"), expected)
    close(outputs(lorary.load(base.model(), tmp_path / "b")), expected)
    A = load_file(tmp_path / "b" / "adapter_model.safetensors")
    parts = max(1, len(adapter.sites[0].site.parts))
    ranks = {t.shape[0] for name, t in A.items() if name.endswith(("lora_A.weight", "lora_embedding_A"))}
    assert max(ranks) == 4 * parts * (2 if start > 0 else 1)


def written(base: Base = LLAMA) -> nn.Module:
    """The base with a filled Delta-LoRA that has written the weights beside it."""
    model = base.model()
    method = lorary.method("delta-lora", r=4, alpha=6, start=0, mode="paper")
    lorary.attach(model, lorary.plan(model, method, ["q_proj", "c_fc"][base is GPT2 :][:1]))
    fill(p for n, p in model.named_parameters() if ".params." in n)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, lorary.Adapted):
                layer.weight.add_(0.05)
    return model.eval()


@pytest.mark.parametrize("base", [LLAMA, GPT2], ids=str)
def test_written_weights_are_in_the_folder(base: Base, tmp_path: Path) -> None:
    model = written(base)
    adapter = lorary.Adapter.of(model)
    names = {f"{p.site.name}.weight" for p in adapter.sites}
    assert set(adapter.full) == names
    lorary.save(model, tmp_path)
    assert names < load_file(tmp_path / "adapter.safetensors").keys()
    same(lorary.load_adapter(tmp_path), adapter)
    again = lorary.load(base.model(), tmp_path)
    assert torch.equal(outputs(again), outputs(model))
    lorary.detach(again)
    assert torch.equal(outputs(again), outputs(base.model()))


@pytest.mark.parametrize("model", [None, LLAMA], ids=["alone", "with the model"])
def test_written_weights_have_no_words_in_peft(model: Base | None, tmp_path: Path) -> None:
    adapter = lorary.Adapter.of(written())
    what = "is an adapted weight that the adapter holds too, and PEFT never saves the weights that it adapts"
    assert refused(adapter, tmp_path / "a", model.model() if model else None) == "\n".join(
        f"  - model.layers.{i}.self_attn.q_proj.weight: {what}\n      hint: merge the adapter, and save the model"
        for i in (0, 1)
    )


def test_before_the_weight_follows_its_product_is_zero(tmp_path: Path) -> None:
    model = delta(LLAMA, ["q_proj"], start=5)
    for name, p in model.named_parameters():
        if name.endswith((".params.A_K", ".params.B_K", ".params.lam")):
            p.data.zero_()
    lorary.save(model, tmp_path)
    same(lorary.load_adapter(tmp_path), lorary.Adapter.of(model))
    close(outputs(lorary.load(LLAMA.model(), tmp_path)), outputs(model))


def test_an_earlier_task_alone_is_something(tmp_path: Path) -> None:
    """A task that has not moved yet, after one that has, does not do nothing."""
    model = LLAMA.model()
    past = lorary.Adapter.of(after(LLAMA, ["q_proj"], ranks=(4,)))
    lorary.attach(model, lorary.plan(model, lorary.method("o-lora", r=2), ["q_proj"], after=[past]))
    lorary.save(model.eval(), tmp_path / "a")
    assert lorary.load_adapter(tmp_path / "a").notes == ()
    close(by_peft(LLAMA, tmp_path / "a"), outputs(model))
    alone = LLAMA.model()
    lorary.attach(alone, lorary.plan(alone, lorary.method("o-lora", r=2), ["q_proj"]))
    lorary.save(alone, tmp_path / "b")
    with pytest.warns(AdapterWarning, match="this adapter changes nothing"):
        lorary.load_adapter(tmp_path / "b")


def test_a_past_beyond_the_tensors_is_refused(tmp_path: Path) -> None:
    lorary.save(after(LLAMA, ["q_proj"], ranks=(4, 2)), tmp_path)
    record = json.loads((tmp_path / "lorary.json").read_text())
    for site in record["sites"]:
        site["past"] = [5]
    (tmp_path / "lorary.json").write_text(json.dumps(record))
    with pytest.raises(FileError) as caught:
        lorary.load_adapter(tmp_path)
    assert str(caught.value).splitlines()[1:] == [
        f"  - model.layers.{i}.self_attn.q_proj.lora_{role}.weight: has the shape {found}, expected {wanted}"
        for i in (0, 1)
        for role, found, wanted in (("A", [6, 16], [7, 16]), ("B", [16, 6], [16, 7]))
    ]
