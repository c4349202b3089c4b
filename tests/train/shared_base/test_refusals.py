"""What cannot be trained together is refused, with every reason; and rows that meet are found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorary
from lorary.errors import DataError, LoraryError, TrainingError
from lorary.files import manifest
from lorary.train.shared_base import rows as rows_module
from lorary.train.shared_base.shared_base import SharedBase
from lorary.train.shared_base.training import Settings, SharedTraining
from lorary.train.trainer import checkpoint

from ... import tiny
from .apart import METHODS, batches, distance, llama


def _plan(base: Any, name: str = "lora", targets: Any = None) -> lorary.Plan:
    return lorary.plan(base, METHODS[name], targets)


def _refused(make: Any, *sentences: str, error: type[LoraryError] = TrainingError) -> None:
    with pytest.raises(error) as caught:
        make()
    for sentence in sentences:
        assert sentence in str(caught.value), str(caught.value)


# --- models and plans -------------------------------------------------------------------------------------------------


def test_a_model_with_an_adapter() -> None:
    base = llama()
    plan = _plan(base)
    lorary.attach(base, plan)
    _refused(lambda: SharedBase(base, {"a": plan}), "model: has an adapter attached", "detach it first")


def test_what_is_no_model() -> None:
    plan = _plan(llama())
    _refused(lambda: SharedBase("base", {"a": plan}), "model: is a str, not a torch.nn.Module")  # type: ignore[arg-type]


def test_a_model_that_others_have_wrapped() -> None:
    """One that DDP wraps, which would not see the adapters."""

    class Wrapped(nn.parallel.DistributedDataParallel):
        def __init__(self, module: nn.Module) -> None:
            nn.Module.__init__(self)
            self.module = module

    base = llama()
    plan = _plan(base)
    what = "model: is wrapped in DistributedDataParallel"
    _refused(lambda: SharedBase(Wrapped(base), {"a": plan}), what, "train together first, and wrap")


def test_a_model_without_values() -> None:
    base = tiny.model("LlamaForCausalLM", device="meta")
    _refused(lambda: SharedBase(base, {"a": _plan(base)}), "is on the meta device and has no values")


@pytest.mark.parametrize("plans", [{}, [], None])
def test_no_plans(plans: Any) -> None:
    _refused(lambda: SharedBase(llama(), plans), "plans: are", "pass a mapping: {name: lorary.plan(model, method)}")


def test_all_reasons_at_once() -> None:
    """Names, plans and seeds."""
    base = llama()
    plans: Any = {"a": _plan(base), "": _plan(base), "c": METHODS["lora"]}
    _refused(
        lambda: SharedBase(base, plans, seeds={"a": 1, "b": 2, "": "x"}),  # type: ignore[dict-item]
        "plans: '' is not the name of an adapter",
        "c: is a Method, not a Plan",
        "seeds: 'b' has no plan",
        "seeds: has none for c",
        "seeds: 'x' is not a whole number",
    )


def test_the_plan_of_another_model() -> None:
    """Every adapter's, before anything is copied."""
    base, other = llama(), llama(hidden_size=32, num_hidden_layers=3)
    plans = {"fits": _plan(base), "wide": _plan(other), "bias": _plan(other, "bitfit")}
    _refused(
        lambda: SharedBase(base, plans),
        "wide: model.layers.0.self_attn.q_proj: has 16 output features, expected 32",
        "wide: model.layers.2.mlp.down_proj: the model has no such module",
        "bias: model.layers.0.self_attn.q_proj.bias: is (16,), expected (32,)",
    )


def test_dropout_of_an_adapter() -> None:
    base = llama()
    plan = lorary.plan(base, lorary.method("lora", r=2, dropout=0.1))
    what = "a: a dropout of 0.1 draws its masks from one stream of random numbers"
    _refused(lambda: SharedBase(base, {"a": plan}), what, "set dropout=0")


@pytest.mark.parametrize(
    ("changes", "where"), [({"attention_dropout": 0.2}, "model.layers.0.self_attn.attention_dropout")]
)
def test_dropout_of_the_model(changes: dict[str, Any], where: str) -> None:
    base = llama(**changes)
    sentence = f"{where}: drops with probability 0.2: the adapters would get other masks together than alone"
    _refused(lambda: SharedBase(base, {"a": _plan(base)}), sentence)
    gpt2 = tiny.model("GPT2LMHeadModel")
    _refused(lambda: SharedBase(gpt2, {"a": _plan(gpt2)}), "transformer.drop: drops with probability 0.1")


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (lorary.method("longlora", length=64), "LongContext"),
        (lorary.method("prefix-tuning", tokens=3), "PrefixContext"),
        (lorary.method("prompt-tuning", tokens=3), "PromptContext"),
    ],
)
def test_another_context(method: lorary.Method, name: str) -> None:
    base = llama()
    plan = lorary.plan(base, method)
    what = f"a: {name} changes how the whole model reads, and with it the rows of the other adapters"
    _refused(lambda: SharedBase(base, {"a": plan}), what, "train this adapter by itself")


