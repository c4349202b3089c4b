"""The comparison of a conversion: nothing of an adapter may be lost in the written folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorary
from lorary import Adapter
from lorary.adapters import save_adapter
from lorary.adapters.intake.convert import convert
from lorary.errors import FileError
from tests.adapters.models import BASES, adapted
from tests.experts import moe, shake

LLAMA = BASES[0]
NORM, HEAD = "model.norm.weight", "lm_head.weight"


def without_shift(adapter: Adapter) -> Adapter:
    """The trained biases beside B set to zero."""
    tensors = {site: roles | {"c": torch.zeros_like(roles["c"])} for site, roles in _copied(adapter).items()}
    return replace(adapter, tensors=tensors)


def without_bias(adapter: Adapter) -> Adapter:
    return _as_lora(adapter, "c")


def without_gain(adapter: Adapter) -> Adapter:
    return _as_lora(adapter, "m")


def _as_lora(adapter: Adapter, lost: str) -> Adapter:
    """The same B and A, as of a plain LoRA."""
    method = lorary.method("lora", r=4, alpha=6)
    sites = tuple(replace(a, method=method) for a in adapter.sites)
    tensors = {s: {role: t for role, t in roles.items() if role != lost} for s, roles in _copied(adapter).items()}
    return replace(adapter, method=method, sites=sites, tensors=tensors)


def other_norm(adapter: Adapter) -> Adapter:
    return replace(adapter, full={**adapter.full, NORM: adapter.full[NORM] * 1.01})


def without_norm(adapter: Adapter) -> Adapter:
    return _with_full(adapter, {HEAD: adapter.full[HEAD]})


def _with_full(adapter: Adapter, full: dict[str, Tensor]) -> Adapter:
    sites = tuple(replace(a, method=a.method.replace(full=tuple(full))) for a in adapter.sites)
    return replace(adapter, method=adapter.method.replace(full=tuple(full)), sites=sites, full=full)


def _copied(adapter: Adapter) -> dict[str, dict[str, Tensor]]:
    return {site: dict(roles) for site, roles in adapter.tensors.items()}


LOST: dict[str, tuple[tuple[str, ...], dict[str, Any], Callable[[Adapter], Adapter], str]] = {
    "a shift": (("lora",), {"lora_bias": True}, without_shift, "would differ by 1 of itself"),
    "a shift that is gone": (("lora",), {"lora_bias": True}, without_bias, "would differ by 1 of itself"),
    "a gain that is gone": (("dora",), {}, without_gain, "would differ by "),
    "a whole parameter": (("lora",), {"full": (NORM, HEAD)}, other_norm, f"{NORM}: would differ by 0.01 of itself"),
    "one that is gone": (("lora",), {"full": (NORM, HEAD)}, without_norm, f"{NORM}: is not there in the written"),
}


@pytest.mark.parametrize(("names", "options", "change", "sentence"), LOST.values(), ids=LOST)
def test_what_is_lost_is_refused(
    names: tuple[str, ...],
    options: dict[str, Any],
    change: Callable[[Adapter], Adapter],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    full = options.get("full", ())
    model = adapted(LLAMA, *names, **{k: v for k, v in options.items() if k != "full"})
    adapter = Adapter.of(model)
    if full:
        adapter = _with_full(adapter, {name: LLAMA.model().get_parameter(name).detach() + 0.1 for name in full})
    save_adapter(adapter, tmp_path / "source", model=LLAMA.model())
    done = convert(tmp_path / "source", tmp_path / "same", model=LLAMA.model())
    assert (done.difference, done.compared) == (0.0, len(adapter.sites) + len(full))

    def losing(value: Adapter, folder: Any, **more: Any) -> None:
        save_adapter(change(value), folder, **more)

    monkeypatch.setattr("lorary.adapters.intake.convert.save_adapter", losing)
    with pytest.raises(FileError) as refused:
        convert(tmp_path / "source", tmp_path / "out", model=LLAMA.model())
    assert sentence in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_experts_are_compared_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product for all of them is as large as their weight."""
    model = moe()
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2), targets=["*experts.down_proj"]))
    shake(model)
    lorary.save(model, tmp_path / "source")
    done = convert(tmp_path / "source", tmp_path / "same", model=moe())
    assert done.difference == 0.0

    def losing(value: Adapter, folder: Any, **more: Any) -> None:
        tensors = _copied(value)
        for roles in tensors.values():
            roles["B"] = torch.cat([roles["B"][:-1], 2 * roles["B"][-1:]])
        save_adapter(replace(value, tensors=tensors), folder, **more)

    monkeypatch.setattr("lorary.adapters.intake.convert.save_adapter", losing)
    with pytest.raises(FileError, match="of itself in the written folder"):
        convert(tmp_path / "source", tmp_path / "out", model=moe())
