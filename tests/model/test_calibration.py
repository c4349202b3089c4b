"""Calibration: what it measures, that it leaves the model as it was, and every reason why it cannot."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.adapters import export_peft
from lorary.errors import MethodError, PlanError, StateError, TrainingError
from lorary.layers.adapted import adapted_layers
from lorary.spec.calibration import CalibratedInit
from lorary.train.shared_base.shared_base import SharedBase
from tests import tiny

READING = [n for n in lorary.presets() if isinstance(lorary.method(n).init, CalibratedInit)]
OPTIONS: dict[str, dict[str, Any]] = {"lora-ga": {"gamma": 256.0}}


def llama(**changes: Any) -> Any:
    return tiny.seeded("LlamaForCausalLM", **changes)


def planned(model: Any, name: str, targets: Any = "all-linear", **options: Any) -> lorary.Plan:
    return lorary.plan(model, lorary.method(name, **{"r": 2, "alpha": 4} | OPTIONS.get(name, {}) | options), targets)


def data(rows: int = 4, batch: int = 2) -> list[dict[str, Tensor]]:
    ids = torch.randint(3, 38, (rows, 12), generator=torch.Generator().manual_seed(7))
    return [{"input_ids": part, "labels": part} for part in ids.split(batch)]


def equal(one: lorary.Plan, other: lorary.Plan) -> bool:
    """Whether two plans start alike, bit for bit."""
    a, b = one.fixed_tensors, other.fixed_tensors
    return one.sites == other.sites and a.keys() == b.keys() and all(tiny.same(dict(a[n]), dict(b[n])) for n in a)


@pytest.mark.parametrize("name", READING)
@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_attach_measures_and_changes_nothing(name: str, kind: str) -> None:
    model = tiny.seeded(kind)
    before, plain = tiny.everything(model.train()), tiny.logits(model.eval())
    model.train()
    plan = planned(model, name)
    found = lorary.calibrate(model, plan, data())
    assert tiny.everything(model) == before
    assert torch.equal(tiny.logits(model.eval()), plain)
    one = lorary.attach(copy.deepcopy(model), found)
    other = lorary.attach(copy.deepcopy(model), plan, data=data())
    assert tiny.same(one.state_dict(), other.state_dict())
    torch.testing.assert_close(tiny.logits(one), plain, rtol=1e-4, atol=1e-5)
    lorary.detach(one)
    assert torch.equal(tiny.logits(one), plain)


@pytest.mark.parametrize("name", READING)
def test_the_start_is_the_same_at_every_call_and_in_every_mode(name: str) -> None:
    model = llama(attention_dropout=0.5)
    plan = planned(model, name)
    first = lorary.calibrate(model, plan, data())
    torch.manual_seed(11)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert equal(first, lorary.calibrate(model.train(), plan, iter(data())))
    more = lorary.calibrate(model.eval(), plan, data(rows=6))
    assert not equal(first, more)


@pytest.mark.parametrize("name", READING)
def test_a_group_of_layers_at_a_time_gives_the_same(name: str) -> None:
    model = llama()
    plan = planned(model, name)
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    whole = lorary.calibrate(model, plan, data())
    assert len(calls) == 2
    calls.clear()
    assert equal(whole, lorary.calibrate(model, plan, data(), held_bytes=4000))
    assert len(calls) > 8  # two batches for every group
    calls.clear()
    assert equal(whole, lorary.calibrate(model, plan, data(), held_bytes=1))
    assert len(calls) == 2 * len(plan.sites)


def test_no_more_gradients_are_held_than_those_of_a_group() -> None:
    model = llama()
    plan = planned(model, "lora-ga")
    held: list[int] = []

    def watch(*_: Any) -> None:
        held.append(sum(p.requires_grad for p in model.parameters()))

    model.register_forward_pre_hook(watch)
    lorary.calibrate(model, plan, data(), held_bytes=1)
    assert set(held) == {1}
    assert all(p.grad is None for p in model.parameters())


def test_only_as_many_rows_are_read_as_the_init_says() -> None:
    assert any("GradientInit reads the gradient of 8 rows" in note for note in planned(llama(), "lora-ga").notes)
    model, calls = llama(), []
    model.register_forward_pre_hook(lambda _, args, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True)

    def endless() -> Any:
        while True:
            yield from data(rows=4)

    lorary.calibrate(model, planned(model, "lora-ga", samples=5), endless())
    assert calls == [2, 2, 2]


@pytest.mark.parametrize("name", READING)
def test_it_is_saved_merged_and_read_by_peft(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model = tiny.trained(llama(), planned(llama(), name).method, data=data())
    trained = tiny.logits(model)
    lorary.save(model, tmp_path / "own")
    assert torch.equal(tiny.logits(lorary.load(llama(), tmp_path / "own")), trained)
    export_peft(lorary.Adapter.of(model), tmp_path / "peft", model=llama())
    peft = PeftModel.from_pretrained(llama(), tmp_path / "peft")
    torch.testing.assert_close(tiny.logits(peft), trained, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tiny.logits(lorary.merge(model)), trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", READING)
def test_bases_in_16_bits_and_quantised_ones(name: str) -> None:
    half = llama().to(torch.bfloat16)
    lorary.attach(half, planned(half, name), data=data())
    assert all(p.isfinite().all() for p in half.parameters())
    packed = llama()
    plan = lorary.plan(packed, lorary.method("qlora", name, r=2, alpha=4, **OPTIONS.get(name, {})))
    lorary.attach(packed, plan, data=data())
    assert all(layer.params["A"].any() for layer in adapted_layers(packed).values())


def test_eva_reads_the_inputs_of_a_quantised_base() -> None:
    base = lorary.quantize(llama(), lorary.NF4())
    plan = planned(base, "eva", rho=1.0)
    lorary.attach(base, plan, data=data())
    assert len(adapted_layers(base)) == len(plan.sites)


def test_two_methods_in_one_plan() -> None:
    model = llama()
    methods = {
        "attention": lorary.method("lora-ga", r=2, gamma=256.0),
        "up_proj": lorary.method("eva", r=2),
        "down_proj": lorary.method("lora", r=2),
    }
    found = lorary.calibrate(model, lorary.plan(model, methods), data())
    read = {name.rpartition(".")[2] for name in found.fixed_tensors}
    assert read == {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj"}
    plain = tiny.logits(model)
    torch.testing.assert_close(tiny.logits(lorary.attach(model, found)), plain, rtol=1e-4, atol=1e-5)


def test_a_plain_module_with_a_loss_of_its_own() -> None:
    class Labelled(tiny.ConvNet):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
            return super().forward(x)

    net = Labelled().eval()
    plan = lorary.plan(net, lorary.method("lora-ga", r=1, alpha=1), ["pointwise", "head"])
    batch = (torch.randn(4, 3, 9, 9), torch.tensor([0, 1, 2, 3]))
    before = net(*batch)
    lorary.attach(net, plan, data=[batch], loss=lambda y, given: nn.functional.cross_entropy(y, given[1]))
    torch.testing.assert_close(net(*batch), before)
    assert all(layer.start for layer in adapted_layers(net).values())


# --- refusals ---------------------------------------------------------------------------------------------------------

NO_DATA = "starts 14 layers from training data, and there is none"
NOT_BATCHES = "not an iterable of batches"


def nan_model() -> Any:
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    return model


def zeros() -> list[dict[str, Tensor]]:
    ignored = torch.full((2, 12), -100)
    return [{"input_ids": data()[0]["input_ids"], "labels": ignored}]


REFUSED: dict[str, tuple[Any, str, Any, str]] = {
    "no data": (llama, "lora-ga", None, f"data: GradientInit {NO_DATA}"),
    "no data, eva": (llama, "eva", None, f"data: InputDirectionsInit {NO_DATA}"),
    "empty": (llama, "corda", [], "data: is empty"),
    "no rows": (llama, "corda", [{"input_ids": torch.zeros(0, 4, dtype=torch.long)}], "data: is empty"),
    "a mapping": (llama, "eva", data()[0], f"data: is a dict, {NOT_BATCHES}"),
    "a tensor": (llama, "eva", tiny.ids(), f"data: is a Tensor, {NOT_BATCHES}"),
    "a number": (llama, "eva", 3, f"data: is a int, {NOT_BATCHES}"),
    "words": (llama, "eva", ["the"], "data: batch 0 is a str without a tensor"),
    "no loss": (llama, "lora-ga", [{"input_ids": tiny.ids()}], "data: the model's output has no loss"),
    "not a number": (nan_model, "lora-ga", data(), "its weight's gradient is not finite on this data"),
    "not a number, eva": (nan_model, "eva", data(), "its inputs are not finite"),
    "nothing labelled": (
        llama,
        "eva",
        zeros(),
        "it did not run on this data, so there is nothing to read of its inputs",
    ),
    "few tokens": (llama, "eva", [{"input_ids": tiny.ids()[:1, :4]}], "4 tokens have no 4 principal directions"),
    "ids beyond the vocabulary": (
        llama,
        "corda",
        [*data()[:1], {"input_ids": torch.full((1, 12), 99)}],
        "data: batch 1 fails in the model's forward pass: IndexError: index out of range in self",
    ),
    "other names": (
        llama,
        "eva",
        [{"inputs": tiny.ids()}],
        "data: batch 0 fails in the model's forward pass: ValueError",
    ),
    "nothing to read": (llama, "lora", data(), "data: no init of this plan reads data"),
    "meta": (lambda: tiny.model("LlamaForCausalLM", device="meta"), "corda", data(), "is on the meta device"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_nothing_changed(case: str) -> None:
    make, name, given, said = REFUSED[case]
    model = make()
    plan = planned(model, name)
    before = tiny.everything(model)
    with pytest.raises(PlanError, match=re.escape(said)):
        lorary.attach(model, plan, data=given)
    assert tiny.everything(model) == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"plan": "eva"}, "plan: is a str, not a Plan"),
        ({"seed": 1.5}, "seed: is a float, not a whole number"),
        ({"held_bytes": "4 GB"}, "held_bytes: is a str, not a whole number"),
        ({"loss": 5}, "loss: is a int, not a function of the output and the batch"),
    ],
)
def test_arguments_of_other_types(options: dict[str, Any], said: str) -> None:
    model = llama()
    with pytest.raises(PlanError, match=said):
        lorary.calibrate(model, **{"plan": planned(model, "eva"), "data": data()} | options)


def test_rows_without_a_positive_input() -> None:
    """As after a ReLU: CorDA divides the inputs of each row by the largest of them."""
    net = nn.Sequential(nn.ReLU(), nn.Linear(6, 5))
    x = torch.randn(4, 9, 6, generator=torch.Generator().manual_seed(0))
    plan = lorary.plan(net, lorary.method("corda", r=1, alpha=1), ["1"])
    alone = lorary.calibrate(net, plan, [x])
    x[2] = -x[2].abs()
    found = lorary.calibrate(net, plan, [x])
    assert all(t.isfinite().all() for t in found.fixed_tensors["1"].values())
    assert not equal(alone, found)


def test_a_loss_that_is_none() -> None:
    model = llama()
    plan = planned(model, "lora-ga")
    with pytest.raises(PlanError, match="`loss` returned str, no number"):
        lorary.calibrate(model, plan, data(), loss=lambda *_: "small")  # type: ignore[arg-type, return-value]
    with pytest.raises(PlanError, match="the loss depends on none of the adapted layers"):
        lorary.calibrate(model, plan, data(), loss=lambda *_: torch.zeros(()))


def test_a_layer_that_never_runs_is_named() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.runs, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.runs(x)
            return y if x.shape[0] != 3 else self.idle(y)

    model = Idle()
    for name in READING:
        plan = lorary.plan(model, lorary.method(name, r=1, alpha=1), ["runs", "idle"])
        with pytest.raises(PlanError, match="idle: it did not run on this data"):
            lorary.calibrate(model, plan, [torch.randn(4, 8)], loss=lambda y, _: y.sum())


def test_a_plan_for_another_model() -> None:
    plan = planned(llama(), "corda")
    with pytest.raises(PlanError, match="cannot calibrate"):
        lorary.calibrate(llama(hidden_size=32), plan, data())
    with pytest.raises(PlanError):
        lorary.attach(nn.Sequential(nn.Linear(3, 3)), plan)


def test_training_together_says_what_is_missing() -> None:
    model = llama()
    with pytest.raises(TrainingError, match="one: InputDirectionsInit starts 14 layers from training data"):
        SharedBase(model, {"one": planned(model, "eva")})


def test_something_is_attached_already() -> None:
    model = llama()
    plan = planned(model, "eva")
    lorary.attach(model, lorary.plan(model, tiny.LORA))
    with pytest.raises(StateError, match="something is attached already"):
        lorary.calibrate(model, plan, data())


def test_a_quantised_base_has_no_gradients() -> None:
    plan = planned(llama(), "lora-ga")
    with pytest.raises(PlanError, match="its weight is quantised, and GradientInit reads its gradient"):
        lorary.calibrate(lorary.quantize(llama(), lorary.NF4()), plan, data())


def test_kinds_ranks_and_options_that_cannot_start() -> None:
    for name, said in (("eva", "EVA reads the inputs of linear"), ("corda", "CorDA reads the inputs of linear")):
        with pytest.raises(PlanError, match=said):
            planned(llama(), name, ["embed_tokens"])
    with pytest.raises(PlanError, match="no more than 8 singular directions, and 2 r are taken, r = 5"):
        planned(llama(), "lora-ga", ["k_proj"], r=5)
    with pytest.raises(MethodError, match="takes a finite number of at least 1"):
        lorary.method("eva", rho=0.5)
    with pytest.raises(MethodError, match="mode = 'both'; it takes instruction or knowledge"):
        lorary.method("corda", mode="both")
    with pytest.raises(MethodError, match="samples = 0; it takes a whole number of at least 1"):
        lorary.method("lora-ga", samples=0)
    with pytest.raises(MethodError, match="which the factors of BlockDiagonal cannot hold"):
        lorary.method("eva", "melora")
