"""attach, detach, disabled, merge, unmerge: what is done to a model, and the way back, bit for bit."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.adapted import Adapted, adapted
from lorary.adapter import Adapter
from lorary.errors import StateError
from lorary.surgery import attached, base_parameter

from . import tiny

LORA = lorary.method("lora", r=2, alpha=8.0)


def trained(model: Any, method: lorary.Method = LORA, targets: Any = "all-linear", **options: Any) -> Any:
    """The model as after training with a method."""
    lorary.attach(model, lorary.plan(model, method, targets), **options)
    return tiny.shaken(model)


def refused(action: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(StateError) as refusal:
        action(*arguments, **options)
    return str(refusal.value)


# --- attach and detach ------------------------------------------------------------------------------------------------


def everything(model: nn.Module) -> tuple[Any, ...]:
    """What must be the same after a detach: modules and parameters themselves, flags, modes, values."""
    return (
        [(name, id(m), m.training) for name, m in model.named_modules(remove_duplicate=False)],
        [(name, id(p), p.requires_grad, p.grad is None) for name, p in model.named_parameters(remove_duplicate=False)],
        [(name, id(b)) for name, b in model.named_buffers(remove_duplicate=False)],
        [sorted(vars(m)) for m in model.modules()],
    )


MODELS = {
    "LlamaForCausalLM": ({}, "all-linear"),
    "GPT2LMHeadModel": ({}, ["attention-qv", "embedding"]),
    "T5ForConditionalGeneration": ({}, ["embedding", "all-linear", "lm_head"]),
    "BertForSequenceClassification": ({}, ["attention", "embedding"]),
    "MixtralForCausalLM": ({}, "attention"),
    "Gemma3ForCausalLM": ({}, ["embedding", "lm_head"]),
    "MobileNetV2ForImageClassification": ({}, "conv"),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["lora", "lora-fa", "bitfit", "full", "lora,bitfit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_detach_gives_the_very_base_back(name: str, method: str, dtype: torch.dtype) -> None:
    changes, targets = MODELS[name]
    model = tiny.model(name, **changes).to(dtype).train()
    frozen = next(iter(model.parameters()))
    frozen.requires_grad_(False)  # flags are the user's, too
    next(m for m in model.modules() if isinstance(m, nn.Dropout | nn.Embedding | nn.Conv2d)).eval()
    before, values = everything(model), tiny.frozen_copy(model)
    try:
        plan = lorary.plan(model, lorary.method(*method.split(",")), targets)
    except lorary.errors.PlanError as error:
        assert "starts at zero" in str(error) or "no biases" in str(error)  # noqa: PT017
        return
    lorary.attach(model, plan)
    if method == "lora,bitfit" or plan.placed:
        assert everything(model) != before
    tiny.shaken(model)
    assert not tiny.same(tiny.frozen_copy(model), values)
    assert lorary.detach(model) is model
    assert everything(model) == before
    assert tiny.same(tiny.frozen_copy(model), values)
    assert attached(model) is None


def test_attach_freezes_everything_else() -> None:
    model = tiny.llama()
    plan = lorary.plan(model, lorary.method("lora-fa", r=2, full="norm"), "q_proj")
    lorary.attach(model, plan)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "model.layers.0.self_attn.q_proj.p.B",
        "model.layers.1.self_attn.q_proj.p.B",
        "model.norm.weight",
    }


def test_attach_returns_the_model_and_nothing_moves() -> None:
    model = tiny.llama()
    expected = tiny.logits(model)
    assert lorary.attach(model, lorary.plan(model, LORA)) is model
    assert torch.equal(tiny.logits(model), expected)


def test_the_start_depends_on_the_seed_and_the_sites_name_only() -> None:
    def start(seed: int, *targets: str) -> dict[str, Tensor]:
        model = tiny.llama()
        torch.manual_seed(len(targets))  # whatever else has been drawn
        lorary.attach(model, lorary.plan(model, LORA, list(targets)), seed=seed)
        return {name: layer.p["A"].detach() for name, layer in adapted(model).items()}

    one, more, other = start(0, "q_proj"), start(0, "v_proj", "q_proj"), start(1, "q_proj")
    name = "model.layers.0.self_attn.q_proj"
    assert torch.equal(one[name], more[name])
    assert not torch.equal(one[name], other[name])
    assert not torch.equal(one[name], one[name.replace("0", "1")])


def test_attaching_draws_nothing_from_the_global_generator() -> None:
    model = tiny.llama()
    state = torch.get_rng_state()
    lorary.attach(model, lorary.plan(model, LORA))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_precision_of_what_is_learnt(dtype: torch.dtype) -> None:
    model = trained(tiny.llama().to(torch.bfloat16), dtype=dtype)
    assert {p.dtype for layer in adapted(model).values() for p in layer.p.values()} == {dtype}
    assert tiny.logits(model).dtype == torch.bfloat16


def test_attaching_twice() -> None:
    model = tiny.llama()
    plan = lorary.plan(model, LORA)
    lorary.attach(model, plan)
    before = everything(model)
    assert refused(lorary.attach, model, plan) == (
        "cannot attach:\n  - model: something is attached already\n      hint: detach it first, or use lorary.switch"
    )
    assert everything(model) == before


@pytest.mark.parametrize(
    ("action", "verb"),
    [
        (lorary.detach, "detach"),
        (lorary.merge, "merge"),
        (lambda model: lorary.disabled(model).__enter__(), "disable"),
        (lambda model: lorary.groups(model, lr=1e-3), "train"),
        (lambda model: lorary.tuning(model, 3), "train"),
        (Adapter.of, "take from the model"),
    ],
)
def test_nothing_is_attached(action: Any, verb: str) -> None:
    assert refused(action, tiny.llama()) == (
        f"there is nothing to {verb}:\n  - model: no adapter is attached\n      hint: attach one first"
    )


def test_the_modes_of_training_and_evaluation_reach_the_base() -> None:
    model = tiny.llama().train()
    lorary.attach(model, lorary.plan(model, LORA, "q_proj"))
    layer = adapted(model)["model.layers.0.self_attn.q_proj"]
    assert layer.training
    model.eval()
    assert not layer.training
    lorary.detach(model)
    assert not model.model.layers[0].self_attn.q_proj.training


def test_a_gradient_of_another_value_does_not_stay() -> None:
    model = trained(tiny.model("BertForSequenceClassification"), lorary.method("bitfit"))
    model(input_ids=tiny.ids(), labels=torch.tensor([0, 1])).loss.backward()
    assert model.classifier.bias.grad is not None
    lorary.detach(model)
    assert all(p.grad is None for p in model.parameters())


# --- shared modules and foreign code ----------------------------------------------------------------------------------


class Twice(nn.Module):
    """One layer under two paths, and its weight tied to a third."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4, bias=False)
        self.inner = nn.ModuleList([self.a])
        self.c = nn.Linear(4, 4, bias=False)
        self.c.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + 10 * self.inner[0](x) + 100 * self.c(x)


