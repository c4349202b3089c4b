"""Adapters on fused experts: every layout of Transformers, every method that works there, and what is refused."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.analysis.memory.predict import predict
from lorary.analysis.memory.workload import Workload
from lorary.errors import FileError, PlanError
from lorary.layers.adapted import adapted_layers
from tests.experts import IDS, MODELS, logits, moe, shake

METHODS: dict[str, tuple[str, ...]] = {
    "lora": ("lora",),
    "rslora": ("lora", "rslora"),
    "lora+": ("lora", "lora+"),
    "lora-fa": ("lora-fa",),
    "pissa": ("pissa",),
    "olora": ("olora",),
    "dora": ("dora",),
    "vera": ("vera",),
    "melora": ("melora",),
    "multilora": ("multilora",),
    "miss": ("miss",),
    "loha": ("loha",),
    "lokr": ("lokr",),
    "adalora": ("adalora",),
    "o-lora": ("o-lora",),
    "delta-lora": ("delta-lora",),
    "ia3": ("ia3",),
}


def method(name: str, **options: Any) -> Any:
    options = {"adalora": {"target": 2}, "delta-lora": {"start": 1}}.get(name, {}) | options
    return lorary.method(*METHODS[name], **({} if name == "ia3" else {"r": 2}), **options)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert list(one) == list(other)
    assert all(torch.equal(t, other[name]) for name, t in one.items())


def close(a: Tensor, b: Tensor, size: float = 1e-4) -> None:
    torch.testing.assert_close(a, b, rtol=size, atol=size)


# --- reach ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_all_linear_reaches_every_expert_and_no_router(name: str) -> None:
    model = moe(name)
    plan = lorary.plan(model, method("lora"))
    experts = {n: p.numel() for n, p in model.named_parameters() if ".experts." in n and p.dim() == 3}
    sites = {p.site.name: p for p in plan.sites if p.site.experts}
    assert sites.keys() == experts.keys()
    assert all(sites[n].site.numbers == numel for n, numel in experts.items())
    for p in sites.values():
        assert p.trainable == p.site.experts * 2 * (p.site.out_features + p.site.in_features)
    assert not [p.site.name for p in plan.sites if p.site.name.endswith((".gate", ".router"))]
    assert not any("experts.down_proj" in note or "up_proj (" in note for note in plan.notes)


@pytest.mark.parametrize("name", MODELS)
def test_a_trained_adapter_merges_unmerges_and_comes_off(name: str) -> None:
    model = moe(name)
    before, base = state(model), logits(model)
    order = [n for n, _ in model.named_parameters()]
    lorary.attach(model, lorary.plan(model, method("lora")))
    assert torch.equal(logits(model), base)
    shake(model)
    live = logits(model)
    assert (live - base).abs().max() > 0.1
    with lorary.disabled(model):
        assert torch.equal(logits(model), base)
    lorary.merge(model, keep=True)
    close(logits(model), live)
    lorary.unmerge(model)
    assert torch.equal(logits(model), live)
    lorary.detach(model)
    same(state(model), before)
    assert [n for n, _ in model.named_parameters()] == order
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM", "Llama4ForCausalLM"])
def test_every_expert_with_a_token_gets_the_gradient_of_its_dense_update(name: str) -> None:
    """The same gradients as through W_e + s B_e A_e written into the weights of a plain model."""
    model = moe(name)
    lorary.attach(model, lorary.plan(model, method("lora"), targets=["experts.gate_up_proj", "experts.down_proj"]))
    shake(model)
    model(input_ids=IDS).logits.square().sum().backward()
    plain = moe(name)
    factors = {}
    for path, layer in adapted_layers(model).items():
        owner, _, leaf = path.rpartition(".")
        A, B = (layer.params[role].detach().clone().requires_grad_() for role in "AB")
        factors[path] = A, B
        weight = plain.get_parameter(path)
        update = layer.scale * (B @ A)
        module = plain.get_submodule(owner)
        del module._parameters[leaf]
        setattr(module, leaf, weight.detach() + (update.mT if layer.base.transposed else update))
    plain.set_experts_implementation("eager")
    plain(input_ids=IDS).logits.square().sum().backward()
    for path, layer in adapted_layers(model).items():
        for role, factor in zip("AB", factors[path], strict=True):
            assert factor.grad is not None
            close(layer.params[role].grad, factor.grad, 2e-3 * float(factor.grad.abs().max()))


def test_an_expert_without_a_token_has_a_gradient_of_exactly_zero() -> None:
    model = moe("MixtralForCausalLM", num_hidden_layers=1, num_local_experts=16)
    lorary.attach(model, lorary.plan(model, method("lora"), targets="experts.down_proj"))
    shake(model)
    routed: list[Tensor] = []
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda _, args: routed.append(args[1]))
    model(input_ids=IDS[:1, :3]).logits.sum().backward()
    used = set(routed[0].flatten().tolist())
    (layer,) = adapted_layers(model).values()
    assert 0 < len(used) < 16
    for e in range(16):
        assert bool(layer.params["B"].grad[e].any()) == (e in used)
        assert bool(layer.params["A"].grad[e].any()) == (e in used)


def test_a_block_without_any_token() -> None:
    model = moe()
    lorary.attach(model, lorary.plan(model, method("lora")))
    experts = model.model.layers[0].mlp.experts
    x = torch.zeros(0, 16, requires_grad=True)
    y = experts(x, torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    assert y.shape == (0, 16)
    y.sum().backward()
    assert all(not p.grad.any() for p in experts.parameters() if p.requires_grad)


# --- methods ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["GptOssForCausalLM", "DeepseekV3ForCausalLM"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_obeys_its_laws_on_experts(name: str, base: str, tmp_path: Path) -> None:
    model = moe(base)
    before, plain = state(model), logits(model)
    plan = lorary.plan(model, method(name), targets=["experts.gate_up_proj", "experts.down_proj"])
    lorary.attach(model, plan)
    close(logits(model), plain)  # a residual base is rounded
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == plan.trainable
    model.train()
    model(input_ids=IDS).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval()
    shake(model, 0.05)
    live = logits(model)
    lorary.save(model, tmp_path / "a")
    torch.testing.assert_close(logits(lorary.load(moe(base), tmp_path / "a")), live, rtol=0, atol=0)
    lorary.merge(model, keep=True)
    close(logits(model), live)
    lorary.unmerge(model)
    lorary.detach(model)
    same(state(model), before)


def test_a_start_of_each_expert_is_that_of_its_own_matrix() -> None:
    model = moe()
    W = model.model.layers[0].mlp.experts.down_proj.detach().clone()
    lorary.attach(model, lorary.plan(model, method("pissa", alpha=2), targets="experts.down_proj"))
    layer = adapted_layers(model)["model.layers.0.mlp.experts.down_proj"]
    for e in range(4):
        U, S, Vh = torch.linalg.svd(W[e])
        best = U[:, :2] * S[:2] @ Vh[:2]
        close(layer.params["B"][e] @ layer.params["A"][e], best)


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM", "Llama4ForCausalLM"])
def test_a_start_from_gradients_is_that_of_each_expert(name: str) -> None:
    """LoRA-GA's factors at an expert are those of a linear layer with its gradient."""
    batch = {"input_ids": torch.arange(40).repeat(2, 1) % 40, "labels": torch.arange(40).repeat(2, 1) % 40}
    plain = moe(name)
    (weight,) = [p for n, p in plain.named_parameters() if n.endswith("layers.0.mlp.experts.down_proj")] or [
        p for n, p in plain.named_parameters() if n.endswith("layers.0.feed_forward.experts.down_proj")
    ]
    plain(**batch).loss.backward()
    model = moe(name)
    before, base = state(model), logits(model)
    plan = lorary.plan(model, lorary.method("lora-ga", r=2, niter=None), "experts.down_proj")
    lorary.attach(model, plan, data=[batch])
    close(logits(model), base, 1e-4 * float(base.abs().max()))
    layer = next(iter(adapted_layers(model).values()))
    gradient = weight.grad.mT if layer.base.transposed else weight.grad
    for e, G in enumerate(gradient):
        U, _, Vh = torch.linalg.svd(G)
        B, A = layer.params["B"][e].detach(), layer.params["A"][e].detach()
        close(A / A.norm(dim=1, keepdim=True) @ Vh[:2].T @ Vh[:2], A / A.norm(dim=1, keepdim=True), 1e-3)
        close(U[:, 2:4] @ U[:, 2:4].T @ B, B, 1e-3 * float(B.abs().max()))
    lorary.detach(model)
    same(state(model), before)