def test_a_quantised_base_of_its_own() -> None:
    base = llama()
    plan = lorary.plan(base, lorary.method("qlora", r=2))
    what = "a: NF4 would quantise a base of its own for this adapter"
    _refused(lambda: SharedBase(base, {"a": plan}), what, "quantise the model first: lorary.quantize")


def test_full_fine_tuning() -> None:
    base = llama()
    plan = lorary.plan(base, lorary.method("full"))
    _refused(lambda: SharedBase(base, {"a": plan}), "of the base's own numbers, of which nothing is shared")


def test_a_tied_weight_in_full() -> None:
    base = tiny.seeded("LlamaForCausalLM", tie_word_embeddings=True)
    plan = lorary.plan(base, METHODS["lora"], full="embed_tokens")
    _refused(lambda: SharedBase(base, {"a": plan}), "embed_tokens.weight is tied to another parameter, and trains")


def test_a_parameter_of_no_layer() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions, self.inner, self.out = nn.Parameter(torch.zeros(5, 8)), nn.Linear(8, 8), nn.Linear(8, 80)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.out(self.inner(x + self.positions))
            return y

    base = Positions()
    plan = lorary.plan(base, lorary.method("lora", r=2), ["inner"], full="positions")
    what = "positions trains in full and belongs to no single layer, so that no rows are its own"
    _refused(lambda: SharedBase(base, {"a": plan}), what)


def test_running_statistics() -> None:
    base = tiny.ConvNet()
    plan = lorary.plan(base, lorary.method("lora", r=2), ["head"], full="norm")
    _refused(lambda: SharedBase(base, {"a": plan}), "a: the buffer norm.running_mean trains, which all adapters share")


def test_a_rule_that_writes_the_base() -> None:
    base = llama()
    plan = lorary.plan(base, lorary.method("delta-lora", r=2, mode="paper", start=-1))
    _refused(lambda: SharedBase(base, {"a": plan}), "DeltaLoRAPaperRule writes the weights of the base")


def test_the_load_balancing_loss_of_experts() -> None:
    base = tiny.seeded("MixtralForCausalLM", output_router_logits=True)
    what = "its load-balancing loss is one number for the tokens of all adapters"
    _refused(lambda: SharedBase(base, {"a": _plan(base, targets="attention")}), what)


def test_a_model_without_a_known_loss() -> None:
    base = tiny.ConvNet()
    plan = lorary.plan(base, lorary.method("lora", r=2), ["head"])
    what = "loss: a ConvNet has no loss that is known to be a mean over rows"
    _refused(lambda: SharedBase(base, {"a": plan}), what, "pass loss=")


def test_an_encoder_decoder() -> None:
    base = tiny.seeded("T5ForConditionalGeneration", dropout_rate=0.0)
    what = "loss: a T5ForConditionalGeneration has no loss that is known to be a mean over rows"
    _refused(lambda: SharedBase(base, {"a": _plan(base)}), what, "pass loss=")


def test_a_model_that_runs_itself() -> None:
    """A forward that somebody has put around it, which a copy would go on calling."""
    base = llama()
    plain = base.model.forward
    base.model.forward = lambda *args, **kwargs: plain(*args, **kwargs)
    plan = _plan(llama())
    _refused(lambda: SharedBase(base, {"a": plan}), "cannot be copied: model.forward is a function around the model")


# --- batches ----------------------------------------------------------------------------------------------------------


def _two() -> SharedBase:
    base = llama()
    return SharedBase(base, {"a": _plan(base), "b": _plan(base)}, seeds={"a": 0, "b": 1})


def test_a_step_without_micro_batches() -> None:
    (batch,) = batches(0, count=1)
    training = SharedTraining(_two(), Settings(1e-3, 3))
    _refused(lambda: training.step({"a": batch, "b": []}), "b: has no batch")


def test_batches_of_other_adapters() -> None:
    (batch,) = batches(0, count=1)
    _refused(lambda: _two().losses({"a": batch, "c": batch}), "b: has no batch", "c: has a batch and is not here")


