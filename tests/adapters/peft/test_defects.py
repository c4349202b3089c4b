"""What PEFT 0.21.2 gets wrong about the methods that are here, and that lorary does not: one test for each.

Where it is cheap the same test then looks at PEFT in that release, and is skipped where PEFT is right. Fused experts,
CorDA and LoftQ are not here, nor are adapters with names: a model has one adapter at a time, or the sum of several.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForSequenceClassification

import lorary
from lorary.errors import FileError, MethodError, PlanError, StateError
from lorary.methods.adalora import SVDDelta
from tests.adapters import models
from tests.adapters.models import BASES, Base, adapted, close, fill, outputs
from tests.adapters.peft.test_export import Slides
from tests.other_libraries import skip_if_it_works, skip_if_right

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own words about what is shown of it
AS_MEASURED = version("peft") == "0.21.2"
LLAMA, GPT2, _, CONV = BASES
Q = "model.layers.0.self_attn.q_proj"


def peft(base: Base = LLAMA, name: str = "default", **words: Any) -> Any:
    """A PEFT model in evaluation mode, its adapter filled."""
    words = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | words
    model = cast(Any, get_peft_model(base.model(), LoraConfig(**words), adapter_name=name)).eval()
    fill(p for n, p in model.named_parameters() if "lora_" in n)
    return model


def layers(model: nn.Module) -> list[Any]:
    """The layers that PEFT has adapted."""
    return [m for m in model.modules() if hasattr(m, "base_layer") and hasattr(m, "lora_A")]


def ours(*names: str, **words: Any) -> lorary.Adapter:
    return lorary.Adapter.of(adapted(LLAMA, *names, targets=["q_proj"], **words))


def update(adapter: lorary.Adapter) -> Tensor:
    """What it adds to the first layer's weight."""
    form = adapter.low_rank()[Q]
    return form.B @ form.A


def trains(model: nn.Module) -> bool:
    return any(p.requires_grad for p in model.parameters())


def close_to(found: Tensor, truth: Tensor) -> bool:
    """Whether what PEFT gives is the truth, up to rounding."""
    return torch.allclose(found, truth, rtol=1e-4, atol=1e-5)


# --- sums and merges ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("lora",), ("rslora",)], ids="+".join)
def test_a_sum_of_adapters_is_their_sum(names: tuple[str, ...]) -> None:
    """There, "linear" has cross terms, and the new adapter of rank-stabilised ones is too large by sqrt(r)."""
    first, second = ours(*names, r=4, alpha=8), ours(*names, r=2, alpha=5)
    total = lorary.Adapter.of(lorary.switch(LLAMA.model(), [first, second]))
    torch.testing.assert_close(update(total), update(first) + update(second))
    if AS_MEASURED:
        there = peft(name="a", use_rslora="rslora" in names)
        there.add_adapter("b", copy.deepcopy(there.peft_config["a"]))
        fill(p for n, p in there.named_parameters() if "lora_" in n)
        there.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c", combination_type="linear")
        layer = layers(there)[0]
        wanted = layer.get_delta_weight("a") + layer.get_delta_weight("b")
        skip_if_right("peft", close_to(layer.get_delta_weight("c"), wanted))


def test_magnitudes_are_not_left_out_of_a_sum() -> None:
    """There, a weighted sum of DoRAs is that of their factors, without a word."""
    model = LLAMA.model()
    with pytest.raises(MethodError):
        lorary.switch(model, [ours("dora"), ours("dora")])
    assert torch.equal(outputs(model), outputs(LLAMA.model()))


def test_what_is_there_is_not_replaced_in_silence(tmp_path: Path) -> None:
    """There, a sum under a name in use returns without doing anything, and loading under one overwrites."""
    model = adapted(LLAMA, targets=["q_proj"])
    before = outputs(model)
    lorary.save(model, tmp_path / "a")
    planned = lorary.plan(LLAMA.model(), lorary.method("lora", r=4))
    for again in (lambda: lorary.load(model, tmp_path / "a"), lambda: lorary.attach(model, planned)):
        with pytest.raises(StateError, match="something is attached already"):
            again()
    assert torch.equal(outputs(model), before)
    if AS_MEASURED:
        there = peft()
        there.save_pretrained(str(tmp_path / "b"))
        with torch.no_grad():
            layers(there)[0].lora_A["default"].weight.add_(1)
        changed = outputs(there)
        there.load_adapter(str(tmp_path / "b"), "default")
        skip_if_right("peft", torch.equal(outputs(there), changed))