def test_a_start_from_gradients_needs_tokens_for_every_expert() -> None:
    model = moe(num_local_experts=16)
    plan = lorary.plan(model, lorary.method("lora-ga", r=2), "experts.down_proj")
    batch = {"input_ids": IDS[:1, :3], "labels": IDS[:1, :3]}
    with pytest.raises(PlanError, match=r"expert \d+ and \d+ more of 16 had no token of this data"):
        lorary.attach(model, plan, data=[batch])


def test_halves_of_a_fused_parameter_by_the_class_layout() -> None:
    for name, rows in (("MixtralForCausalLM", slice(0, 24)), ("GptOssForCausalLM", slice(0, 48, 2))):
        model = moe(name)
        lorary.attach(model, lorary.plan(model, method("lora"), targets="experts.gate_up_proj[gate]"))
        shake(model)
        live = logits(model)
        weight = copy.deepcopy(adapted_layers(model)["model.layers.0.mlp.experts.gate_up_proj"].matrix)
        lorary.merge(model)
        close(logits(model), live)
        merged = model.model.layers[0].mlp.experts.gate_up_proj
        changed = ((merged.mT if name.startswith("Gpt") else merged) - weight).abs().sum((0, 2)) > 0
        expected = torch.zeros(48, dtype=torch.bool)
        expected[rows] = True
        assert torch.equal(changed, expected)