def _bad_batches() -> dict[str, tuple[Any, str]]:
    (batch,) = batches(0, count=1)
    ids = batch["input_ids"]
    return {
        "a list": ([batch], "b: is a list; a batch is a mapping from names to tensors"),
        "empty": ({}, "b: is empty; a batch is a mapping from names to tensors"),
        "no tensor": (batch | {"labels": [1, 2]}, "b: `labels` is not a tensor with rows"),
        "a number": (batch | {"labels": torch.tensor(1)}, "b: `labels` is not a tensor with rows"),
        "other rows": (batch | {"labels": batch["labels"][:1]}, "b: its tensors have different numbers of rows"),
        "no rows": ({key: t[:0] for key, t in batch.items()}, "b: has no rows"),
        "other tensors": ({"input_ids": ids}, "b: attention_mask, labels: only in its batch or in that of a"),
        "another dtype": (batch | {"labels": batch["labels"].int()}, "b: `labels` is torch.int32 on cpu"),
        "another shape": (batch | {"attention_mask": ids[:, None]}, "b: `attention_mask` has rows of shape [1, 7]"),
    }


@pytest.mark.parametrize("case", _bad_batches())
def test_bad_batches(case: str) -> None:
    (batch,) = batches(0, count=1)
    bad, sentence = _bad_batches()[case]
    _refused(lambda: _two().losses({"a": batch, "b": bad}), sentence, error=DataError)


def test_batches_that_are_none() -> None:
    (batch,) = batches(0, count=1)
    training = SharedTraining(_two(), Settings(1e-3, 2))
    _refused(lambda: training.step([batch]), "batches: is a list, not a mapping from names to batches")  # type: ignore[arg-type]
    _refused(lambda: training.step({"a": batch, "b": 5}), "b: has a int, not a batch or a list of them")  # type: ignore[dict-item]
    _refused(lambda: training.shared.losses([batch]), "batches: is a list, not a mapping from names to batches")  # type: ignore[arg-type]
    assert training.steps == {"a": 0, "b": 0}


def test_a_loss_that_is_no_function() -> None:
    base = llama()
    _refused(lambda: SharedBase(base, {"a": _plan(base)}, loss="mean"), "loss: is a str, not a function of")  # type: ignore[arg-type]


def test_batches_without_labels() -> None:
    (batch,) = batches(0, count=1)
    bare = {"input_ids": batch["input_ids"]}
    shared = _two()
    _refused(lambda: shared.losses({"a": bare, "b": bare}), "labels: are missing", error=DataError)


def test_other_lengths_are_padded_and_masked() -> None:
    (batch,) = batches(0, count=1)
    short = {key: t[:, :4] for key, t in batch.items() if key != "attention_mask"}
    long = {key: t for key, t in batch.items() if key != "attention_mask"}
    shared = _two()
    found = shared.losses({"a": long, "b": short})
    with torch.no_grad():
        assert found["b"].item() == pytest.approx(shared.model("b")(**short).loss.item(), abs=1e-6)
        assert found["a"].item() == pytest.approx(shared.model("a")(**long).loss.item(), abs=1e-6)


def test_tokens_that_cannot_be_padded() -> None:
    """Positions of packed rows say where a text begins."""
    (batch,) = batches(0, count=1)
    positions = torch.arange(7).expand(2, 7)
    short = {key: t[:, :4] for key, t in (batch | {"position_ids": positions}).items()}
    sentence = "b: `position_ids` has rows of shape [4], and [7] in the batch of a"
    _refused(
        lambda: _two().losses({"a": batch | {"position_ids": positions}, "b": short}),
        sentence,
        "make the batches of one length",
        error=DataError,
    )


# --- names, settings, ends --------------------------------------------------------------------------------------------


def test_unknown_names_and_those_that_have_left() -> None:
    shared = _two()
    shared.leave("a")
    assert shared.names == ("b",)
    _refused(lambda: shared.model("a"), "a: has left")
    _refused(lambda: shared.adapter("bb"), "bb: is not the name of an adapter", "b")
    (batch,) = batches(0, count=1)
    assert set(shared.losses({"b": batch})) == {"b"}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (Settings(1e-3, 0), "a: steps is 0; it takes 1 or more"),
        (Settings(1e-3, 2.5), "a: steps is 2.5; it takes 1 or more"),  # type: ignore[arg-type]
        (Settings(1e-3, 2, max_grad_norm=-1.0), "a: max_grad_norm is -1.0; it takes a finite number of at least 0"),
        (Settings(1e-3, 2, warmup=float("nan")), "a: warmup is nan; it takes a finite number of at least 0"),
        (Settings(1e-3, 2, schedule="sine"), "a: schedule is 'sine'; it takes cosine, linear, constant"),
        (Settings(1e-3, 2, schedule="reduce_lr_on_plateau"), "a: schedule is 'reduce_lr_on_plateau'; it takes cosine"),
        ({"a": Settings(1e-3, 2)}, "b: has no settings"),
        ({"a": Settings(1e-3, 2), "b": {"lr": 1e-3}}, "b: has a dict, not Settings"),
        (5, "settings: is a int, not Settings, or a mapping of names to them"),
        ({"a": Settings(1e-3, 2), "b": Settings(1e-3, 2), "c": Settings(1e-3, 2)}, "c: has settings and is not here"),
    ],
)
def test_bad_settings(settings: Any, sentence: str) -> None:
    _refused(lambda: SharedTraining(_two(), settings), sentence)