def test_a_model_with_repeated_layers_is_refused(tmp_path: Path) -> None:
    """There, the guard against merging into layers that share their weight looks in the wrong place."""
    peft().save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"layer_replication": null', '"layer_replication": [[0, 2], [1, 2]]'))
    with pytest.raises(FileError, match="a model with repeated layers is not supported"):
        lorary.load(LLAMA.model(), tmp_path)


def test_a_merge_that_fails_changes_nothing() -> None:
    """There, the layers before the one that fails the check are merged already."""
    model = adapted(LLAMA, targets=["q_proj"])
    last = [m for m in model.modules() if isinstance(m, lorary.Adapted)][-1]
    with torch.no_grad():
        last.params["A"][0, 0] = float("nan")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(StateError, match="not finite"):
        lorary.merge(model)
    assert all(torch.equal(t, before[name]) or t.isnan().any() for name, t in model.state_dict().items())
    assert len([m for m in model.modules() if isinstance(m, lorary.Adapted)]) == 2
    if AS_MEASURED:
        there = peft()
        first, second = layers(there)
        weight = first.base_layer.weight.clone()
        with torch.no_grad():
            second.lora_A["default"].weight[0, 0] = float("nan")
        with skip_if_it_works("peft"):
            there.merge_adapter(safe_merge=True)
        skip_if_right("peft", torch.equal(first.base_layer.weight, weight))


@pytest.mark.parametrize("name", ["lora", "dora", "pissa", "vera"])
def test_merged_and_unmerged_the_weights_are_bit_for_bit_the_same(name: str) -> None:
    """There, the update is subtracted again, which in 16 bits leaves another weight."""
    model = LLAMA.model().bfloat16()
    lorary.attach(model, lorary.plan(model, lorary.method(name, r=4), targets=["q_proj"]))
    fill(p for n, p in model.named_parameters() if ".params." in n)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for _ in range(3):
        lorary.unmerge(lorary.merge(model, keep=True))
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], t) for n, t in before.items())
    if AS_MEASURED:
        there = get_peft_model(LLAMA.model().bfloat16(), LoraConfig(r=4, target_modules=["q_proj"]))
        fill(p for n, p in there.named_parameters() if "lora_" in n)
        layer = layers(there)[0]
        weight = layer.base_layer.weight.clone()
        cast(Any, there).merge_adapter()
        cast(Any, there).unmerge_adapter()
        skip_if_right("peft", torch.equal(layer.base_layer.weight, weight))


def test_looking_at_the_base_does_not_unmerge() -> None:
    """There, a forward pass with the adapter disabled unmerges the weights for good."""
    model = lorary.merge(adapted(LLAMA, targets=["q_proj"]), keep=True)
    merged = outputs(model)
    with pytest.raises(StateError, match="merged"), lorary.disabled(model):
        pass
    assert torch.equal(outputs(model), merged)
    if AS_MEASURED:
        there = peft()
        there.merge_adapter()
        with there.disable_adapter():
            outputs(there)
        skip_if_right("peft", layers(there)[0].merged)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return cast(Tensor, self.head(self.attention(x, x, x)[0]))


