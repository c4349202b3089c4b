"""Models that PEFT has adapted are refused with the way out, without importing PEFT."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import pytest

import lorary
from lorary.adapters.adapter import Adapter
from tests import tiny

CONFIG: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
SAVED = "an adapter that PEFT has saved is read by lorary.load(base, folder)"
INSIDE = (
    "model: has PEFT's layers inside, such as the Linear at model.layers.0.self_attn.q_proj\n"
    f"      hint: load the base without PEFT's adapter; {SAVED}"
)


def peft_model() -> Any:
    return peft.get_peft_model(tiny.llama(), peft.LoraConfig(task_type="CAUSAL_LM", **CONFIG))


def injected() -> Any:
    return peft.inject_adapter_in_model(peft.LoraConfig(**CONFIG), tiny.llama())


def by_transformers() -> Any:
    model = tiny.llama()
    try:
        model.add_adapter(peft.LoraConfig(**CONFIG))
    except ValueError as error:  # Transformers 5.24 wants a PEFT that is newer than the newest
        pytest.skip(f"Transformers {version('transformers')} refuses PEFT {version('peft')}: {error}")
    return model


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "PeftModel": (
        peft_model,
        "model: is a PeftModelForCausalLM of PEFT, with PEFT's adapter inside its layers\n"
        "      hint: use model.merge_and_unload(), or model.unload() for the base without the adapter; " + SAVED,
    ),
    "its LoraModel": (
        lambda: peft_model().base_model,
        "model: is a LoraModel of PEFT, with PEFT's adapter inside its layers\n"
        "      hint: use model.merge_and_unload(), or model.unload() for the base without the adapter; " + SAVED,
    ),
    "inject_adapter_in_model": (injected, INSIDE),
    "add_adapter": (by_transformers, INSIDE),
}

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT


@pytest.mark.parametrize("name", MODELS)
def test_it_is_refused_with_the_way_out(name: str, tmp_path: Path) -> None:
    build, message = MODELS[name]
    model = build()
    plain = tiny.llama()
    plan = lorary.plan(plain, tiny.LORA)
    lorary.save(lorary.attach(plain, plan), tmp_path)
    actions: dict[str, Callable[[], Any]] = {
        "plan for this model": lambda: lorary.plan(model, tiny.LORA),
        "attach": lambda: lorary.attach(model, plan),
        "load": lambda: lorary.load(model, tmp_path),
        "switch": lambda: lorary.switch(model, Adapter.of(plain)),
        "quantise": lambda: lorary.quantize(model),
    }
    before = tiny.everything(model)
    for verb, action in actions.items():
        with pytest.raises((lorary.StateError, lorary.PlanError)) as refusal:
            action()
        assert str(refusal.value) == f"cannot {verb}:\n  - {message}"
    assert tiny.everything(model) == before


def test_the_way_out_works() -> None:
    for base in (peft_model().unload(), peft_model().merge_and_unload()):
        assert lorary.attached(lorary.attach(base, lorary.plan(base, tiny.LORA)))