def test_a_rate_that_is_none() -> None:
    _refused(lambda: SharedTraining(_two(), Settings(-1.0, 3)), "lr: -1.0 is not a positive", error=lorary.ConfigError)


def test_too_few_batches() -> None:
    rows = batches(0, count=2)
    training = SharedTraining(_two(), Settings(1e-3, 3))
    _refused(lambda: training.run({"a": iter(rows), "b": iter(rows)}), "a: its batches end after 2 of 3 steps")


def test_batches_in_a_list() -> None:
    """As well as an iterator over them."""
    rows = batches(0, count=2)
    lists, iterators = (
        SharedTraining(_two(), Settings(1e-3, 2)).run({name: make(rows) for name in ("a", "b")})
        for make in (list, iter)
    )
    for name in ("a", "b"):
        assert distance(lists[name], iterators[name]) == 0


def test_the_checkpoint_of_a_run_is_no_state(tmp_path: Any) -> None:
    training = SharedTraining(_two(), Settings(1e-3, 3))
    training.save("a", tmp_path / "a")
    file = tmp_path / "a" / checkpoint.STATE
    document = json.loads(file.read_text())
    del document["state"]["step"]
    file.write_text(json.dumps(document))
    manifest.write_manifest(tmp_path / "a")
    hint = "a run goes on with `lorary train --resume`"
    _refused(lambda: training.resume("a", tmp_path / "a"), "holds no state of this kind", hint)


def test_the_state_of_another_adapter(tmp_path: Any) -> None:
    base = llama()
    plans = {"a": _plan(base), "b": _plan(base, "dora")}
    training = SharedTraining(SharedBase(base, plans), Settings(1e-3, 3))
    training.save("a", tmp_path / "a")
    _refused(
        lambda: training.resume("b", tmp_path / "a"), "the checkpoint holds another adapter", error=lorary.FileError
    )
    (batch,) = batches(0, count=1)
    training.step({"a": batch, "b": batch})
    training.save("a", tmp_path / "further")
    shorter = SharedTraining(SharedBase(base, {"a": plans["a"]}), Settings(1e-3, 1))
    sentence = "a: has done 1 steps, and this run has 1"
    _refused(lambda: shorter.resume("a", tmp_path / "further"), "cannot go on with this adapter:", sentence)
    (tmp_path / "a" / "state.safetensors").write_bytes(b"x")
    _refused(lambda: training.resume("a", tmp_path / "a"), "state.safetensors", error=lorary.FileError)
    _refused(lambda: training.resume("a", tmp_path / "nowhere"), "nowhere", error=lorary.FileError)


# --- rows that meet ---------------------------------------------------------------------------------------------------


def test_rows_of_another_adapter_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: layers that hand every adapter the rows of another one."""
    grouped = rows_module.RowsForward._grouped
    monkeypatch.setattr(rows_module.RowsForward, "_grouped", lambda self, names: grouped(self, names[::-1]))
    training = SharedTraining(_two(), Settings(1e-3, 3))
    first, second = batches(0, count=1), batches(1, count=1)
    with pytest.raises(TrainingError, match=r"off that of training alone.*its rows meet those of other adapters"):
        training.step({"a": first[0], "b": second[0]})


class Mixing(nn.Module):
    """A model whose rows know of each other: its second layer sees their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 80)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y: Tensor = self.second(h + h.mean(0))
        return y


class Choosing(nn.Module):
    """A model that sends some of the rows to a layer, as experts get theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.expert = nn.Linear(6, 6), nn.Linear(6, 80)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y: Tensor = self.expert(h[: len(h) - 1])
        return torch.cat([y, y[:1]])


def _own_loss(output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    return output.square().mean()


def _stepped(base: nn.Module) -> None:
    plan = lorary.plan(base, lorary.method("lora", r=2), "all-linear", example=torch.zeros(4, 6))
    shared = SharedBase(base, {"a": plan, "b": plan}, seeds={"a": 0, "b": 1}, loss=_own_loss)
    torch.manual_seed(0)
    SharedTraining(shared, Settings(1e-3, 2)).step({"a": {"x": torch.randn(4, 6)}, "b": {"x": torch.randn(4, 6)}})


def test_a_model_whose_rows_meet_is_refused_in_the_first_step() -> None:
    torch.manual_seed(0)
    _refused(lambda: _stepped(Mixing()), "off that of training alone", "train the adapters one by one")


def test_a_layer_that_gets_other_rows_is_refused() -> None:
    torch.manual_seed(0)
    _refused(
        lambda: _stepped(Choosing()), "expert: gets an input of 7 rows, which are not those of 8 rows of the batch"
    )