def test_a_forward_pass_leaves_attentions_weights_alone() -> None:
    """There, nn.MultiheadAttention is merged and unmerged in each forward pass, and its weight drifts."""
    base = Base("attention", Attention, (), "", "")
    model = adapted(base, targets=["attention", "head"])
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for _ in range(5):
        outputs(model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_no_bias_is_merged_unscaled(tmp_path: Path) -> None:
    """There, merging into 4 and 8 bits forgets the scale of a bias beside B."""
    theirs = peft(GPT2, target_modules=["c_fc"], lora_bias=True, fan_in_fan_out=True)
    theirs.save_pretrained(str(tmp_path))
    merged, base = lorary.merge(lorary.load(GPT2.model(), tmp_path)), GPT2.model()
    change = merged.get_submodule("transformer.h.0.mlp.c_fc").bias - base.get_submodule("transformer.h.0.mlp.c_fc").bias
    (layer,) = layers(theirs)[:1]
    assert layer.scaling["default"] == 2
    assert torch.allclose(change, 2 * layer.lora_B["default"].bias, atol=1e-6)


# --- starts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pissa", "olora"])
@pytest.mark.parametrize(
    ("base", "target"),
    [(GPT2, "c_fc"), (GPT2, "attn.c_proj"), (LLAMA, "embed_tokens"), (CONV, "conv1"), (CONV, "conv2")],
    ids=["transposed", "transposed square", "embedding", "conv1d", "conv2d"],
)
def test_a_start_in_the_weights_directions_is_one_in_every_layer(base: Base, target: str, name: str) -> None:
    """There: a crash on a transposed weight, a moved output on a square one, a plain start of embeddings without a
    word, and "unknown initialization" on convolutions."""
    model = base.model()
    expected = outputs(model)
    lorary.attach(model, lorary.plan(model, lorary.method(name, r=4), targets=[target]))
    close(outputs(model), expected)
    adapter = lorary.Adapter.of(model)
    for site in adapter.tensors:
        product = adapter.tensors[site]["B0"] @ adapter.tensors[site]["A0"]
        assert torch.linalg.matrix_rank(product) == 4, "it holds four directions of the weight"


@pytest.mark.skipif(not AS_MEASURED, reason="what PEFT 0.21.2 does")
def test_there_starts_in_the_weights_directions_fail() -> None:
    words: dict[str, Any] = {"init_lora_weights": "olora", "fan_in_fan_out": True}
    with skip_if_it_works("peft"):
        outputs(get_peft_model(GPT2.model(), LoraConfig(r=4, target_modules=["c_fc"], **words)))
    square = get_peft_model(GPT2.model(), LoraConfig(r=4, target_modules=["attn.c_proj"], **words)).eval()
    skip_if_right("peft", close_to(outputs(square), outputs(GPT2.model())))
    plain = get_peft_model(LLAMA.model(), LoraConfig(r=4, target_modules=["embed_tokens"], init_lora_weights="pissa"))
    name = "base_model.model.model.embed_tokens.lora_embedding_A.default"
    skip_if_right("peft", bool(dict(plain.named_parameters())[name].any()))
    with skip_if_it_works("peft"):
        get_peft_model(CONV.model(), LoraConfig(r=4, target_modules=["conv1"], init_lora_weights="pissa"))


@pytest.mark.parametrize("name", ["lora", "dora", "pissa"])
@pytest.mark.parametrize(
    "words",
    [{"dilation": 2}, {"dilation": 2, "padding": "same"}, {"padding": 1, "padding_mode": "reflect"}, {"stride": 2}],
    ids=str,
)
def test_a_convolution_is_adapted_as_it_slides(words: dict[str, Any], name: str) -> None:
    """There, dilation and the padding mode are left out: a crash, or a merged model that answers otherwise."""
    model = adapted(Base("slides", lambda: Slides(**words), ("conv",), "", ""), name)
    expected = outputs(model)
    close(outputs(lorary.merge(model)), expected)


@pytest.mark.skipif(not AS_MEASURED, reason="what PEFT 0.21.2 does")
def test_there_a_convolution_is_adapted_as_if_it_slid_otherwise() -> None:
    with skip_if_it_works("peft"):
        outputs(get_peft_model(Slides(dilation=2), LoraConfig(r=4, target_modules=["conv"])))
    there = cast(
        Any, get_peft_model(Slides(padding=1, padding_mode="reflect"), LoraConfig(r=4, target_modules=["conv"]))
    )
    fill(p for n, p in there.eval().named_parameters() if "lora_" in n)
    live = outputs(there)
    there.merge_adapter()
    skip_if_right("peft", close_to(outputs(there), live))


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_a_moved_base_can_be_planned_without_memory(name: str) -> None:
    """There, such a start fails where adapters are made on the meta device."""
    with torch.device("meta"):
        skeleton = LLAMA.make()
    planned = lorary.plan(skeleton, lorary.method(name, r=4), targets=["q_proj"])
    model = lorary.attach(LLAMA.model(), planned)
    close(outputs(model), outputs(LLAMA.model()))
    if AS_MEASURED:
        words = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=name)
        with skip_if_it_works("peft"):
            get_peft_model(LLAMA.model(), words, low_cpu_mem_usage=True)