@pytest.mark.parametrize("target", ["a", "inner.0"])
def test_a_shared_layer_is_adapted_wherever_it_is_used(target: str) -> None:
    model, x = Twice(), torch.randn(2, 4)
    before = everything(model)
    trained(model, targets=target)
    assert model.a is model.inner[0]
    layer = adapted(model)["a"]
    delta = layer(x) - layer.base(x)
    base = layer.base(x)
    torch.testing.assert_close(model(x), 11 * (base + delta) + 100 * base)
    lorary.detach(model)
    assert everything(model) == before


def test_merging_a_shared_layer() -> None:
    model, x = Twice(), torch.randn(2, 4)
    trained(model, targets="a")
    expected = model(x)
    lorary.merge(model, keep=True)
    assert model.a is model.inner[0]
    assert model.a.weight is not model.c.weight
    torch.testing.assert_close(model(x), expected)
    lorary.unmerge(model)
    assert torch.equal(model(x), expected)
    assert model.a.weight is model.c.weight


def test_foreign_code_reads_the_geometry_of_a_layer() -> None:
    model = nn.ModuleDict(
        {"fc": nn.Linear(3, 5), "conv": nn.Conv2d(4, 8, 3, 2, 1, groups=2), "e": nn.Embedding(9, 4, 2)}
    )
    layers = dict(model.items())
    lorary.attach(model, lorary.plan(model, lorary.method(r=1), ["all-linear", "conv", "embedding"]))
    reads = {
        "fc": ("in_features", "out_features"),
        "conv": (
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "groups",
            "padding_mode",
        ),
        "e": ("num_embeddings", "embedding_dim", "padding_idx"),
    }
    for name, attributes in reads.items():
        for attribute in (*attributes, "weight", "bias"):
            if attribute != "bias" or name != "e":
                assert getattr(model[name], attribute) is getattr(layers[name], attribute)
    assert model["e"].bias is None


