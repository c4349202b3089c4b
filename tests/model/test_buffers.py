"""Buffers that a training forward moves: running statistics, spectral norms, codebooks."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification, ResNetConfig, ResNetModel

import lorary
from lorary.model.buffers import BufferWarning
from tests.tiny import ConvNet, everything, frozen_copy, same, shaken


def cnn() -> nn.Module:
    """A pretrained network: its statistics are those of some data."""
    torch.manual_seed(0)
    model = ConvNet()
    model(torch.randn(8, 3, 16, 16))
    return model.eval()


def resnet() -> nn.Module:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    model = ResNetModel(config)
    model(torch.randn(8, 3, 32, 32))
    return model.eval()


def mobilenet() -> nn.Module:
    torch.manual_seed(0)
    config = MobileNetV2Config(image_size=32, depth_multiplier=0.1, num_labels=3, finegrained_output=False)
    model = MobileNetV2ForImageClassification(config)
    model(torch.randn(8, 3, 32, 32))
    return model.eval()


MODELS: dict[str, Callable[[], nn.Module]] = {"cnn": cnn, "resnet": resnet, "mobilenet": mobilenet}
METHODS = {
    "lora": lorary.method("lora", r=2),
    "dora": lorary.method("dora", r=2),
    "pissa": lorary.method("pissa", r=2),
    "norms": lorary.method("lora", r=2).replace(full=("norms",)),
    "bitfit": lorary.method("lora", "bitfit", r=2),
    "full": lorary.method("full"),
}
STATISTICS_TRAIN = {"norms", "full"}


def images(size: int = 8) -> Tensor:
    """Images of another mean and spread than those before."""
    return 5 * torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(1)) + 3


def output(model: nn.Module) -> Tensor:
    """The output for some images, in the model's own mode."""
    found: Any = model(images())
    found = getattr(found, "logits", getattr(found, "last_hidden_state", found))
    assert isinstance(found, Tensor)
    return found


