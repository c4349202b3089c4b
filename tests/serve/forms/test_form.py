"""Serving forms against `lorary.switch`: equal logits for every method, on real architectures; the base untouched."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import lorary
from lorary.adapters.content_hash import content_hash
from lorary.errors import MethodError
from lorary.model.base import Base
from lorary.model.scan import scan
from lorary.serve.forms.form import serving_form
from lorary.serve.forms.serving_form import ServingForm
from tests import architectures, tiny
from tests.adapters.models import outputs
from tests.adapters.test_mlx import LLAMA, folder_of
from tests.laws.cases import made_of
from tests.serve.reference import computing

QWEN = {"max_position_embeddings": 32}


def qwen(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A base with biases in q, k and v, the same at every call."""
    return tiny.seeded("Qwen2ForCausalLM", **QWEN | changes).to(dtype)


def nf4() -> Any:
    return lorary.quantize(qwen(), lorary.NF4())


def adapter_of(
    base: Any, method: lorary.Method, targets: Any = None, size: float = 0.1, exclude: Sequence[str] = ()
) -> lorary.Adapter:
    """A trained adapter of a base, which it uses up."""
    exclude = [pattern for pattern in exclude if any(fnmatch(name, pattern) for name in scan(base).layers)]
    plan = lorary.plan(base, method, targets, exclude=exclude)
    return lorary.Adapter.of(tiny.shaken(lorary.attach(base, plan, data=tiny.data_for(plan)), size))


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
NOT_SERVED = ("alora", "houlsby", "prefix-tuning", "prompt-tuning")  # no weight and bias have their function
SINGLE = [name for name in lorary.presets() if name not in ("qlora", "loftq", *NOT_SERVED)]
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
    "ia3": ("gain, shift, overrides", None),  # a bias is scaled as well, and inputs are another weight
    "lora": ("low rank", 3),
    "pissa": ("low rank", 6),  # the difference to the base as it was
    "melora": ("low rank", 6),
    "multilora": ("low rank", 9),
    "hira": ("replica", None),
    "miss": ("low rank", 3),
    "loha": ("low rank", 9),
    "dora": ("low rank with gain, shift", 3),  # the shift takes the bias out of the gain
    "vera": ("shared projections", 3),
    "rows": ("low rank", 3),
    "bitfit": ("shift", None),
    "longlora": ("low rank with overrides, RoPE scaling", 3),
    "glora": ("replica", None),
    "full": ("replica", None),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_form_says_what_it_is(name: str) -> None:
    form = serving_form(adapter_of(qwen(), made_of(name, **OPTIONS.get(name, {}))), qwen())
    assert (form.kind, form.rank) == KINDS[name]
    assert form.additive == (name not in ("dora", "ia3", "longlora", "glora", "hira", "full"))
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
FUSED = ("*experts.gate_up_proj", "*experts.up_proj", "*experts.down_proj")  # a batch has those of one adapter
GATED = ("Mamba2", "NemotronH", "Bamba", "Qwen3Next")  # norms with a gate, some of them read by their mixer


@pytest.mark.parametrize("name", LANGUAGE)
def test_real_architectures(name: str) -> None:
    inputs = architectures.inputs(architectures.model(name))
    for way, (method, targets) in WAYS.items():
        base = architectures.model(name).eval()
        adapter = adapter_of(architectures.model(name).eval(), method, targets, exclude=FUSED)
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
    blind = serving_form(adapter, Base(base, here))
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
