"""Serving forms of what cannot be served, and of adapters that are added: every refusal with its sentence."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.errors import FileError, LoraryError, MethodError, StateError
from lorary.methods.longlora import LongContext
from lorary.model.base import Base
from lorary.serve.forms.form import serving_form
from lorary.serve.forms.weighted import check_weights
from lorary.serve.interface import RequestError
from lorary.spec.interfaces import component
from tests import architectures, tiny
from tests.laws.cases import made_of
from tests.serve.forms.test_form import QWEN, adapter_of, nf4, off, qwen
from tests.serve.reference import computing


@component
class OtherContext(LongContext):
    """A context that may change anything."""


Subject = tuple[Any, Any]  # an adapter and a base


def plain(name: str = "lora") -> lorary.Adapter:
    return adapter_of(qwen(), made_of(name), ["q_proj"])


def with_fields(**changes: Any) -> Subject:
    return dataclasses.replace(plain(), **changes), qwen()


def with_tensor(change: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32) -> Subject:
    adapter = adapter_of(qwen(dtype), made_of("lora"), ["q_proj"])
    first = next(iter(adapter.tensors))
    roles = {**adapter.tensors[first], "B": change(adapter.tensors[first]["B"])}
    return dataclasses.replace(adapter, tensors={**adapter.tensors, first: roles}), qwen(dtype)


def with_parameters(name: str, *full: str) -> Subject:
    adapter = adapter_of(architectures.model(name).eval(), made_of("lora").replace(full=full))
    return adapter, architectures.model(name).eval()


def with_dead_gain(base: Any) -> Subject:
    terms = dict.fromkeys(("B", "C", "D", "E"), "none")
    adapter = adapter_of(qwen(), made_of("glora", A="vector", **terms), ["k_proj"])
    tensors = {site: {"Ad": torch.full_like(roles["Ad"], -1)} for site, roles in adapter.tensors.items()}
    return dataclasses.replace(adapter, tensors=tensors), base


def with_context(cls: type = LongContext, **said: Any) -> Subject:
    adapter = adapter_of(qwen(), made_of("longlora", length=100, **said))
    found: Any = adapter.method.context
    context = cls(**{f.name: getattr(found, f.name) for f in dataclasses.fields(found)})
    return dataclasses.replace(adapter, method=adapter.method.replace(context=context)), qwen()


class Experts(nn.Module):
    """Two experts, each of which gets some of the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.experts[0](x[::2]), self.experts[1](x[1::2])])


def with_expert() -> Subject:
    torch.manual_seed(0)
    base = Experts()
    return adapter_of(base, made_of("lora"), ["experts.1"]), lorary.detach(base)