def test_square_experts_are_not_transposed() -> None:
    """Gate and up of 8 each give [16, 16] matrices, which would fit either way round."""
    model = moe("GptOssForCausalLM", intermediate_size=8)
    assert model.model.layers[0].mlp.experts.gate_up_proj.shape[1:] == (16, 16)
    lorary.attach(model, lorary.plan(model, method("dora")))
    shake(model)
    live = logits(model)
    lorary.merge(model)
    close(logits(model), live)


def test_shared_and_routed_experts_of_one_name() -> None:
    plan = lorary.plan(moe("NemotronHForCausalLM"), method("lora"), targets="up_proj")
    assert [p.site.name for p in plan.sites] == [
        f"model.layers.{layer}.mixer.{which}.up_proj" for layer in (0, 2) for which in ("experts", "shared_experts")
    ]
    assert "4 experts" in plan.sites[0].site.matrix


def test_a_projection_of_experts_is_named_and_so_refused() -> None:
    """Not left out in silence, as by a preset."""
    with pytest.raises(PlanError, match="Bottleneck has no form for fused experts yet"):
        lorary.plan(moe(), lorary.method("houlsby"), "experts.gate_up_proj[gate]")


def test_a_preset_leaves_out_the_experts_that_a_method_cannot_adapt_and_says_so() -> None:
    plan = lorary.plan(moe(), lorary.method("delta-lora", r=2, mode="paper"))
    assert not any(p.site.experts for p in plan.sites)
    (note,) = [note for note in plan.notes if "experts" in note]
    assert note == (
        "the presets leave out model.layers.{0-1}.mlp.experts.gate_up_proj, model.layers.{0-1}.mlp.experts.down_proj: "
        "DeltaLoRAPaperRule has no form for fused experts yet"
    )


def test_ia3_rescales_the_inputs_of_the_last_matrix_and_the_outputs_of_others() -> None:
    plan = lorary.plan(moe(), method("ia3"))
    vectors = {p.site.name: p.shapes for p in plan.sites if p.site.experts}
    assert set(vectors) == {f"model.layers.{i}.mlp.experts.down_proj" for i in (0, 1)}
    assert all(shapes == {"l_ff": (4, 24)} for shapes in vectors.values())


# --- the model around them --------------------------------------------------------------------------------------------


def test_experts_of_another_implementation_come_back_to_it() -> None:
    model = moe()
    model.set_experts_implementation("eager")
    base = logits(model)
    lorary.attach(model, lorary.plan(model, method("lora")))
    close(logits(model), base)
    assert model.config._experts_implementation == "eager"
    lorary.detach(model)
    assert torch.equal(logits(model), base)
    assert model.model.layers[0].mlp.experts.config is model.config


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "Llama4ForCausalLM"])
def test_copies_and_pickles_compute_with_their_own_adapter(name: str) -> None:
    model = moe(name)
    lorary.attach(model, lorary.plan(model, method("lora")))
    shake(model)
    live = logits(model)
    twin, again = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    shake(model, 1.0)
    assert not torch.equal(logits(model), live)
    assert torch.equal(logits(twin), live)
    assert torch.equal(logits(again), live)