def test_a_models_own_padding_reads_the_convolution() -> None:
    """MobileNet pads by the stride and the window of the layer that it is about to call."""
    model = tiny.model("MobileNetV2ForImageClassification")
    x = torch.randn(1, 3, 32, 32)
    expected = tiny.logits(model, pixel_values=x)
    trained(model, lorary.method(r=1), "conv")
    merged = tiny.logits(model, pixel_values=x)
    assert not torch.equal(merged, expected)
    lorary.merge(model)
    torch.testing.assert_close(tiny.logits(model, pixel_values=x), merged, rtol=1e-3, atol=1e-3)


def test_t5_reads_the_precision_of_an_adapted_weight() -> None:
    model = tiny.model("T5ForConditionalGeneration").to(torch.bfloat16)
    inputs = {"input_ids": tiny.ids(), "decoder_input_ids": tiny.ids()}
    expected = tiny.logits(model, **inputs)
    trained(model, targets=["wo", "wi"])
    assert model.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.bfloat16
    assert tiny.logits(model, **inputs).dtype == torch.bfloat16
    assert not torch.equal(tiny.logits(model, **inputs), expected)


def test_tying_again_after_attach_reaches_the_bases() -> None:
    model = tiny.llama(tie_word_embeddings=True)
    trained(model, targets=["embedding", "lm_head"])
    expected = tiny.logits(model)
    model.tie_weights()
    assert model.lm_head.base.weight is model.model.embed_tokens.base.weight
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(tiny.logits(model), expected)
    lorary.detach(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_assigning_a_weight_assigns_the_bases() -> None:
    model = trained(nn.Sequential(nn.Linear(3, 3)), targets="0")
    other = nn.Parameter(torch.zeros(3, 3))
    model[0].weight, model[0].bias = other, None
    assert model[0].base.weight is other
    assert model[0].base.bias is None
    assert "weight" not in dict(model[0].named_parameters(recurse=False))


def test_resizing_the_vocabulary() -> None:
    free = trained(tiny.llama(), targets="q_proj")
    free.resize_token_embeddings(44)
    assert tiny.logits(free).shape[-1] == 44
    lorary.detach(free)
    adapted_table = trained(tiny.llama(), targets="embedding")
    with pytest.raises(TypeError, match=r"Old embeddings are of type <class 'lorary\.adapted\.Adapted'>"):
        adapted_table.resize_token_embeddings(44)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_may_change_its_precision_after_attach(cast: torch.dtype) -> None:
    model = trained(tiny.model("Qwen2ForCausalLM"), lorary.method("lora", "bitfit", r=2))
    base = tiny.model("Qwen2ForCausalLM")
    base.load_state_dict(_plain_values(model))
    model.to(cast)
    base.to(cast)
    out = tiny.logits(model)
    assert out.dtype == cast
    with lorary.disabled(model):
        assert torch.equal(tiny.logits(model), tiny.logits(base))
    assert torch.equal(tiny.logits(model), out)
    lorary.detach(model)
    assert torch.equal(tiny.logits(model), tiny.logits(base))
    assert {p.dtype for p in model.parameters()} == {cast}


def _plain_values(model: nn.Module) -> dict[str, Tensor]:
    """What the base would be after a detach, while something is attached."""
    kept = attached(model).full  # type: ignore[union-attr]
    names = [name for name, _ in tiny.model("Qwen2ForCausalLM").named_parameters(remove_duplicate=False)]
    return {name: kept.get(name, base_parameter(model, name).detach()) for name in names}


def test_a_copy_of_an_attached_model_is_one_of_its_own() -> None:
    model = trained(tiny.llama(tie_word_embeddings=True), lorary.method("lora", r=2, full="norm"))
    twin = copy.deepcopy(model)
    expected = tiny.logits(model)
    assert torch.equal(tiny.logits(twin), expected)
    lorary.detach(model)
    assert torch.equal(tiny.logits(twin), expected)
    lorary.detach(twin)
    assert torch.equal(tiny.logits(twin), tiny.logits(model))
    assert twin.lm_head.weight is twin.model.embed_tokens.weight is not model.lm_head.weight


def test_an_attached_model_can_be_pickled() -> None:
    model = trained(tiny.ConvNet(), targets=["conv", "all-linear"]).eval()
    x = torch.randn(2, 3, 8, 8)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(x), model(x))
    lorary.detach(again)
    assert not adapted(again)


# --- how models are run -----------------------------------------------------------------------------------------------


