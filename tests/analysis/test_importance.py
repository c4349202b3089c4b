"""LoRA-drop: importance against the dense formula, what is kept, and which layers share what."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.analysis.importance import drop_layers, layer_importance
from lorary.errors import DataError, FileError, LoraryError, MethodError, PlanError, StateError
from lorary.layers.adapted import adapted_layers
from lorary.layers.module_kinds import ModulePosition, module_positions
from lorary.methods.lora_drop import Importance, Measured, squared_norms
from tests import tiny
from tests.tiny import shaken

IDS = torch.tensor([[1, 5, 7, 5, 2], [3, 9, 4, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
BATCH = {"input_ids": IDS, "attention_mask": MASK}


def trained(model: Any, *presets: str, targets: Any = "all-linear", **options: Any) -> Any:
    method = lorary.method(*(presets or ("lora",)), **({"r": 2} | options))
    lorary.attach(model, lorary.plan(model, method, targets))
    return shaken(model)


def slow(model: nn.Module, batch: Any, mask: Tensor | None) -> dict[str, tuple[float, float]]:
    """site -> (g, |W x|^2) by the dense change of the weight, one row after the other, in 64 bits."""
    found = {name: [0.0, 0.0] for name in adapted_layers(model)}
    model.eval()

    def hook(layer: Any, inputs: Any, _: Any) -> None:
        base = layer.base
        W = layer.kind.matrix(base).detach().double()
        B, A = (factor.detach().double() for factor in layer.factors())
        change, whole = layer.scale * B @ A, W
        if (start := layer.start_factors()) is not None:
            B0, A0 = (factor.double() for factor in start)
            change, whole = change - layer.scale * B0 @ A0, W + layer.scale * B0 @ A0
        x = inputs[0].double() if inputs[0].is_floating_point() else inputs[0]
        for i, matrix in enumerate((change, whole)):
            y = layer.kind.run(base, x, matrix, None)
            if layer.site.kernel_size:
                y = y.movedim(-len(layer.site.kernel_size) - 1, -1)
            if layer.site.parts:
                y = y[..., torch.cat([part.rows() for part in layer.site.parts])]
            rows = y.reshape(-1, y.shape[-1])
            counts = [True] * len(rows) if mask is None or len(rows) != mask.numel() else mask.flatten().tolist()
            found[layer.site.name][i] += sum(float(row @ row) for row, c in zip(rows, counts, strict=True) if c)

    hooks = [layer.register_forward_hook(hook) for layer in adapted_layers(model).values()]
    with torch.no_grad():
        model(**batch) if isinstance(batch, dict) else model(batch)
    for h in hooks:
        h.remove()
    return {name: (g, whole) for name, (g, whole) in found.items()}


CASES = {
    "llama": ("LlamaForCausalLM", ["all-linear", "embedding", "lm_head"], ("lora",)),
    "gpt2, one matrix for three": ("GPT2LMHeadModel", ["attention-qv", "mlp"], ("lora",)),
    "gpt2, table": ("GPT2LMHeadModel", ["c_attn", "wte"], ("rslora",)),
    "scaled embedding": ("Gemma3ForCausalLM", ["embedding", "q_proj"], ("lora",)),
    "moved base": ("LlamaForCausalLM", ["all-linear"], ("pissa",)),
    "blocks": ("LlamaForCausalLM", ["attention"], ("melora",)),
    "side by side": ("LlamaForCausalLM", ["attention"], ("multilora",)),
    "pooled rows": ("BertForSequenceClassification", ["attention", "pooler.dense"], ("lora",)),
}


@pytest.mark.parametrize("case", CASES)
def test_importance_is_the_dense_sum_without_padding(case: str) -> None:
    name, targets, presets = CASES[case]
    model = trained(tiny.seeded(name).double(), *presets, targets=targets)
    found, reference = layer_importance(model, [BATCH]), slow(model, BATCH, MASK)
    assert list(found.g) == list(reference) == list(adapted_layers(model))
    for m in found.measured:
        g, whole = reference[m.site]
        assert m.g == pytest.approx(g, rel=1e-5)
        assert m.relative == pytest.approx((g / whole) ** 0.5, rel=1e-5)
    assert sum(found.I.values()) == pytest.approx(1.0)
    assert found.tokens == 8


def test_convolutions_of_every_sort_are_measured() -> None:
    torch.manual_seed(1)
    model = trained(tiny.ConvNet().double(), targets=["conv", "head"])
    x = torch.randn(3, 3, 9, 9).double()
    found, reference = layer_importance(model, [x, (x[:1],)]), slow(model, x, None)
    one = slow(model, x[:1], None)
    for m in found.measured:
        assert m.g == pytest.approx(reference[m.site][0] + one[m.site][0], rel=1e-5)


def test_the_output_is_never_needed() -> None:
    torch.manual_seed(2)
    z, B = torch.randn(4, 3, 6).double(), torch.randn(10, 3).double()
    direct = torch.stack([(z[..., :3] @ B[:5].T).square().sum(-1), (z[..., 3:] @ B[5:].T).square().sum(-1)]).sum(0)
    assert torch.allclose(squared_norms(z, B, 0.5, groups=2), direct / 4)


def test_importance_is_in_32_bits_for_a_16_bit_base() -> None:
    model = trained(tiny.seeded("LlamaForCausalLM").to(torch.bfloat16))
    found, reference = layer_importance(model, [BATCH]), slow(model, BATCH, MASK)
    for m in found.measured:
        assert m.g == pytest.approx(reference[m.site][0], rel=1e-4)


def test_the_model_is_as_before() -> None:
    model = trained(tiny.llama(), dropout=0.5).train()
    before, hooks = tiny.frozen_copy(model), [len(m._forward_hooks) for m in model.modules()]
    first, second = layer_importance(model, [BATCH]), layer_importance(model, [BATCH])
    assert first == second, "dropout was on"
    assert model.training
    assert all(module.training for module in model.modules())
    assert tiny.same(before, tiny.frozen_copy(model))
    assert hooks == [len(m._forward_hooks) for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())


def test_padding_moves_nothing() -> None:
    model = trained(tiny.llama())
    other = {"input_ids": IDS.where(MASK.bool(), 33), "attention_mask": MASK}
    assert layer_importance(model, [BATCH]).g == pytest.approx(layer_importance(model, [other]).g, rel=1e-6)
    whole = layer_importance(model, [{"input_ids": IDS}])
    assert whole.tokens == 10
    assert whole.g != pytest.approx(layer_importance(model, [BATCH]).g, rel=1e-3)


class Flat(nn.Module):
    """What some models do on the way: all tokens in one line, or only some of them."""

    def __init__(self, some: bool = False) -> None:
        super().__init__()
        self.table, self.up, self.some = nn.Embedding(40, 6), nn.Linear(6, 4), some

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.table(input_ids).flatten(0, 1)
        y: Tensor = self.up(x[:7] if self.some else x)
        return y


def test_tokens_in_one_line_are_masked_too() -> None:
    model = trained(Flat().double(), targets=["up"])
    assert layer_importance(model, [BATCH]).g["up"] == pytest.approx(slow(model, BATCH, MASK)["up"][0])


def test_rows_that_fit_no_mask_are_refused_and_pass_where_nothing_is_padded() -> None:
    model = trained(Flat(some=True), targets=["up"])
    with pytest.raises(DataError) as caught:
        layer_importance(model, [BATCH])
    assert str(caught.value) == (
        "cannot tell padding from tokens:\n"
        "  - up: has inputs of shape [7], which an attention mask of [2, 5] does not fit\n"
        "      hint: measure on batches without padding, such as one row each"
    )
    assert layer_importance(model, [BATCH | {"attention_mask": torch.ones_like(MASK)}]).g["up"] > 0


def test_both_sides_of_a_translation_have_padding_of_their_own() -> None:
    model = trained(tiny.seeded("T5ForConditionalGeneration").double())
    batch = BATCH | {"decoder_input_ids": IDS[:, :3], "decoder_attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    found = layer_importance(model, [batch])
    other = layer_importance(model, [batch | {"decoder_input_ids": torch.tensor([[1, 5, 33], [3, 9, 4]])}])
    assert found.g == pytest.approx(other.g, rel=1e-6)
    with pytest.raises(DataError, match="decoder_attention_mask: is missing"):
        layer_importance(model, [BATCH | {"decoder_input_ids": IDS}])
    with pytest.raises(DataError, match="has inputs that both masks of the batch fit, but the masks differ"):
        layer_importance(model, [BATCH | {"decoder_input_ids": IDS, "decoder_attention_mask": MASK.flip(0)}])


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(StateError, match="no adapter is attached"):
        layer_importance(tiny.llama(), [BATCH])
    fresh = tiny.llama()
    lorary.attach(fresh, lorary.plan(fresh, lorary.method("lora", r=2)))
    with pytest.raises(StateError, match="nothing is trained yet"):
        layer_importance(fresh, [BATCH])
    with pytest.raises(DataError, match="batches: there is none"):
        layer_importance(fresh, [])
    with pytest.raises(DataError, match=r"attention_mask: has the shape \[2, 1, 5, 5\], expected \[batch, tokens\]"):
        layer_importance(fresh, [{"input_ids": IDS, "attention_mask": torch.ones(2, 1, 5, 5)}])
    added = torch.zeros(2, 5).masked_fill(torch.tensor([[0, 0, 0, 1, 1]]).bool(), -1e9)  # 0 where there is a token
    with pytest.raises(DataError, match="attention_mask: holds other values than 0 and 1"):
        layer_importance(fresh, [{"input_ids": IDS, "attention_mask": added}])
    broken = trained(tiny.llama())
    with torch.no_grad():
        broken.model.layers[0].self_attn.v_proj.params["B"].fill_(torch.inf)
    with pytest.raises(StateError, match="its outputs are not finite"):
        layer_importance(broken, [BATCH])


REFUSED = {
    "dora": "join: MagnitudeDirection changes a layer's output by more than s B A x, which is what is measured",
    "glora": "join: GLoRAJoin changes a layer's output by more than s B A x, which is what is measured",
    "vera": "delta: all layers share {A, B} of SharedProjectionDelta already",
    "pissa": "init: SVDInit starts each layer from its own weight, and layers that share start alike",
    "bitfit": "method: adapts no layers: there are none to choose from",
}


@pytest.mark.parametrize("name", REFUSED)
def test_methods_that_cannot_share_are_refused(name: str) -> None:
    model = tiny.seeded("BertForSequenceClassification")
    plan = lorary.plan(model, lorary.method(name, **({} if name == "bitfit" else {"r": 2})))
    with pytest.raises(PlanError) as caught:
        drop_layers(plan, Importance(tuple(Measured(p.site.name, 1.0, 1.0) for p in plan.sites)))
    assert f"  - {REFUSED[name]}" in str(caught.value)


def test_its_name_is_no_preset() -> None:
    for name in ("lora-drop", "LoRA-drop", "lora_drop"):
        with pytest.raises(MethodError) as caught:
            lorary.method("lora", name)
        assert str(caught.value) == (
            f"invalid method:\n  - {name!r}: is not a method: it chooses layers for one\n"
            "      hint: write `drop: {threshold: 0.9}` under `method:` in a configuration, or call lorary.drop_layers"
        )


# --- what is kept ---------------------------------------------------------------------------------------------------


def made(g: dict[str, float]) -> Importance:
    return Importance(tuple(Measured(site, value, 1.0) for site, value in g.items()))


LAYERS = {f"layers.{i}.q": g for i, g in enumerate([1.0, 5.0, 3.0, 1.0])}


def test_the_fewest_are_kept_that_reach_the_threshold() -> None:
    found = made(LAYERS)
    assert found.kept(0.5) == {"layers.1.q"}
    assert found.kept(0.51) == {"layers.1.q", "layers.2.q"}
    assert found.kept(0.8) == {"layers.1.q", "layers.2.q"}
    assert found.kept(0.9) == {"layers.1.q", "layers.2.q", "layers.0.q"}, "equal ones go by name"
    assert found.kept(1e-9) == {"layers.1.q"}
    assert found.kept(1.0) == made(LAYERS | {"layers.4.q": 0.0}).kept(1) - {"layers.4.q"} == set(LAYERS)


def test_the_order_of_the_layers_changes_nothing() -> None:
    turned = made(dict(reversed(LAYERS.items())))
    for threshold in (0.3, 0.6, 0.9):
        assert turned.kept(threshold) == made(LAYERS).kept(threshold)
    assert turned.I == made(LAYERS).I


def test_kinds_are_ranked_apart() -> None:
    small = {name.replace(".q", ".v"): g / 1000 for name, g in LAYERS.items()}
    found = made(LAYERS | small)
    assert found.kept(0.8) == {"layers.1.q", "layers.2.q", "layers.1.v", "layers.2.v"}
    assert found.within["layers.1.v"] == pytest.approx(0.5)
    assert sum(found.I.values()) == pytest.approx(1)
    assert found.I["layers.1.v"] == pytest.approx(0.0005 / 1.001)


def test_where_nothing_was_learnt_nothing_is_kept() -> None:
    assert made(LAYERS | dict.fromkeys(("layers.0.v", "layers.1.v"), 0.0)).kept(0.8) == {"layers.1.q", "layers.2.q"}


def test_module_kinds_are_the_ends_of_paths() -> None:
    names = [f"encoder.{i}.{part}.dense" for i in (0, 1) for part in ("output", "attention.output")]
    names += ["decoder.3.layer.0.q", "decoder.4.layer.0.q", "stages.0.blocks.1.k", "stages.1.blocks.0.k", "head"]
    assert list(module_positions(names).values()) == [
        ModulePosition("#.output.dense", (0,)),
        ModulePosition("attention.output.dense", (0,)),
        ModulePosition("#.output.dense", (1,)),
        ModulePosition("attention.output.dense", (1,)),
        ModulePosition("q", (3,)),
        ModulePosition("q", (4,)),
        ModulePosition("k", (0, 1)),
        ModulePosition("k", (1, 0)),
        ModulePosition("head", ()),
    ]


def test_importance_prints_and_goes_through_json() -> None:
    found = Importance((Measured("layers.0.q", 1.0, 0.25), Measured("layers.1.q", 3.0, 0.5)), tokens=12)
    again = Importance.from_dict(json.loads(json.dumps(found.to_dict())))
    assert (again, again.tokens) == (found, 12)
    assert found.to_dict()["sites"]["layers.1.q"] == {"g": 3.0, "I": 0.75, "relative": 0.5}
    assert str(found) == (
        "site        g       I  of its kind  |s B A x| / |W x|\n"
        "-----------------------------------------------------\n"
        "layers.1.q  3  75.00%       75.00%                0.5\n"
        "layers.0.q  1  25.00%       25.00%               0.25"
    )


@pytest.mark.parametrize(
    "data",
    [
        None,
        {"tokens": 3},
        {"tokens": 3, "sites": {}},
        {"tokens": 3, "sites": {"q": 4}},
        {"tokens": 3, "sites": {"q": {"g": -1.0, "relative": 1.0}}},
        {"tokens": 3, "sites": {"q": {"g": float("nan"), "relative": 1.0}}},
        {"tokens": 3, "sites": {"q": {"g": True, "relative": 1.0}}},
        {"tokens": None, "sites": {"q": {"g": 1.0, "relative": 1.0}}},
    ],
)
def test_a_damaged_record_is_refused(data: Any) -> None:
    with pytest.raises(FileError, match="invalid importance record"):
        Importance.from_dict(data)


# --- the plan -------------------------------------------------------------------------------------------------------


def deep(**options: Any) -> Any:
    """The plan of a Llama of four layers."""
    return lorary.plan(tiny.model("LlamaForCausalLM", num_hidden_layers=4), lorary.method("lora", r=2), **options)


def flat(plan: Any, *large: str) -> Importance:
    """Everything is in these layers, and a little in all others."""
    return made({p.site.name: 10.0 if any(n in p.site.name for n in large) else 0.1 for p in plan.sites})


def test_layers_that_are_not_kept_share_one_of_their_kind() -> None:
    plan = deep(targets=["q_proj", "v_proj", "down_proj"])
    new = drop_layers(plan, flat(plan, "layers.1.", "layers.3.self_attn.v"), 0.9)
    shares = {p.site.name.removeprefix("model.layers."): p.share for p in new.sites}
    assert shares == {
        **{f"{i}.self_attn.q_proj": "q_proj" if i != 1 else "" for i in range(4)},
        **{f"{i}.self_attn.v_proj": "v_proj" if i in (0, 2) else "" for i in range(4)},
        **{f"{i}.mlp.down_proj": "down_proj" if i != 1 else "" for i in range(4)},
    }
    assert [p.site for p in new.sites] == [p.site for p in plan.sites]
    r, sizes = 2, {"q": 16 + 16, "v": 16 + 8, "down": 24 + 16}
    assert new.trainable == r * ((1 + 1) * sizes["q"] + (2 + 1) * sizes["v"] + (1 + 1) * sizes["down"])
    assert new.notes[-1] == (
        "LoRA-drop, T = 0.9: 4 of 12 layers have tensors of their own, the other 8 share 3, one for each module kind"
    )


def test_a_threshold_of_one_is_the_plan_itself() -> None:
    plan = deep()
    new = drop_layers(plan, flat(plan), 1.0)
    assert (new.sites, new.trainable) == (plan.sites, plan.trainable)


def test_a_layer_that_would_share_with_none_keeps_its_own() -> None:
    plan = deep(targets=["q_proj"])
    new = drop_layers(plan, made({p.site.name: g for p, g in zip(plan.sites, (4, 4, 4, 0.1), strict=True)}), 0.9)
    assert {p.share for p in new.sites} == {""}


def test_ranks_and_scales_that_differ_do_not_share() -> None:
    plan = deep(targets=["q_proj"], ranks={"*.0.*": 4, "*.1.*": 4}, alphas={"*.3.*": 7.0})
    new = drop_layers(plan, made({p.site.name: g for p, g in zip(plan.sites, (1, 1, 90, 1), strict=True)}), 0.9)
    assert [p.share for p in new.sites] == ["q_proj", "q_proj", "", ""]
    deeper = lorary.plan(
        tiny.model("LlamaForCausalLM", num_hidden_layers=5),
        lorary.method("lora", r=2),
        "q_proj",
        ranks={"*.0.*": 4, "*.1.*": 4},
    )
    apart = drop_layers(
        deeper, made({p.site.name: g for p, g in zip(deeper.sites, (1, 1, 1, 1, 90), strict=True)}), 0.5
    )
    assert [p.share for p in apart.sites] == ["q_proj", "q_proj", "q_proj 2", "q_proj 2", ""]


@pytest.mark.parametrize("threshold", [0, -1, 1.5, float("nan"), True, "0.9"])
def test_a_threshold_that_is_none_is_refused(threshold: Any) -> None:
    plan = deep(targets=["q_proj"])
    with pytest.raises(LoraryError, match="is not a number above 0 and at most 1"):
        drop_layers(plan, flat(plan), threshold)


@pytest.mark.parametrize("g", [float("nan"), float("inf"), -1.0])
def test_an_importance_that_is_no_size_is_refused(g: float) -> None:
    plan = deep(targets=["q_proj"])
    site = plan.sites[1].site.name
    with pytest.raises(
        PlanError, match=re.escape(f"{site}: its importance is {g!r}, not a finite number of at least 0")
    ):
        drop_layers(plan, made({p.site.name: g if p.site.name == site else 1.0 for p in plan.sites}))


def test_the_importance_of_another_model_is_refused() -> None:
    plan = deep(targets=["q_proj"])
    with pytest.raises(PlanError) as caught:
        drop_layers(plan, made({p.site.name.replace("layers.0", "layers.9"): 1.0 for p in plan.sites}))
    assert str(caught.value) == (
        "cannot drop layers from this plan:\n"
        "  - model.layers.0.self_attn.q_proj: is planned, but was not measured\n"
        "  - model.layers.9.self_attn.q_proj: was measured, but is not planned"
    )


def test_the_count_is_the_papers() -> None:
    """LLaMA-2-7B, q and v, r = 8, 14 of 32 layers kept of each kind: 2 * 15 * 8 * (4096 + 4096)."""
    import transformers

    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=32))
    plan = lorary.plan(model, lorary.method("lora", r=8), ["q_proj", "v_proj"])
    assert plan.trainable == 4_194_304
    large = [f"layers.{i}." for i in range(0, 28, 2)]
    assert drop_layers(plan, flat(plan, *large), 0.98).trainable == 1_966_080


# --- layers that share ----------------------------------------------------------------------------------------------


def sharing(dtype: torch.dtype = torch.float64) -> Any:
    """A Llama of four layers, trained a little: layer 1 has its own, the other three share, of two kinds."""
    model = tiny.seeded("LlamaForCausalLM", num_hidden_layers=4).to(dtype)
    plan = lorary.plan(model, lorary.method("lora", r=2), ["q_proj", "down_proj"])
    lorary.attach(model, drop_layers(plan, flat(plan, "layers.1."), 0.9), dtype=dtype)
    return shaken(model)


def _stepped(model: Any, lr: float = 0.1) -> None:
    optimizer = torch.optim.SGD(lorary.param_groups(model, lr=lr), lr=lr)
    for _ in range(3):
        model(**BATCH, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_shared_tensors_stay_one_are_trained_once_and_counted_once() -> None:
    model = sharing()
    layers = [block.self_attn.q_proj for block in model.model.layers]
    assert layers[0].params["A"] is layers[2].params["A"] is layers[3].params["A"] is not layers[1].params["A"]
    trained = [p for p in model.parameters() if p.requires_grad]
    grouped = [p for row in lorary.param_groups(model, lr=1.0) for p in row["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, trained))
    assert len(grouped) == 2 * 2 * 2
    assert sum(p.numel() for p in grouped) == 2 * 2 * (16 + 16 + 24 + 16)
    before = layers[0].params["B"].detach().clone()
    _stepped(model)
    assert layers[0].params["B"] is layers[3].params["B"]
    assert not torch.equal(layers[0].params["B"], before)


def test_a_shared_gradient_is_the_sum_over_its_layers() -> None:
    model, apart = sharing(), sharing()
    for layer in adapted_layers(apart).values():  # the same function with tensors of their own
        layer.params = nn.ParameterDict({role: nn.Parameter(p.detach().clone()) for role, p in layer.params.items()})
    for m in (model, apart):
        m(**BATCH, labels=IDS).loss.backward()
    for role in ("A", "B"):
        for module in ("self_attn.q_proj", "mlp.down_proj"):
            single = [block.get_submodule(module).params[role].grad for block in apart.model.layers]
            shared = model.model.layers[0].get_submodule(module).params[role].grad
            assert torch.allclose(shared, single[0] + single[2] + single[3], rtol=1e-9, atol=1e-15)
            assert torch.allclose(model.model.layers[1].get_submodule(module).params[role].grad, single[1])


def test_one_step_is_that_of_the_written_out_rule() -> None:
    model, apart = sharing(), sharing()
    _stepped(model, lr=0.05)
    for layer in adapted_layers(apart).values():
        layer.params = nn.ParameterDict({role: nn.Parameter(p.detach().clone()) for role, p in layer.params.items()})
    for _ in range(3):
        apart(**BATCH, labels=IDS).loss.backward()
        with torch.no_grad():
            for module in ("self_attn.q_proj", "mlp.down_proj"):
                for role in ("A", "B"):
                    tensors = [block.get_submodule(module).params[role] for block in apart.model.layers]
                    total = sum(tensors[i].grad for i in (0, 2, 3))
                    for i, tensor in enumerate(tensors):
                        tensor -= 0.05 * (tensor.grad if i == 1 else total)
            apart.zero_grad()
    for name, layer in adapted_layers(apart).items():
        for role, p in layer.params.items():
            assert torch.allclose(p, adapted_layers(model)[name].params[role], rtol=1e-8, atol=1e-12)


def test_what_shares_is_saved_merged_and_detached_like_anything_else(tmp_path: Path) -> None:
    model, base = sharing(torch.float32), tiny.seeded("LlamaForCausalLM", num_hidden_layers=4)
    _stepped(model)
    before, plain = tiny.logits(model, **BATCH), tiny.logits(base, **BATCH)
    lorary.save(model, tmp_path / "adapter")
    again = lorary.load(base, tmp_path / "adapter")
    assert torch.equal(tiny.logits(again, **BATCH), before)
    lorary.merge(model, keep=True)
    assert torch.allclose(tiny.logits(model, **BATCH), before, atol=1e-5)
    lorary.unmerge(model)
    assert torch.equal(tiny.logits(lorary.detach(model), **BATCH), plain)