def test_gradient_checkpointing_and_autocast() -> None:
    grads = []
    for checkpointing in (False, True):
        model = moe()
        lorary.attach(model, lorary.plan(model, method("lora", dropout=0.2)))
        shake(model)
        model.train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=IDS).logits.float().square().mean().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_resumed_run_is_the_straight_one(tmp_path: Path) -> None:
    def steps(model: Any, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def attached() -> tuple[Any, torch.optim.Optimizer]:
        model = moe()
        lorary.attach(model, lorary.plan(model, method("lora")))
        return model, torch.optim.AdamW(lorary.param_groups(model, lr=1e-2))

    straight, optimizer = attached()
    steps(straight, optimizer, 4)
    first, optimizer = attached()
    steps(first, optimizer, 2)
    lorary.save(first, tmp_path / "a")
    second, resumed = attached()
    lorary.switch(second, lorary.load_adapter(tmp_path / "a"), trainable=True)
    resumed = torch.optim.AdamW(lorary.param_groups(second, lr=1e-2))
    resumed.load_state_dict(optimizer.state_dict())
    steps(second, resumed, 2)
    assert torch.equal(logits(second), logits(straight))


def test_a_plan_made_on_the_meta_device_fits() -> None:
    with torch.device("meta"):
        empty = type(moe())(moe().config)
    plan = lorary.plan(empty, method("lora"))
    assert plan.sites == lorary.plan(moe(), method("lora")).sites


def test_two_adapters_at_once_are_the_sum_of_their_updates() -> None:
    adapters, updates = [], []
    for seed, names in enumerate([("lora",), ("lora", "rslora")]):
        model = moe()
        before = state(model)
        lorary.attach(model, lorary.plan(model, lorary.method(*names, r=2 + seed)))
        shake(model, 0.05 * (1 + seed))
        adapters.append(lorary.Adapter.of(model))
        lorary.merge(model)
        updates.append({name: t - before[name] for name, t in state(model).items()})
    plain = moe()
    with torch.no_grad():
        for name, p in plain.named_parameters():
            p.add_(updates[0][name] + updates[1][name])
    close(logits(lorary.switch(moe(), adapters)), logits(plain))
    mixed = lorary.mix(adapters)
    close(logits(lorary.switch(moe(), mixed)), logits(plain))


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "options", "sentence"),
    [
        (("delta-lora",), {"mode": "paper"}, "DeltaLoRAPaperRule has no form for fused experts yet"),
        (("houlsby",), {}, "Bottleneck has no form for fused experts yet"),
        (("hira",), {}, "TimesWeight has no form for fused experts yet"),
        (("glora",), {}, "GLoRAJoin has no form for fused experts yet"),
        (("eva",), {}, "no calibration pass measures the inputs of fused experts yet (InputDirectionsInit)"),
        (("corda",), {}, "no calibration pass measures the inputs of fused experts yet"),
        (("loftq",), {"r": 20}, "its matrix has no more than 16 singular directions, and r is 20"),
        (("rows",), {"tokens": [3]}, "TokenRows has no form for fused experts yet"),
        (("pissa",), {"r": 20}, "its matrix has no more than 16 singular directions, and r is 20"),
    ],
)
def test_a_named_site_that_a_method_cannot_adapt_is_refused(
    names: tuple[str, ...], options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(PlanError) as error:
        lorary.plan(moe(), lorary.method(*names, **options), targets="experts.down_proj")
    assert sentence in str(error.value)


def test_a_class_that_is_not_known_is_said_with_its_share() -> None:
    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(4, 16, 16))
            self.q_proj = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.q_proj(x) @ self.gate_up_proj[0]  # type: ignore[no-any-return]

    plan = lorary.plan(Unknown(), method("lora"))
    assert [p.site.name for p in plan.sites] == ["q_proj"]
    assert any(note == "no adapter reaches gate_up_proj (79% of the model)" for note in plan.notes)