@torch.no_grad()
def answer(model: nn.Module) -> Tensor:
    """The output in evaluation mode."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    found = output(model)
    for m, mode in modes.items():
        m.training = mode
    return found


def attached(base: nn.Module, method: str) -> nn.Module:
    targets = None if method == "full" else ["conv"] if not isinstance(base, ConvNet) else ["conv", "head"]
    return lorary.attach(base, lorary.plan(base, METHODS[method], targets))


def train(model: nn.Module, steps: int = 3) -> nn.Module:
    """A trainer: every step puts the model into training mode."""
    optimizer = torch.optim.SGD(lorary.param_groups(model, 1e-3))
    for _ in range(steps):
        model.train()
        output(model).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in model.named_buffers() if "running" in name or "tracked" in name}


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, method) for name in MODELS for method in METHODS if name != "mobilenet" or method in ("lora", "norms")],
)
def test_an_adapter_is_the_whole_change(name: str, method: str, tmp_path: Path) -> None:
    """Trained, saved and loaded: the same model. Disabled or detached: the base, bit for bit."""
    base = MODELS[name]()
    before, expected, untouched = frozen_copy(base), answer(base), everything(base)
    model = train(attached(base, method))
    moved = any(not torch.equal(t, before[n]) for n, t in statistics(model).items())
    assert moved == (method in STATISTICS_TRAIN)
    trained = answer(model)
    assert not torch.equal(trained, expected)
    lorary.save(model, tmp_path)
    for loaded in (
        lorary.load(MODELS[name](), tmp_path),
        lorary.switch(MODELS[name](), lorary.load_adapter(tmp_path)),
        lorary.switch(train(attached(MODELS[name](), "norms")), lorary.load_adapter(tmp_path)),
    ):
        assert torch.equal(answer(loaded), trained)
    with lorary.disabled(model):
        assert torch.equal(answer(model), expected)
        output(model)  # in training mode: nothing of it may stay
        assert torch.equal(answer(model), expected)
    assert torch.equal(answer(model), trained)
    assert all(p.grad is None for p in model.parameters())
    lorary.detach(model)
    assert same(frozen_copy(model), before)
    assert everything(model)[1:] == untouched[1:]
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("method", ["lora", "norms"])
@pytest.mark.parametrize("name", ["cnn", "resnet"])
def test_merged_it_stays_the_same_and_can_be_unmerged(name: str, method: str) -> None:
    base = MODELS[name]()
    before = frozen_copy(base)
    model = train(attached(base, method))
    trained = answer(model)
    torch.testing.assert_close(answer(lorary.merge(model, keep=True)), trained, rtol=1e-4, atol=1e-5)
    model.train()
    if method == "lora":
        output(model)
    assert torch.equal(answer(lorary.unmerge(model)), trained)
    copied = lorary.merge(copy.deepcopy(model))
    assert all(m.training for m in copied.modules())
    assert not any("train" in vars(m) for m in copied.modules())
    assert same(frozen_copy(lorary.detach(model)), before)


@pytest.mark.parametrize("method", METHODS)
def test_resumed_training_equals_training_at_once(method: str, tmp_path: Path) -> None:
    at_once = train(attached(cnn(), method), 4)
    lorary.save(train(attached(cnn(), method), 2), tmp_path)
    resumed = train(lorary.load(cnn(), tmp_path, trainable=True), 2)
    assert torch.equal(answer(resumed), answer(at_once))
    assert same(statistics(resumed), statistics(at_once))


def test_a_frozen_norm_evaluates_whatever_sets_the_mode() -> None:
    model: Any = attached(cnn(), "lora")
    for mode in (model.train, model.norm.train, model.eval, lambda: model.train(mode=True)):
        mode()
        assert not model.norm.training
    assert model.norm.train() is model.norm
    assert model.train().depthwise.training
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(images()), model(images()))
    assert same(statistics(model), statistics(cnn()))


def test_a_statistic_that_trains_is_no_part_of_a_new_head() -> None:
    notes = lorary.plan(cnn(), METHODS["norms"], "conv").notes
    assert not any("new head" in note for note in notes)


def test_disabled_blocks_within_each_other_and_a_change_of_mode_inside() -> None:
    model: Any = attached(cnn(), "norms").train()
    with lorary.disabled(model):
        with lorary.disabled(model):
            model.train()
        assert not model.norm.training
        model.eval()
    assert not model.norm.training
    assert model.train().norm.training
    assert "train" not in vars(model.norm)


def test_a_norm_that_its_owner_evaluates_keeps_doing_so() -> None:
    model: Any = cnn().train()
    model.norm.eval()
    lorary.detach(attached(model, "lora").train())
    assert model.training
    assert not model.norm.training


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_is_on_its_own(copied: Callable[[Any], Any]) -> None:
    model: Any = attached(cnn(), "lora")
    other = copied(model)
    lorary.detach(model.train())
    assert model.norm.training
    assert not other.train().norm.training
    lorary.detach(other)
    assert other.norm.training
    assert len(list(copied(model.norm).modules())) == 1


class Parts(nn.Module):
    """Layers whose forward changes their buffers, each in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.instance = nn.InstanceNorm1d(4, track_running_stats=True)
        self.plain = nn.BatchNorm1d(4, affine=False)
        self.batch_only = nn.BatchNorm1d(4, track_running_stats=False)
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
        self.older = nn.utils.spectral_norm(nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.batch_only(self.plain(self.instance(self.layer(x))))
        return self.older(self.spectral(x))


def parts() -> Parts:
    torch.manual_seed(0)
    return Parts()


def test_every_layer_with_statistics_is_frozen() -> None:
    model, x = parts(), torch.randn(3, 4, 6)
    before = frozen_copy(model)
    plan = lorary.plan(model, METHODS["lora"], ["layer"])
    lorary.attach(model, plan).train()
    for _ in range(2):
        model(x)
    now = {name.replace("layer.base.", "layer."): t for name, t in model.state_dict().items() if ".params." not in name}
    assert same(now, before)
    assert [m.training for m in (model.layer, model.instance, model.plain, model.batch_only)] == [
        True,
        False,
        False,
        True,
    ]
    frozen = "instance, plain, spectral.parametrizations.weight.0, older"
    note = f"note      the running statistics of {frozen} are frozen, also in `model.train()`"
    assert note in str(plan).splitlines()


def test_full_fine_tuning_trains_the_statistics_of_layers_without_weights() -> None:
    model, x = parts(), torch.randn(3, 4, 6)
    plan = lorary.plan(model, METHODS["full"])
    lorary.attach(model, plan).train()(x)
    assert int(model.plain.num_batches_tracked) == 1
    adapter = lorary.Adapter.of(model)
    assert torch.equal(adapter.full["plain.running_mean"], model.plain.running_mean)
    assert plan.trainable == sum(p.numel() for p in model.parameters())


class Codebook(nn.Module):
    """A codebook by moving averages, as in vector quantisation."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x, self.codes).argmin(-1)
        if self.training:
            self.codes.data.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return self.codes[nearest] + x


def quantizer() -> Any:
    torch.manual_seed(0)
    return nn.ModuleDict({"layer": nn.Linear(6, 6), "codebook": Codebook()})


def test_a_buffer_that_a_module_of_the_user_moves_is_said_and_put_back(tmp_path: Path) -> None:
    base, x = quantizer(), torch.randn(7, 6)
    before = frozen_copy(base)
    model = lorary.attach(base, lorary.plan(base, METHODS["lora"], ["layer"])).train()
    model.codebook(model.layer(x))
    with pytest.warns(BufferWarning, match=r"^codebook\.codes: changed since the adapter was attached") as caught:
        lorary.save(model, tmp_path)
    assert [w.filename for w in caught] == [__file__]
    with lorary.disabled(model):
        assert torch.equal(model.codebook.codes, before["codebook.codes"])
    assert not torch.equal(model.codebook.codes, before["codebook.codes"])
    assert same(frozen_copy(lorary.detach(model)), before)


def counting_layer() -> nn.Module:
    """A layer with a buffer of its own, which has the name `0.count`."""
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_buffer("count", torch.zeros(1))
    return model


def with_wrapped_part() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), checkpoint_wrapper(cnn()))


@pytest.mark.parametrize("build", [counting_layer, with_wrapped_part])
def test_buffers_inside_adapted_layers_and_wrappers_are_put_back(build: Callable[[], nn.Module]) -> None:
    model = build()
    before = frozen_copy(model)
    lorary.attach(model, lorary.plan(model, METHODS["lora"], ["0"]))
    buffer = next(model.buffers())
    value = buffer.clone()
    moved = buffer.add_(1).clone()
    with lorary.disabled(model):
        assert torch.equal(buffer, value)
    assert torch.equal(buffer, moved)
    assert same(frozen_copy(lorary.detach(model)), before)


def test_statistics_inside_a_wrapper_do_not_move_while_disabled() -> None:
    model = attached(nn.Sequential(checkpoint_wrapper(cnn())), "norms").train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with lorary.disabled(model):
        model(images())
        assert same(dict(model.named_buffers()), before)


def test_a_module_of_buffers_alone_can_train(tmp_path: Path) -> None:
    base, x = quantizer(), torch.randn(7, 6)
    method = METHODS["lora"].replace(full=("codebook",))
    model = shaken(lorary.attach(base, lorary.plan(base, method, ["layer"]))).train()
    model.codebook(model.layer(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lorary.save(model, tmp_path)
    loaded = lorary.load(quantizer(), tmp_path)
    assert torch.equal(loaded.codebook.codes, model.codebook.codes)
    assert lorary.attached(loaded).trainable == lorary.plan(quantizer(), method, ["layer"]).trainable


def test_a_statistic_of_another_shape_is_refused(tmp_path: Path) -> None:
    lorary.save(train(attached(cnn(), "norms")), tmp_path)
    other: Any = cnn()
    other.norm = nn.BatchNorm2d(8, track_running_stats=False)
    with pytest.raises(lorary.FileError, match=r"norm\.running_mean: the adapter holds \(8,\) for it"):
        lorary.load(other, tmp_path, force=True)


# --- PEFT -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "dora", "norms"])
def test_peft_reads_the_same_model(method: str, tmp_path: Path) -> None:
    model = train(attached(resnet(), method))
    lorary.save(model, tmp_path)
    assert (tmp_path / "adapter_config.json").exists()
    theirs = PeftModel.from_pretrained(resnet(), tmp_path).eval()
    torch.testing.assert_close(answer(theirs), answer(model), rtol=1e-4, atol=1e-5)


def test_peft_s_modules_to_save_have_their_statistics(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["convolution"], modules_to_save=["normalization"], init_lora_weights=False)
    theirs = get_peft_model(resnet(), config).train()
    output(theirs)
    theirs.save_pretrained(tmp_path)
    model = lorary.load(resnet(), tmp_path)
    assert torch.equal(answer(model), answer(theirs))
    counter = model.get_submodule("embedder.embedder.normalization").num_batches_tracked
    assert counter.dtype == torch.int64
    assert counter == 2
    lorary.save(model, tmp_path / "again")
    again = PeftModel.from_pretrained(resnet(), tmp_path / "again")
    assert torch.equal(answer(again), answer(theirs))