def grads(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = trained(tiny.llama(), lorary.method("lora", r=2, dropout=0.5)).train()
    inputs = {"input_ids": tiny.ids(), "labels": tiny.ids()}
    torch.manual_seed(0)
    model(**inputs).loss.backward()
    expected = grads(model)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(0)
    model(**inputs, use_cache=False).loss.backward()
    got = grads(model)
    assert got.keys() == expected.keys() != set()
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad)


def test_autocast() -> None:
    model = trained(tiny.llama(), targets=["all-linear", "embedding", "lm_head"]).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=tiny.ids(), labels=tiny.ids()).loss
        assert model(input_ids=tiny.ids()).logits.dtype == torch.bfloat16
    loss.backward()
    low = grads(model)
    model(input_ids=tiny.ids(), labels=tiny.ids()).loss.backward()
    for name, grad in grads(model).items():
        assert low[name].dtype == torch.float32
        torch.testing.assert_close(low[name], grad, rtol=0.1, atol=0.05 * grad.abs().max().item())


def test_inference_mode() -> None:
    model = trained(tiny.llama())
    expected = tiny.logits(model)
    with torch.inference_mode():
        assert torch.equal(model(input_ids=tiny.ids()).logits, expected)
    model(input_ids=tiny.ids(), labels=tiny.ids()).loss.backward()