def damaged(tmp_path: Path, change: Any) -> str:
    """The reader's error for a saved adapter whose first site record was changed."""
    model = moe()
    lorary.attach(model, lorary.plan(model, method("vera"), targets="experts.down_proj"))
    lorary.save(model, tmp_path / "a")
    record = json.loads((tmp_path / "a" / "lorary.json").read_text())
    record["sites"][0] |= change
    (tmp_path / "a" / "lorary.json").write_text(json.dumps(record))
    with pytest.raises(FileError) as error:
        lorary.load_adapter(tmp_path / "a")
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"experts": 0}, "`experts` is 0 at a site of kind experts"),
        ({"experts": -4}, "`experts` is -4 at a site of kind experts"),
        ({"experts": True}, "`experts` is true at a site of kind experts"),
        ({"experts": 10**12}, "`experts` is 1000000000000 at a site of kind experts"),
        ({"kind": "linear"}, "`experts` is 4 at a site of kind linear"),
        ({"swapped": "yes"}, "`swapped` is 'yes'"),
        ({"experts": 5}, "has the shape [4, "),
    ],
)
def test_a_damaged_record_is_refused(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    assert sentence in damaged(tmp_path, change)


def test_an_adapter_of_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    model = moe()
    lorary.attach(model, lorary.plan(model, method("lora"), targets="experts.down_proj"))
    adapter = lorary.Adapter.of(model)
    with pytest.raises(lorary.LoraryError) as error:
        lorary.switch(moe(num_local_experts=8), adapter, force=True)
    assert "has 8 experts, expected 4" in str(error.value)


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM"])
def test_the_loss_of_a_merge_in_16_bits_is_measured(name: str) -> None:
    model = moe(name)
    lorary.attach(model, lorary.plan(model, method("lora"), targets="experts.down_proj"))
    shake(model)
    layer = adapted_layers(model)["model.layers.0.mlp.experts.down_proj"]
    exact, W = layer.merged()[0], layer.matrix.detach().clone()
    (first, *_) = lorary.MergeCheck.of(model).merge(model, dtype=torch.bfloat16).sites
    assert first.site == "model.layers.0.mlp.experts.down_proj"
    assert first.change == pytest.approx(float((exact - W).norm()))
    assert first.off == pytest.approx(float((exact.bfloat16().float() - exact).norm()))


def test_an_adapter_of_experts_is_not_served() -> None:
    from lorary.serve.forms.form import serving_form

    model = moe()
    lorary.attach(model, lorary.plan(model, method("lora"), targets="experts.down_proj"))
    shake(model)
    with pytest.raises(lorary.MethodError, match="is of 4 fused experts, where a batch cannot use another adapter"):
        serving_form(lorary.Adapter.of(model), moe())


def test_experts_that_train_in_full_are_left_out_of_a_preset() -> None:
    plan = lorary.plan(moe(), method("lora"), full="*experts*")
    assert not any(p.site.experts for p in plan.sites)
    assert {f.name.rpartition(".")[2] for f in plan.full} == {"gate_up_proj", "down_proj"}


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM"])
@pytest.mark.parametrize("presets", [("lora",), ("dora",)])
def test_adapted_experts_compile_whole(name: str, presets: tuple[str, ...]) -> None:
    model = moe(name)
    lorary.attach(model, lorary.plan(model, lorary.method(*presets, r=4)))
    shake(model)
    experts = model.model.layers[0].mlp.experts
    torch.manual_seed(0)
    routed = torch.stack([torch.randperm(4)[:2] for _ in range(9)]), torch.rand(9, 2)
    trained = [p for p in experts.parameters() if p.requires_grad]
    found = []
    for function in (experts, torch.compile(experts, backend="aot_eager", fullgraph=True)):
        x = torch.randn(9, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = function(x, *routed)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *trained])])
    for a, b in zip(*found, strict=True):
        close(a, b, 1e-4 * float(a.detach().abs().max()))


def test_the_memory_of_a_step_is_predicted_from_shapes_alone() -> None:
    with torch.device("meta"):
        empty = type(moe())(moe().config)
    work = Workload(2, 16, torch.bfloat16)
    whole, attention = (
        predict(empty, lorary.plan(empty, method("lora"), t), work) for t in ("all-linear", "attention")
    )
    assert whole.activations is not None
    assert attention.activations is not None
    assert whole.activations > attention.activations


def test_a_base_in_4_bits_that_keeps_its_experts_says_so() -> None:
    model = moe()
    plan = lorary.plan(model, lorary.method("lora", "qlora", r=2, experts=False))
    assert any("experts.down_proj stays dense: NF4 quantises linear layers" in note for note in plan.notes)
    lorary.attach(model, plan)
    before = logits(model)
    shake(model)
    live = logits(model)
    assert (live - before).abs().max() > 0.1
    lorary.merge(model)
    close(logits(model), live)


def test_a_vector_of_each_expert_does_not_decay() -> None:
    model = moe()
    lorary.attach(model, lorary.plan(model, method("dora"), targets="experts.down_proj"))
    decays = {group["name"]: group["weight_decay"] for group in lorary.param_groups(model, lr=1e-3, weight_decay=0.1)}
    assert decays == {"A B decayed": 0.1, "m": 0.0}


def test_measurements_of_single_matrices_refuse() -> None:
    model = moe()
    plan = lorary.plan(model, method("lora"), targets="experts.down_proj")
    with pytest.raises(PlanError, match="holds the matrices of 4 experts, and a rank by its gradient takes one"):
        lorary.ranks_from_gradients(model, {"input_ids": IDS, "labels": IDS}, plan)
    lorary.attach(model, plan)
    shake(model)
    with pytest.raises(PlanError, match="holds the matrices of 4 experts, and a measurement takes one"):
        lorary.layer_importance(model, [{"input_ids": IDS}])
