"""Serving forms against `lorary.switch`: equal logits for every method, on real architectures; the base untouched."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.adapters.content_hash import content_hash
from lorary.errors import FileError, LoraryError, MethodError, StateError
from lorary.methods.longlora import LongContext
from lorary.serve.engine import RequestError
from lorary.serve.form import serving_form
from lorary.serve.serving_form import ServingForm
from lorary.serve.weighted import check_weights
from lorary.spec.interfaces import component
from tests import architectures, tiny
from tests.adapters.models import outputs
from tests.adapters.test_mlx import LLAMA, folder_of
from tests.laws.cases import made_of

from .reference import computing

QWEN = {"max_position_embeddings": 32}


def qwen(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A base with biases in q, k and v, the same at every call."""
    return tiny.seeded("Qwen2ForCausalLM", **QWEN | changes).to(dtype)


def adapter_of(base: Any, method: lorary.Method, targets: Any = None, size: float = 0.1) -> lorary.Adapter:
    """A trained adapter of a base, which it uses up."""
    plan = lorary.plan(base, method) if targets is None else lorary.plan(base, method, targets)
    return lorary.Adapter.of(tiny.shaken(lorary.attach(base, plan), size))


def off(y: Tensor, z: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((y.double() - z.double()).abs().max() / z.double().abs().max())


def gap(base: Any, adapter: lorary.Adapter, form: ServingForm) -> float:
    """How far logits by the form are from those of `lorary.switch`, relative to the largest."""
    before, plain = tiny.everything(base), tiny.logits(base)
    with computing(base, form):
        served = tiny.logits(base)
    assert tiny.everything(base) == before
    assert torch.equal(tiny.logits(base), plain), "the base has changed"
    expected = tiny.logits(lorary.switch(base, adapter))
    assert off(plain, expected) > 1e-3, "the adapter changes nothing: anything would pass"
    return off(served, expected)


# --- every method ---------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {"longlora": {"length": 100}, "full": {}, "bitfit": {}}
SINGLE = [name for name in lorary.presets() if name != "qlora"]
COMBINED = ["dora+bitfit", "vera+dora", "melora+dora", "pissa+dora", "lora+bitfit", "longlora+dora"]


@pytest.mark.parametrize("names", SINGLE + COMBINED)
def test_every_method_is_served_as_it_was_trained(names: str) -> None:
    chosen = names.split("+") if names != "lora+" else [names]
    method = made_of(*chosen, **{k: v for name in chosen for k, v in OPTIONS.get(name, {}).items()})
    adapter = adapter_of(qwen(), method)
    form = serving_form(adapter, base := qwen())
    assert form.uid == content_hash(adapter)
    assert gap(base, adapter, form) < 1e-5


KINDS: dict[str, tuple[str, int | None]] = {
    "lora": ("low rank", 3),
    "pissa": ("low rank", 6),  # the difference to the base as it was
    "melora": ("low rank", 6),
    "multilora": ("low rank", 9),
    "dora": ("low rank with gain, shift", 3),  # the shift takes the bias out of the gain
    "vera": ("shared projections", 3),
    "bitfit": ("shift", None),
    "longlora": ("low rank with overrides, RoPE scaling", 3),
    "glora": ("replica", None),
    "full": ("replica", None),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_form_says_what_it_is(name: str) -> None:
    form = serving_form(adapter_of(qwen(), made_of(name, **OPTIONS.get(name, {}))), qwen())
    assert (form.kind, form.rank) == KINDS[name]
    assert form.additive == (name not in ("dora", "longlora", "glora", "full"))
    assert any("of their own" in note for note in form.notes) == bool(form.overrides)


def test_methods_of_one_adapter_have_forms_of_their_own() -> None:
    methods = {"*.q_proj": made_of("dora"), "*.v_proj": made_of("vera"), "*.up_proj": made_of("glora", A="vector")}
    adapter = lorary.Adapter.of(tiny.shaken(lorary.attach(base := qwen(), lorary.plan(base, methods)), 0.1))
    form = serving_form(adapter, base := qwen())
    assert form.kind == "shared projections and low rank with gain, shift"
    assert gap(base, adapter, form) < 1e-5


def test_pruned_directions_are_not_served() -> None:
    """A site without any is dropped, and the base needs no forward of its own there."""
    adapter = adapter_of(qwen(), made_of("adalora"), ["q_proj"], size=0.5)
    first, second = (dict(roles) for roles in adapter.tensors.values())
    first["E"] = torch.zeros(3)
    second["E"] = second["E"] * torch.tensor([1.0, 0.0, 1.0])
    names = list(adapter.tensors)
    pruned = dataclasses.replace(adapter, tensors=dict(zip(names, (first, second), strict=True)))
    form = serving_form(pruned, base := qwen())
    assert list(form.sites) == names[1:]
    assert form.rank == 2
    assert gap(base, pruned, form) < 1e-5


def test_adapters_of_one_seed_share_their_projections() -> None:
    one, other = (serving_form(adapter_of(qwen(), made_of("vera"), size=size), qwen()) for size in (0.1, 0.2))
    assert one.uid != other.uid
    assert list(one.shared) == list(other.shared)
    (whole,) = one.shared.values()
    for site in one.sites.values():
        assert len(site.d) == 3
        assert len(site.b) == len(site.B)
        assert site.A.untyped_storage().data_ptr() == whole["A"].untyped_storage().data_ptr()
        assert site.B.untyped_storage().data_ptr() == whole["B"].untyped_storage().data_ptr()
    third = serving_form(adapter_of(qwen(), made_of("vera", seed=1)), qwen())
    assert list(third.shared) != list(one.shared)


def test_a_fused_projection_is_served_by_its_parts() -> None:
    for name in ("lora", "dora", "vera", "melora"):
        adapter = adapter_of(tiny.seeded("GPT2LMHeadModel"), made_of(name), ["c_attn[q,v]"])
        form = serving_form(adapter, base := tiny.seeded("GPT2LMHeadModel"))
        assert not form.shared, "parts of one weight have vectors of their own, and no B in common"
        assert gap(base, adapter, form) < 1e-5


# --- real architectures ---------------------------------------------------------------------------------------------

LANGUAGE = [
    name
    for family in ("decoder-only", "mixture of experts", "state space and hybrid")
    for name in architectures.FAMILIES[family]
]
WAYS: dict[str, tuple[lorary.Method, Any]] = {
    "dora": (made_of("dora"), ["all-linear", "embedding"]),
    "norms": (made_of("lora").replace(full=("norms",)), "all-linear"),
}
GATED = ("Mamba2", "NemotronH", "Bamba", "Qwen3Next")  # norms with a gate, some of them read by their mixer


@pytest.mark.parametrize("name", LANGUAGE)
def test_real_architectures(name: str) -> None:
    inputs = architectures.inputs(architectures.model(name))
    for way, (method, targets) in WAYS.items():
        adapter = adapter_of(architectures.model(name).eval(), method, targets)
        base = architectures.model(name).eval()
        if way == "norms" and name.startswith(GATED):
            with pytest.raises(MethodError, match=r"not one tensor of rows|does not call the \w+Norm"):
                serving_form(adapter, base)
            continue
        form = serving_form(adapter, base)
        with computing(base, form):
            served = tiny.logits(base, **inputs)
        expected = tiny.logits(lorary.switch(base, adapter), **inputs)
        assert off(served, expected) < 1e-5


LONG: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("model.rotary_emb", {}),
    "Gemma3": ("model.rotary_emb", {"layer_types": ["sliding_attention", "full_attention"]}),
    "Phi3": ("model.rotary_emb", {}),
    "Mixtral": ("model.rotary_emb", {"head_dim": 4}),
}


@pytest.mark.parametrize("rope", ["linear", "yarn"])
@pytest.mark.parametrize("name", LONG)
def test_a_longer_context(name: str, rope: str) -> None:
    """Of the rows of the adapter alone: the base has its own angles and configuration afterwards."""
    path, settings = LONG[name]
    bases = [tiny.seeded(f"{name}ForCausalLM", max_position_embeddings=64, **settings) for _ in range(2)]
    method = made_of("longlora", length=256, rope=rope, shifted=False).replace(full=())
    adapter, base = adapter_of(bases[0], method, ["attention"]), bases[1]
    config, form = repr(base.config), serving_form(adapter, base)
    assert list(form.rotary) == [path]
    assert form.max_context == 256
    with computing(base, dataclasses.replace(form, rotary={})):
        short = tiny.logits(base)
    with computing(base, form):
        assert off(short, tiny.logits(base)) > 1e-4
    assert repr(base.config) == config
    assert gap(base, adapter, form) < 1e-5


@pytest.mark.parametrize("names", ["lora", "dora", "vera", "glora", "pissa", "longlora", "lora+bitfit"])
def test_a_base_in_bf16(names: str) -> None:
    """Logits within 3 %, of which the base's own rounding is most; a gain keeps its digits."""
    method = made_of(*names.split("+"), **OPTIONS.get(names, {}))
    adapter = adapter_of(qwen(torch.bfloat16), method)
    form = serving_form(adapter, base := qwen(torch.bfloat16))
    assert gap(base, adapter, form) < 0.03
    for site in form.sites.values():
        held = {role: t.dtype for role, t in site._asdict().items() if isinstance(t, Tensor)}
        assert held == {role: torch.float32 if role == "gain" else torch.bfloat16 for role in held}


@pytest.mark.parametrize("names", ["qlora", "qlora+dora", "qlora+vera", "lora", "dora", "longlora", "bitfit"])
def test_a_quantised_base(names: str) -> None:
    """DoRA's norm is that of the dequantised weight; a form for another base says so."""
    method = made_of(*names.split("+"), **OPTIONS.get(names, {}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter, base = adapter_of(qwen(), method), nf4()
        form = serving_form(adapter, base)
        assert gap(base, adapter, form) < 1e-5
    said = [note for note in form.notes if "quantised" in note]
    unlike = "it was trained on a base that is not quantised; this base is"
    assert said == ([] if "qlora" in names or names == "bitfit" else [unlike])


def test_an_adapter_of_a_quantised_base_on_the_plain_one() -> None:
    form = serving_form(adapter_of(qwen(), made_of("qlora")), qwen())
    assert form.notes == ("it was trained on a base quantised to NF4; this base has the weights from before",)


# --- tied weights, merged sites ---------------------------------------------------------------------------------------


def tied() -> Any:
    return tiny.seeded("LlamaForCausalLM", tie_word_embeddings=True)


@pytest.mark.parametrize(("end", "other"), [("lm_head", "model.embed_tokens"), ("model.embed_tokens", "lm_head")])
def test_an_adapter_at_one_tied_end_leaves_the_other(end: str, other: str) -> None:
    adapter = adapter_of(tied(), made_of("dora" if end == "lm_head" else "lora"), [end])
    form = serving_form(adapter, base := tied())
    assert list(form.sites) == [end]
    x = torch.randn(2, 3, 16) if other == "lm_head" else tiny.ids()
    before = base.get_submodule(other)(x)
    with computing(base, form):
        assert torch.equal(base.get_submodule(other)(x), before)
    assert gap(base, adapter, form) < 1e-5


@pytest.mark.parametrize("head", [False, True])
def test_a_tied_weight_that_trained_in_full_acts_at_both_ends(head: bool) -> None:
    """Also under a LoRA of the head, which is then merged into the head's own weight."""
    adapter = adapter_of(tied(), made_of("lora").replace(full=("model.embed_tokens",)))
    if head:
        other = adapter_of(tied(), made_of("lora"), ["lm_head"])
        sites, tensors = (*adapter.sites, *other.sites), {**adapter.tensors, **other.tensors}
        adapter = dataclasses.replace(adapter, sites=sites, tensors=tensors)
    form = serving_form(adapter, base := tied())
    both = [form.overrides[path]["weight"] for path in ("model.embed_tokens", "lm_head")]
    assert torch.equal(*both) != head
    assert gap(base, adapter, form) < 1e-5


def test_a_weight_that_a_rule_wrote_is_merged_with_the_update_over_it() -> None:
    adapter = adapter_of(qwen(), made_of("delta-lora", mode="paper"))
    form = serving_form(adapter, base := qwen())
    assert adapter.full
    assert not form.sites
    assert gap(base, adapter, form) < 1e-5


# --- files ------------------------------------------------------------------------------------------------------------

PEFT: dict[str, dict[str, Any]] = {
    "plain": {},
    "patterns": {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 3}},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "bias": {"bias": "lora_only"},
    "modules to save": {"modules_to_save": ["lm_head", "norm"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}


@pytest.mark.parametrize("name", PEFT)
def test_a_folder_of_peft(name: str, tmp_path: Path) -> None:
    """Against PEFT's own forward."""
    settings = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 2, "lora_alpha": 5} | PEFT[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tiny.shaken(peft.get_peft_model(qwen(), peft.LoraConfig(task_type="CAUSAL_LM", **settings)), 0.1)
        expected = tiny.logits(model.eval())
        model.save_pretrained(tmp_path)
        adapter = lorary.load_adapter(tmp_path, model=(base := qwen()))
    with computing(base, serving_form(adapter, base)):
        assert off(tiny.logits(base), expected) < 1e-5


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_folder_of_mlx(kind: str, tmp_path: Path) -> None:
    folder_of(tmp_path, kind)
    adapter, base = lorary.load_adapter(tmp_path), LLAMA.model()
    with computing(base, serving_form(adapter, base)):
        served = outputs(base)
    assert off(served, outputs(lorary.switch(base, adapter))) < 1e-5


@pytest.mark.parametrize("name", ["lora", "dora", "vera", "pissa", "adalora", "longlora", "glora", "bitfit"])
def test_a_saved_adapter_has_the_form_of_the_one_in_memory(name: str, tmp_path: Path) -> None:
    adapter = adapter_of(qwen(), made_of(name, **OPTIONS.get(name, {})))
    lorary.save_adapter(adapter, tmp_path / "a")
    one, other = (serving_form(a, qwen()) for a in (adapter, lorary.load_adapter(tmp_path / "a")))
    assert (one.uid, one.kind, one.method) == (other.uid, other.kind, other.method)
    for path, site in one.sites.items():
        for mine, its in zip(site, other.sites[path], strict=True):
            assert torch.equal(mine, its) if isinstance(mine, Tensor) else mine == its


# --- what a form does not need ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "vera", "pissa"])
def test_a_plain_form_does_not_read_the_base(name: str) -> None:
    adapter, base = adapter_of(qwen(), made_of(name)), qwen()
    form, here = serving_form(adapter, base), lorary.Fingerprint.of(base)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.fill_(torch.nan)
    blind = serving_form(adapter, base, here=here)
    for path, site in form.sites.items():
        assert torch.equal(site.A, blind.sites[path].A)
        assert torch.equal(site.B, blind.sites[path].B)


def test_an_override_of_a_buffer() -> None:
    """A batch norm that trains in full has its statistics with it; its counter has no effect in evaluation."""
    method = made_of("lora").replace(full=("norm",))
    torch.manual_seed(0)
    base = tiny.ConvNet().eval()
    torch.manual_seed(0)
    model = tiny.ConvNet()
    lorary.attach(model, lorary.plan(model, method, ["stem", "head"]))
    x = torch.randn(4, 3, 9, 9)
    tiny.shaken(model.train())(x)
    form = serving_form(lorary.Adapter.of(model.eval()), base)
    assert set(form.overrides["norm"]) == {"weight", "bias", "running_mean", "running_var"}
    with torch.no_grad(), computing(base, form):
        assert off(base(x), model(x)) < 1e-5


def test_threads_form_adapters_while_the_base_runs() -> None:
    """As a server's loader does."""
    adapters = [adapter_of(qwen(), made_of(name), size=size) for name in ("lora", "dora") for size in (0.1, 0.2)]
    base = qwen()
    expected, alone = tiny.logits(base), [serving_form(adapter, base) for adapter in adapters]
    with ThreadPoolExecutor(4) as pool:
        forming = [pool.submit(serving_form, adapter, base) for adapter in adapters * 5]
        while not all(one.done() for one in forming):
            with torch.inference_mode():
                assert torch.equal(base(tiny.ids()).logits, expected)
    for form, one in zip(alone * 5, forming, strict=True):
        assert one.result().uid == form.uid
        for path, site in form.sites.items():
            its = one.result().sites[path]
            assert torch.equal(site.A, its.A)
            assert torch.equal(site.B, its.B)


# --- refusals ---------------------------------------------------------------------------------------------------------


@component
class OtherContext(LongContext):
    """A context that may change anything."""


Subject = tuple[Any, Any]  # an adapter and a base


def plain(name: str = "lora") -> lorary.Adapter:
    return adapter_of(qwen(), made_of(name), ["q_proj"])


def nf4() -> Any:
    return lorary.quantize(qwen(), lorary.NF4())


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
    assert serving_form(plain(), base, here=lorary.Fingerprint.of(qwen())).rank == 3


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