def test_a_randomised_start_is_kept_and_not_drawn_again(tmp_path: Path) -> None:
    """There, loading decomposes the base anew, with whatever random numbers come next."""
    model = adapted(LLAMA, "pissa", niter=1, targets=["q_proj", "v_proj"])
    lorary.save(model, tmp_path / "a")
    for seed in (1, 2):
        base = LLAMA.model()
        torch.manual_seed(seed)
        assert torch.equal(outputs(lorary.load(base, tmp_path / "a")), outputs(model))
    if AS_MEASURED:
        there = peft(target_modules=["q_proj", "v_proj"], init_lora_weights="pissa_niter_1")
        there.save_pretrained(str(tmp_path / "b"))
        base = LLAMA.model()
        torch.manual_seed(1)
        again = PeftModel.from_pretrained(base, str(tmp_path / "b")).eval()
        skip_if_right("peft", close_to(outputs(again), outputs(there)))


def test_another_adapter_meets_the_base_as_it_was(tmp_path: Path) -> None:
    """There, an adapter added beside a PiSSA computes on what PiSSA left of the base."""
    plain = outputs(LLAMA.model())
    model = lorary.switch(adapted(LLAMA, "pissa", targets=["q_proj"]), ours())
    assert torch.equal(outputs(model), outputs(lorary.switch(LLAMA.model(), ours())))
    assert torch.equal(outputs(lorary.switch(model, None)), plain)
    if AS_MEASURED:
        there = peft(init_lora_weights="pissa")
        there.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj"]))  # a new one is zero
        there.set_adapter("second")
        skip_if_right("peft", close_to(outputs(there), plain))


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
def test_factors_of_a_base_that_peft_would_change_are_refused_until_converted(init: str, tmp_path: Path) -> None:
    """There, loading subtracts from the base whatever the decomposition gives on this machine."""
    there = peft(init_lora_weights=init)
    config = there.peft_config["default"]
    for folder, change in (("start", 0.0), ("trained", 0.1)):
        with torch.no_grad():
            for n, p in there.named_parameters():
                if "lora_" in n:
                    p.add_(torch.ones_like(p) * change)
        config.init_lora_weights = init if change else True
        there.save_pretrained(str(tmp_path / folder))
    with pytest.raises(FileError, match="save_pretrained with path_initial_model_for_weight_conversion"):
        lorary.load(LLAMA.model(), tmp_path / "trained")
    there.save_pretrained(str(tmp_path / "converted"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    converted = lorary.load(LLAMA.model(), tmp_path / "converted")
    theirs = PeftModel.from_pretrained(LLAMA.model(), str(tmp_path / "converted")).eval()
    close(outputs(converted), outputs(theirs))
    assert lorary.Adapter.of(converted).method.delta.r == 8  # type: ignore[union-attr]


def test_a_converted_dora_that_lost_its_magnitudes_is_refused(tmp_path: Path) -> None:
    """There, the conversion of a PiSSA with magnitudes drops them, and loading it says nothing."""
    there = peft(init_lora_weights="pissa", use_dora=True)
    there.peft_config["default"].init_lora_weights = True
    there.save_pretrained(str(tmp_path / "start"))
    there.peft_config["default"].init_lora_weights = "pissa"
    there.save_pretrained(str(tmp_path / "a"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    with pytest.raises(FileError, match=r"lora_magnitude_vector: is missing"):
        lorary.load(LLAMA.model(), tmp_path / "a")
    model = adapted(LLAMA, "pissa", "dora", targets=["q_proj"])
    lorary.adapters.export_peft(lorary.Adapter.of(model), tmp_path / "b")
    written = load_file(tmp_path / "b/adapter_model.safetensors")
    assert any(name.endswith("lora_magnitude_vector.weight") for name in written)
    close(outputs(PeftModel.from_pretrained(LLAMA.model(), str(tmp_path / "b")).eval()), outputs(model))


# --- VeRA, LoRA-FA, exchanging -----------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [4, 8])
def test_veras_of_any_rank_follow_each_other(r: int) -> None:
    """There, a second one of smaller rank crashes in its forward pass, and one of larger rank is refused."""
    first, second = (lorary.Adapter.of(models.vera(LLAMA, r=n, targets=["q_proj"])) for n in (6, r))
    model = lorary.switch(LLAMA.model(), first)
    lorary.switch(model, second)
    assert torch.equal(outputs(model), outputs(models.vera(LLAMA, r=r, targets=["q_proj"])))
    both = lorary.Adapter.of(lorary.switch(model, [first, second]))
    torch.testing.assert_close(update(both), update(first) + update(second))
    if AS_MEASURED:
        there = cast(Any, get_peft_model(LLAMA.model(), VeraConfig(r=6, target_modules=["q_proj"])))

        def second() -> None:
            there.add_adapter("second", VeraConfig(r=r, target_modules=["q_proj"]))
            there.set_adapter("second")
            outputs(there)

        with skip_if_it_works("peft"):
            second()


@pytest.mark.parametrize("names", [("lora-fa",), ("lora-fa", "dora")], ids="+".join)
def test_a_frozen_a_trains_the_rest_of_every_layer(names: tuple[str, ...]) -> None:
    """There, the optimizer that freezes A fails beside magnitudes or a second adapter, and keys its state by texts."""
    model = LLAMA.model()
    lorary.attach(model, lorary.plan(model, lorary.method(*names, r=4), targets=["q_proj"]))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(lorary.param_groups(model, lr=1e-2))
    cast(Any, model)(models.ids(), labels=models.ids()).loss.backward()
    optimizer.step()
    moved = {n.rpartition(".")[2] for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == ({"B", "m"} if "dora" in names else {"B"})
    assert all(isinstance(key, nn.Parameter) for key in optimizer.state)
    if AS_MEASURED and "dora" in names:
        there = peft(use_dora=True)
        step = create_lorafa_optimizer(there, r=4, lora_alpha=8, lr=1e-2)
        there(models.ids(), labels=models.ids()).loss.backward()
        with skip_if_it_works("peft"):
            step.step()


def test_an_embedding_that_would_never_train_is_refused() -> None:
    """There, the optimizer that freezes A leaves embeddings as they are without a word."""
    model = LLAMA.model()
    with pytest.raises(PlanError, match="starts at zero in a layer of kind embedding and is frozen"):
        lorary.plan(model, lorary.method("lora-fa", r=4), targets=["embed_tokens"])
    if AS_MEASURED:
        there = cast(Any, get_peft_model(model, LoraConfig(r=4, target_modules=["embed_tokens"])))
        step = create_lorafa_optimizer(there, r=4, lora_alpha=8, lr=1e-2)
        before = [p.detach().clone() for n, p in there.named_parameters() if "lora_" in n]
        there(models.ids(), labels=models.ids()).loss.backward()
        step.step()
        after = [p for n, p in there.named_parameters() if "lora_" in n]
        skip_if_right("peft", not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)))


def test_adapters_are_exchanged_with_their_ranks_alphas_and_magnitudes() -> None:
    """There, exchanging in place ignores or refuses patterns of ranks and alphas, and fails on magnitudes."""
    words: dict[str, Any] = {"targets": ["q_proj", "v_proj"]}
    several = [
        adapted(LLAMA, **words),
        adapted(LLAMA, ranks={"q_proj": 2}, alphas={"v_proj": 32}, **words),
        adapted(LLAMA, "dora", "rslora", **words),
    ]
    model = LLAMA.model()
    for one in several:
        assert torch.equal(outputs(lorary.switch(model, lorary.Adapter.of(one))), outputs(one))


@pytest.mark.skipif(not AS_MEASURED, reason="what PEFT 0.21.2 does")
def test_there_exchanging_fails_on_magnitudes(tmp_path: Path) -> None:
    peft(use_dora=True).save_pretrained(str(tmp_path))
    with skip_if_it_works("peft"):
        hotswap_adapter(PeftModel.from_pretrained(LLAMA.model(), str(tmp_path)), str(tmp_path), "default")


# --- the life of an adapter --------------------------------------------------------------------------------------


def test_a_forward_pass_that_fails_leaves_nothing_behind() -> None:
    """There, hooks stay when a forward pass with names of adapters fails, and later answers are wrong."""
    model = adapted(LLAMA, targets=["q_proj"])
    before = outputs(model)
    with pytest.raises(IndexError), torch.no_grad():
        model(torch.tensor([[10**6]]))
    with pytest.raises(IndexError), lorary.disabled(model), torch.no_grad():
        model(torch.tensor([[10**6]]))
    assert torch.equal(outputs(model), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_classifiers_adapter_learns_in_32_bits() -> None:
    """There, adding an adapter to a classifier drops the wish for 32 bits."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, vocab_size=30, num_key_value_heads=2, pad_token_id=0)
    model = LlamaForSequenceClassification(config).bfloat16()
    lorary.attach(model, lorary.plan(model, lorary.method("dora", r=2, full=("score",)), targets=["q_proj"]))
    learnt = [p for n, p in model.named_parameters() if ".params." in n]
    assert learnt
    assert {p.dtype for p in learnt} == {torch.float32}


def test_what_trains_is_named_by_whole_components() -> None:
    """There, an inference adapter called `a` freezes the trained adapter `abc`: names are looked for inside names."""
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "abc": nn.Linear(4, 4), "base": nn.Linear(4, 4)})
    lorary.attach(model, lorary.plan(model, lorary.method("lora", r=2, full=("a",)), targets=["base"]))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"a.weight", "a.bias", "base.params.A", "base.params.B"}


def test_left_over_tensors_are_refused(tmp_path: Path) -> None:
    """There, whatever matches nothing is dropped without a word."""
    peft().save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_model.safetensors"
    save_file(
        load_file(path) | {"base_model.model.model.layers.0.self_attn.q_porj.lora_A.weight": torch.ones(4, 16)}, path
    )
    with pytest.raises(FileError, match=r"q_porj\.lora_A\.weight: adapts a module that the model does not have"):
        lorary.load(LLAMA.model(), tmp_path)
    if AS_MEASURED:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            PeftModel.from_pretrained(LLAMA.model(), str(tmp_path))
        skip_if_right("peft", any("q_porj" in str(warning.message) for warning in told))


def test_what_was_said_stays_as_it_was_said(tmp_path: Path) -> None:
    """There, a user's configuration is rewritten to fit the layers."""
    method = lorary.method("dora", "rslora", r=4, alpha=6)
    said = copy.deepcopy(method)
    model = GPT2.model()
    planned = lorary.plan(model, method, targets=["c_fc"])
    placed = planned.sites
    lorary.save(lorary.attach(model, planned), tmp_path)
    assert method == said
    assert planned.sites == placed
    if AS_MEASURED:
        words = LoraConfig(r=4, target_modules=["c_fc"])
        get_peft_model(GPT2.model(), words)
        skip_if_right("peft", words.fan_in_fan_out is False)


def test_an_adapter_for_inference_never_trains(tmp_path: Path) -> None:
    """There, choosing an adapter for inference makes it trainable again."""
    lorary.save(adapted(LLAMA, "dora", targets=["q_proj"]), tmp_path / "a")
    model = lorary.load(LLAMA.model(), tmp_path / "a")
    assert not trains(model)
    lorary.switch(model, lorary.load_adapter(tmp_path / "a"))
    assert not trains(model)
    if AS_MEASURED:
        peft().save_pretrained(str(tmp_path / "b"))
        there = PeftModel.from_pretrained(LLAMA.model(), str(tmp_path / "b"))
        there.set_adapter("default")
        skip_if_right("peft", not trains(there))


class Named(nn.Module):
    """Modules whose names are made of the very parts that names in PEFT's files have."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        self.lora = nn.ModuleDict(
            {"lora_A": nn.Linear(8, 8), "base_layer": nn.Linear(8, 8), "default": nn.Linear(8, 8)}
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.embed(tokens)
        for layer in self.lora.values():
            x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("name", ["lora", "dora", "vera", "pissa"])
def test_names_made_of_the_formats_own_parts_are_read_back(name: str, tmp_path: Path) -> None:
    """There, an adapter whose name holds the prefix of the tensors' names could not be loaded again."""
    base = Base("named", Named, ("lora.lora_A", "lora.base_layer", "lora.default"), "", "")
    model = models.vera(base) if name == "vera" else adapted(base, name)
    for folder in (tmp_path / "lora", tmp_path / "lora_A.default"):
        lorary.save(model, folder)
        assert torch.equal(outputs(lorary.load(base.model(), folder)), outputs(model))
        (folder / "lorary.json").unlink()
        if (folder / "adapter_config.json").exists():
            close(outputs(lorary.load(base.model(), folder)), outputs(model))


# --- AdaLoRA -----------------------------------------------------------------------------------------------------


def adalora(**words: Any) -> nn.Module:
    """The base with a filled AdaLoRA on it, in evaluation mode."""
    model = LLAMA.model()
    method = lorary.method("adalora", **({"r": 4, "target": 2} | words))
    lorary.attach(model, lorary.plan(model, method, targets=["q_proj"]))
    fill(p for n, p in model.named_parameters() if ".params." in n)
    return model.eval()


def ada_peft(**words: Any) -> Any:
    """The same in PEFT."""
    words = {"init_r": 4, "target_r": 2, "lora_alpha": 32, "total_step": 10, "target_modules": ["q_proj"]} | words
    model = cast(Any, get_peft_model(LLAMA.model(), AdaLoraConfig(**words))).eval()
    fill(p for n, p in model.named_parameters() if "lora_" in n)
    return model


def loss(model: Any) -> Tensor:
    with torch.no_grad():
        return cast(Tensor, model(models.ids(), labels=models.ids()).loss)


def entropy(model: nn.Module) -> Tensor:
    """What the loss has to be: of the logits alone."""
    logits = outputs(model)[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), models.ids()[:, 1:].flatten())


def test_the_orthogonality_term_trains_whatever_a_models_task_is() -> None:
    """There, it is left out where no task is named, without a word."""
    model = adalora(orthogonality=0.5)
    penalty = lorary.rules(model, 10, torch.optim.SGD(lorary.param_groups(model, lr=0.1))).penalty()
    adapter = lorary.Adapter.of(model)
    gaps = [
        torch.linalg.matrix_norm(M @ M.T - torch.eye(4))
        for roles in adapter.tensors.values()
        for M in (roles["P"].T, roles["Q"])
    ]
    torch.testing.assert_close(torch.as_tensor(penalty), 0.5 * torch.stack(gaps).mean())
    if AS_MEASURED:
        silent, named = (loss(ada_peft(orth_reg_weight=0.5, task_type=task)) for task in (None, "CAUSAL_LM"))
        skip_if_right("peft", close_to(silent, named))


def test_a_loss_that_is_looked_at_holds_no_term_of_training() -> None:
    """There, with a task named, the term is in the loss of an evaluation, too."""
    model = adalora(orthogonality=5.0)
    torch.testing.assert_close(loss(model), entropy(model))
    if AS_MEASURED:
        there = ada_peft(orth_reg_weight=5.0, task_type="CAUSAL_LM")
        skip_if_right("peft", close_to(loss(there), entropy(there)))


def test_an_adalora_for_inference_gives_a_loss(tmp_path: Path) -> None:
    """There, one that was loaded for inference fails as soon as it is given labels."""
    model = adalora()
    lorary.save(model, tmp_path / "a")
    torch.testing.assert_close(loss(lorary.load(LLAMA.model(), tmp_path / "a")), loss(model))
    if AS_MEASURED:
        ada_peft(task_type="CAUSAL_LM").save_pretrained(str(tmp_path / "b"))
        there = PeftModel.from_pretrained(LLAMA.model(), str(tmp_path / "b"))
        with skip_if_it_works("peft"):
            loss(there)


def test_adaloras_add_up() -> None:
    """There, adapters of this method can neither be summed nor be chosen by name for each row of a batch."""
    first, second = lorary.Adapter.of(adalora()), lorary.Adapter.of(adalora(r=3, alpha=7))
    total = lorary.Adapter.of(lorary.switch(LLAMA.model(), [first, second]))
    torch.testing.assert_close(update(total), update(first) + update(second))
    if AS_MEASURED:
        there = ada_peft()
        with skip_if_it_works("peft"):
            there.add_weighted_adapter(["default"], [1.0], "sum")
        with skip_if_it_works("peft"):
            there(models.ids(), adapter_names=["default", "default"])


IGNORED: list[tuple[dict[str, Any], str]] = [
    ({"use_rslora": True}, "use_rslora: is true, and PEFT's AdaLoRA computes without it"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights: is 'pissa', and PEFT's AdaLoRA computes without it"),
    ({"alpha_pattern": {"q_proj": 99}}, 'alpha_pattern: is {"q_proj": 99}, and PEFT\'s AdaLoRA computes without it'),
]


@pytest.mark.parametrize(("words", "what"), IGNORED, ids=[next(iter(words)) for words, _ in IGNORED])
def test_what_adalora_would_ignore_is_told(words: dict[str, Any], what: str, tmp_path: Path) -> None:
    """There, another scale, another start and alphas of layers are taken and left out without a word."""
    there = ada_peft(**words)
    there.save_pretrained(str(tmp_path))
    with pytest.raises(FileError) as caught:
        lorary.load(LLAMA.model(), tmp_path)
    assert str(caught.value).splitlines()[1:] == [f"  - adapter_config.json: {what}"]
    model = lorary.load(LLAMA.model(), tmp_path, strict=False)
    close(outputs(model), outputs(there))
    if AS_MEASURED:
        skip_if_right("peft", not torch.equal(outputs(there), outputs(ada_peft())))


def test_another_scale_or_start_of_adalora_is_refused_or_taken() -> None:
    """Here they are words of a method: two on one axis contradict each other, and an alpha of a layer is its own."""
    for other, axis in (("rslora", "scale"), ("pissa", "init")):
        with pytest.raises(MethodError, match=axis):
            lorary.method("adalora", other)
    model = LLAMA.model()
    plan = lorary.plan(model, lorary.method("adalora", r=4, target=2), ["q_proj"], alphas={"layers.1.*": 99})
    assert [p.scale for p in plan.sites] == [32 / 4.00001, 99 / 4.00001]


def test_the_rank_of_adalora_is_the_one_that_was_said(tmp_path: Path) -> None:
    """There, `r` is another method's, and the number that counts is `init_r`; the file holds both."""
    there = ada_peft(r=6)
    there.save_pretrained(str(tmp_path))
    model = lorary.load(LLAMA.model(), tmp_path)
    close(outputs(model), outputs(there))
    assert {p.r for p in lorary.Adapter.of(model).sites} == {4}
    assert {p.r for p in lorary.Adapter.of(adalora(r=6)).sites} == {6}


def test_a_budgets_statistics_are_part_of_a_runs_state() -> None:
    """There, what the scores are made of is not saved, and a run that goes on starts them anew."""
    model = adalora().train()
    optimizer = torch.optim.AdamW(lorary.param_groups(model, lr=1e-2))
    rules = lorary.rules(model, 10, optimizer)
    (cast(Any, model)(models.ids(), labels=models.ids()).loss + rules.penalty()).backward()
    rules.after_backward()
    optimizer.step()
    rules.after_step()
    state = rules.state_dict()
    sensitivity = [t for name, t in state.items() if "I|" in name]
    assert len(sensitivity) == 6
    assert all(t.any() for t in sensitivity)
    again = lorary.rules(model, 10, optimizer, state=state).state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], t) for name, t in state.items())
    if AS_MEASURED:
        skip_if_right("peft", any("ipt" in name for name in ada_peft().state_dict()))


def test_names_in_paths_are_never_taken_for_an_adapters(tmp_path: Path) -> None:
    """There, a mask of a layer whose path holds the adapter's name is looked for one module too high."""
    base = Base("named", Named, ("lora.default", "lora.base_layer"), "", "")
    model = base.model()
    plan = lorary.plan(model, lorary.method("adalora", r=4, target=2), targets=["lora.default", "lora.base_layer"])
    small = tuple(dataclasses.replace(p, method=p.method.replace(delta=SVDDelta(4, kept=2))) for p in plan.sites)
    lorary.attach(model, dataclasses.replace(plan, sites=small))
    fill(p for n, p in model.named_parameters() if ".params." in n)
    lorary.save(model.eval(), tmp_path)
    assert not (tmp_path / "adapter_config.json").exists(), "PEFT could not load it"
    assert torch.equal(outputs(lorary.load(base.model(), tmp_path)), outputs(model))
    if AS_MEASURED:
        there = get_peft_model(base.model(), AdaLoraConfig(init_r=4, total_step=10, target_modules=["lora.default"]))
        with skip_if_it_works("peft"):
            cast(Any, there).base_model.resize_modules_by_rank_pattern(
                {"lora.default.lora_E": [True, True, False, False]}, "default"
            )