REFUSALS: dict[str, tuple[Callable[[], Subject], type[LoraryError], str]] = {
    "other weights": (
        lambda: (plain(), tiny.seeded("Qwen2ForCausalLM", seed=1, **QWEN)),
        FileError,
        r"the adapter does not fit this model:\n  - base: other weights: \w{12} when it was trained, \w{12} here\n"
        r"      hint: load the base that it was trained on, or pass force=True$",
    ),
    "other sizes": (
        lambda: (plain(), qwen(hidden_size=8)),
        FileError,
        r"layers.0.self_attn.q_proj: has 8 output features, expected 16\n(.*\n)*.*base: other layers or sizes",
    ),
    "another class": (
        lambda: (plain(), tiny.seeded("LlamaForCausalLM", **QWEN)),
        FileError,
        "base: another architecture: Qwen2ForCausalLM when it was trained, LlamaForCausalLM here",
    ),
    "another configuration": (
        lambda: (plain(), qwen(rms_norm_eps=0.1)),
        FileError,
        "base: another configuration, `rms_norm_eps`: 1e-06 when it was trained, 0.1 here",
    ),
    "no values": (lambda: (plain(), qwen().to("meta")), FileError, "is on the meta device"),
    "a shape": (
        lambda: with_tensor(lambda t: t[:-1]),
        FileError,
        r"layers.0.self_attn.q_proj: B is \(15, 3\), expected \(16, 3\)",
    ),
    "a dtype": (lambda: with_tensor(lambda t: t.int()), FileError, "expected a dense one of floating-point numbers"),
    "no tensors": (lambda: with_fields(tensors={}), FileError, r"A is missing, expected \(3, 16\)\n.*B is missing"),
    "an unknown parameter": (
        lambda: with_fields(full={"no.weight": torch.zeros(2)}),
        FileError,
        r"no.weight: the adapter holds \(2,\) for it; in this model it has no such parameter",
    ),
    "NaN": (
        lambda: with_tensor(lambda t: t * torch.nan),
        MethodError,
        r"others:\n  - model.layers.0.self_attn.q_proj: B: holds NaN, or numbers too large for float32\n.*hint: check",
    ),
    "too large for fp16": (
        lambda: with_tensor(lambda t: t * 1e8, torch.float16),
        MethodError,
        "B: holds NaN, or numbers too large for float16",
    ),
    "PiSSA on NF4": (lambda: (plain("pissa"), nf4()), FileError, "is quantised already, and SVDInit has to subtract"),
    "a merged site on NF4": (
        lambda: with_dead_gain(nf4()),
        MethodError,
        "A is -1 at 8 of 8 outputs, where nothing of W is left to add B to; and the base's weight is quantised",
    ),
    "dynamic RoPE": (
        lambda: with_context(rope="dynamic"),
        MethodError,
        "context: dynamic RoPE scaling depends on the length of the input so far, so that rows cannot share a batch",
    ),
    "another context": (
        lambda: with_context(OtherContext),
        MethodError,
        "context: OtherContext changes more than RoPE scaling, and other rows of the batch with it",
    ),
    "fused experts": (
        lambda: with_parameters("MixtralForCausalLM", "*experts*"),
        MethodError,
        "experts.gate_up_proj and 3 more: belongs to MixtralExperts, which has layers of its own",
    ),
    "an expert": (with_expert, MethodError, "experts.1: is in an expert, which gets the rows that a router sends it"),
    "positions": (
        lambda: with_parameters("OPTForCausalLM", "*embed_positions*"),
        MethodError,
        "belongs to OPTLearnedPositionalEmbedding, whose inputs are attention_mask and past_key_values_length and pos",
    ),
    "a bias that is read": (
        lambda: with_parameters("MambaForCausalLM", "*conv1d.bias"),
        MethodError,
        "conv1d.bias and 1 more: is read by MambaMixer, which computes all rows with it",
    ),
    "an attention's own": (
        lambda: with_parameters("GptOssForCausalLM", "*sinks"),
        MethodError,
        "sinks and 1 more: belongs to GptOssAttention, which has layers of its own: its rows cannot be computed apart",
    ),
    "an attached adapter": (
        lambda: (plain(), tiny.trained(qwen())),
        StateError,
        "cannot serve:\n  - base: has an adapter attached\n      hint: detach it first",
    ),
    "no adapter": (lambda: (made_of("lora"), qwen()), StateError, "adapter: is a Method, not an Adapter"),
    "no base": (lambda: (plain(), None), StateError, "base: is a NoneType, not a torch.nn.Module"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_served_is_refused(name: str) -> None:
    subject, error, message = REFUSALS[name]
    adapter, base = subject()
    with pytest.raises(error, match=message):
        serving_form(adapter, base)


def test_every_reason_is_given_at_once() -> None:
    adapter, base = with_parameters("GptOssForCausalLM", "*sinks", "*experts*", "*embed_tokens*")
    with pytest.raises(MethodError) as told:
        serving_form(adapter, base)
    assert len(told.value.problems) == 2
    assert "sinks and 1 more" in str(told.value)
    assert "experts.gate_up_proj and 7 more" in str(told.value)


def test_force_takes_another_base() -> None:
    base = tiny.seeded("Qwen2ForCausalLM", seed=1, **QWEN)
    assert serving_form(plain(), base, force=True, uid="mine").uid == "mine"
    assert serving_form(plain(), Base(base, lorary.Fingerprint.of(qwen()))).rank == 3


# --- several adapters -------------------------------------------------------------------------------------------------


def test_weighted_adapters_are_their_mix() -> None:
    adapters = {name: adapter_of(qwen(), made_of(name)) for name in ("lora", "pissa", "vera", "bitfit", "melora")}
    weights = dict(zip(adapters, (0.7, -0.4, 1.5, 0.5, 1.0), strict=True))
    base = qwen()
    forms = {name: serving_form(adapter, base) for name, adapter in adapters.items()}
    check_weights(forms, weights)
    with computing(base, *((forms[name], weight) for name, weight in weights.items())):
        served = tiny.logits(base)
    mixed = lorary.mix(adapters, weights=list(weights.values()), base=base)
    assert off(served, tiny.logits(lorary.switch(base, mixed))) < 1e-5


def test_what_cannot_be_added_is_refused() -> None:
    forms = {name: serving_form(plain(name), qwen()) for name in ("lora", "dora")}
    forms |= {"full": serving_form(adapter_of(qwen(), made_of("full")), qwen())}
    forms |= {"long": serving_form(*with_context())}
    check_weights(forms, {"dora": 1.0})
    check_weights(forms, {"lora": 0.5})
    with pytest.raises(RequestError) as told:
        check_weights(forms, {"lora": float("nan"), "dora": 0.5, "full": True, "long": 1.0})
    assert [str(p).partition("\n")[0] for p in told.value.problems] == [
        "lora: its weight is nan, not a finite number",
        "full: its weight is True, not a finite number",
        "dora: scales the base's output at 2 layers: such changes have no sum",
        "full: has parameters of its own in 21 modules, such as model.embed_tokens: they replace the base's",
        "long: has parameters of its own in 6 modules, such as model.embed_tokens: they replace the base's",
        "long: scales RoPE, which has no sum",
    ]
    with pytest.raises(RequestError, match="dora: scales the base's output"):
        check_weights(forms, {"dora": 0.5})