def test_generation_with_a_cache() -> None:
    model = trained(tiny.llama())
    prompt = tiny.ids()[:, :2]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached, plain = (model.generate(prompt, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached, plain)


def test_compiled_and_switched_off() -> None:
    model = trained(tiny.ConvNet(), targets=["conv", "all-linear"]).eval()
    x = torch.randn(2, 3, 8, 8)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
    with lorary.disabled(model):
        torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(compiled(x), model(x))


def test_a_state_dict_comes_back() -> None:
    model = trained(tiny.llama())
    values = tiny.frozen_copy(model)
    expected = tiny.logits(model)
    tiny.shaken(model)
    model.load_state_dict(values)
    assert torch.equal(tiny.logits(model), expected)


def test_hooks_on_the_base_still_run() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    seen: list[Any] = []
    model[0].register_forward_hook(lambda module, x, y: seen.append(module))
    trained(model, targets="0")
    model(torch.zeros(1, 3))
    assert [type(m) for m in seen] == [nn.Linear]


def test_a_forward_that_was_replaced_is_the_bases() -> None:
    """Device-placing libraries replace `forward` on the layer itself."""
    layer = nn.Linear(3, 3)
    plain = layer.forward
    layer.forward = lambda x: plain(x) + 1  # type: ignore[method-assign]
    model = nn.Sequential(layer)
    x = torch.randn(2, 3)
    expected = model(x)
    lorary.attach(model, lorary.plan(model, LORA, "0"))
    assert torch.equal(model(x), expected)
    tiny.shaken(model)
    assert not torch.equal(model(x), expected)


# --- disabled ---------------------------------------------------------------------------------------------------------


def test_disabled_is_the_base() -> None:
    model = tiny.model("BertForSequenceClassification")
    base = tiny.logits(model)
    trained(model, lorary.method("lora", "bitfit", r=2))
    tuned = tiny.logits(model)
    assert not torch.equal(tuned, base)
    with lorary.disabled(model) as same:
        assert same is model
        assert torch.equal(tiny.logits(model), base)
        with lorary.disabled(model):
            assert torch.equal(tiny.logits(model), base)
        assert torch.equal(tiny.logits(model), base)
    assert torch.equal(tiny.logits(model), tuned)


def test_an_exception_ends_it() -> None:
    model = trained(tiny.model("BertForSequenceClassification"), lorary.method("lora", "bitfit", r=2))
    tuned = tiny.logits(model)
    with pytest.raises(ZeroDivisionError), lorary.disabled(model), lorary.disabled(model):
        raise ZeroDivisionError
    assert torch.equal(tiny.logits(model), tuned)
    lorary.detach(model)


def test_disabled_touches_no_parameter() -> None:
    model = trained(tiny.model("BertForSequenceClassification"), lorary.method("lora", "bitfit", r=2))
    before = everything(model)
    values = tiny.frozen_copy(model)
    optimizer = torch.optim.SGD(lorary.groups(model, lr=0.1))
    with lorary.disabled(model):
        tiny.logits(model)
    assert everything(model) == before
    assert tiny.same(tiny.frozen_copy(model), values)
    model(input_ids=tiny.ids(), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    assert not tiny.same(tiny.frozen_copy(model), values)


def test_a_reference_and_a_policy_in_one_step() -> None:
    """What preference tuning does: the base's answers without gradients between those of the adapter with them."""
    model = trained(tiny.llama())
    policy = model(input_ids=tiny.ids()).logits
    with torch.no_grad(), lorary.disabled(model):
        reference = model(input_ids=tiny.ids()).logits
    (policy - reference).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("action", "verb"),
    [
        (lorary.detach, "detach"),
        (lorary.merge, "merge"),
        (Adapter.of, "take from the model"),
        (lambda model: lorary.groups(model, lr=1e-3), "train"),
        (lambda model: lorary.switch(model, None), "switch"),
    ],
)
def test_nothing_is_taken_or_changed_meanwhile(action: Any, verb: str) -> None:
    model = trained(tiny.model("BertForSequenceClassification"), lorary.method("lora", "bitfit", r=2))
    tuned = tiny.logits(model)
    with lorary.disabled(model):
        assert refused(action, model) == (
            f"cannot {verb}:\n"
            "  - model: the adapter is disabled, and the model has the base's values\n"
            "      hint: leave the `disabled` block first"
        )
    assert torch.equal(tiny.logits(model), tuned)


# --- merge ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_merged_is_unmerged(name: str) -> None:
    changes, targets = MODELS[name]
    model = tiny.model(name, **changes)
    inputs: dict[str, Any] = {"input_ids": tiny.ids()}
    if name.startswith("T5"):
        inputs["decoder_input_ids"] = tiny.ids()
    if name.startswith("MobileNet"):
        inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    trained(model, lorary.method("lora", r=2, alpha=1.0), targets)
    expected = tiny.logits(model, **inputs)
    classes = [type(m) for m in lorary.detach(copy.deepcopy(model)).modules()]
    assert lorary.merge(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert attached(model) is None
    assert not adapted(model)
    got = tiny.logits(model, **inputs)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounded_once(dtype: torch.dtype) -> None:
    model = trained(nn.Sequential(nn.Linear(12, 8)).to(dtype), targets="0")
    layer = adapted(model)["0"]
    B, A = (layer.p[role].detach().double() for role in "BA")
    exact = (layer.weight.detach().double() + layer.scale * B @ A).to(torch.float32)
    lorary.merge(model)
    assert model[0].weight.dtype == dtype
    assert not model[0].weight.requires_grad
    off = (model[0].weight.float() - exact).abs()
    assert (off <= torch.finfo(dtype).eps / 2 * exact.abs() * 1.001 + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_merged_and_unmerged_again_is_the_same_bit_for_bit(dtype: torch.dtype) -> None:
    model = tiny.model("BertForSequenceClassification").to(dtype)
    trained(model, lorary.method("lora", "bitfit", r=2), ["all-linear", "embedding"])
    before, values, expected = everything(model), tiny.frozen_copy(model), tiny.logits(model)
    for _ in range(3):
        lorary.merge(model, keep=True)
        assert not adapted(model)
        assert lorary.unmerge(model) is model
        assert everything(model) == before
        assert tiny.same(tiny.frozen_copy(model), values)
        assert torch.equal(tiny.logits(model), expected)
    lorary.detach(model)


def test_one_weight_that_is_not_finite_and_nothing_is_merged() -> None:
    model = trained(tiny.llama())
    with torch.no_grad():
        adapted(model)["model.layers.1.mlp.up_proj"].p["B"][3, 1] = float("inf")
        adapted(model)["model.layers.0.self_attn.k_proj"].p["A"][0, 0] = float("nan")
    before, values = everything(model), tiny.frozen_copy(model)
    for keep in (False, True):
        assert refused(lorary.merge, model, keep=keep) == (
            "cannot merge:\n"
            "  - model.layers.0.self_attn.k_proj: merged, the weight is not finite in torch.float32\n"
            "  - model.layers.1.mlp.up_proj: merged, the weight is not finite in torch.float32"
        )
    assert everything(model) == before
    after = tiny.frozen_copy(model)
    assert all(torch.equal(after[k].nan_to_num(), values[k].nan_to_num()) for k in values)
    lorary.detach(model)


def test_a_weight_that_overflows_when_it_is_rounded() -> None:
    model = trained(nn.Sequential(nn.Linear(4, 4)).half(), targets="0")
    with torch.no_grad():
        adapted(model)["0"].p["B"].mul_(1e6)
    assert refused(lorary.merge, model) == "cannot merge:\n  - 0: merged, the weight is not finite in torch.float16"


def test_merging_twice() -> None:
    model = trained(tiny.llama())
    lorary.merge(model, keep=True)
    message = "cannot merge:\n  - model: the adapter is merged\n      hint: unmerge it first"
    assert refused(lorary.merge, model) == message
    for action, verb in ((lorary.detach, "detach"), (Adapter.of, "take from the model")):
        assert refused(action, model) == message.replace("merge:", f"{verb}:", 1)
    assert refused(lorary.switch, model, None) == message.replace("merge:", "switch:", 1)
    lorary.unmerge(model)
    lorary.merge(model)
    assert "there is nothing to merge" in refused(lorary.merge, model)


@pytest.mark.parametrize("merged", [False, True])
def test_unmerging_what_was_not_kept(merged: bool) -> None:
    model = trained(tiny.llama())
    if merged:
        lorary.merge(model)
    assert refused(lorary.unmerge, model) == (
        "cannot unmerge:\n"
        "  - model: nothing is merged here, or the merge did not keep what it replaced\n"
        "      hint: merge with keep=True"
    )


def test_fully_trained_parameters_stay_where_they_are() -> None:
    model = trained(tiny.model("BertForSequenceClassification"), lorary.method("bitfit"))
    tuned = tiny.logits(model)
    lorary.merge(model)
    assert attached(model) is None
    assert torch.equal(tiny.logits(model), tuned)


def test_a_merged_model_can_be_attached_to_again() -> None:
    model = trained(tiny.llama())
    lorary.merge(model)
    expected = tiny.logits(model)
    trained(model)
    assert not torch.equal(tiny.logits(model), expected)
    lorary.detach(model)
    assert torch.equal(tiny.logits(model), expected)


# --- tied embeddings --------------------------------------------------------------------------------------------------

TIED: list[tuple[str, Any]] = [
    ("LlamaForCausalLM", "embedding"),
    ("LlamaForCausalLM", "lm_head"),
    ("LlamaForCausalLM", ["embedding", "lm_head"]),
    ("GPT2LMHeadModel", "embedding"),
    ("GPT2LMHeadModel", "lm_head"),
    ("Gemma3ForCausalLM", "embedding"),
    ("T5ForConditionalGeneration", "embedding"),
    ("T5ForConditionalGeneration", "lm_head"),
    ("T5ForConditionalGeneration", "decoder.embed_tokens"),
    ("BertForMaskedLM", "embedding"),
    ("BertForMaskedLM", "decoder"),
]


@pytest.mark.parametrize(("name", "targets"), TIED)
def test_tied_embeddings(name: str, targets: Any, tmp_path: Path) -> None:
    """Adapted in one of its uses: merged is unmerged, saved and loaded is merged, and unmerged is as before."""
    model = tiny.model(name, tie_word_embeddings=True)
    if name == "BertForMaskedLM":
        nn.init.normal_(model.cls.predictions.bias)  # tied to the decoder's, too
    inputs = {"input_ids": tiny.ids()} | ({"decoder_input_ids": tiny.ids()} if name.startswith("T5") else {})
    base = tiny.logits(model, **inputs)
    trained(model, LORA, targets)
    before, expected = everything(model), tiny.logits(model, **inputs)
    assert not torch.allclose(expected, base, rtol=0.01)
    lorary.merge(model, keep=True)
    merged = tiny.logits(model, **inputs)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    assert not model.config.tie_word_embeddings
    model.tie_weights()  # nothing may tie them again
    assert torch.equal(tiny.logits(model, **inputs), merged)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(tiny.logits(loaded, **inputs), merged)
    lorary.unmerge(model)
    assert model.config.tie_word_embeddings
    assert everything(model) == before
    assert torch.equal(tiny.logits(model, **inputs), expected)
    lorary.detach(model)
    assert torch.equal(tiny.logits(model, **inputs), base)


def test_a_merge_elsewhere_leaves_tied_embeddings_tied(tmp_path: Path) -> None:
    model = trained(tiny.llama(tie_word_embeddings=True))
    lorary.merge(model)
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert torch.equal(tiny.logits(type(model).from_pretrained(tmp_path).eval()), tiny.logits(model))


def test_what_an_adapted_layer_says_of_itself() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    lorary.attach(model, lorary.plan(model, LORA, "0"))
    assert isinstance(model[0], Adapted)
    assert repr(model[0]).splitlines()[1] == "  0, r=2, s=4"
