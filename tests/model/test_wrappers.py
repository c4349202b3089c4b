"""Wrapped models: torch.compile, DDP, DataParallel, FSDP and activation checkpointing are seen through."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import lorary
from lorary.layers.adapted import adapted_layers
from lorary.layers.wrappers import named_modules, unwrapped
from lorary.model.scan import scan
from tests import fresh, tiny

PARTS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.proj(self.norm(x))
        return y


class Net(nn.Module):
    """Small, because it is compiled again and again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.out = nn.ModuleList([Block(), Block()]), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.out(x)
        return y


def answer(model: nn.Module) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(torch.linspace(-1, 1, 24).reshape(3, 8))
    return y


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def a_block(model: Any) -> Any:
    model.layers[0] = compiled(model.layers[0])
    return model


def a_layer(model: Any) -> Any:
    model.layers[0].proj = checkpoint_wrapper(compiled(model.layers[0].proj))
    return model


def checkpointed(model: Any) -> Any:
    model.layers[1] = checkpoint_wrapper(model.layers[1])
    return model


def several(model: Any) -> Any:
    return nn.DataParallel(compiled(a_layer(checkpointed(model))))


WRAPPED: dict[str, Callable[[Any], Any]] = {
    "compiled": compiled,
    "compiled in place": in_place,
    "a compiled block": a_block,
    "a compiled, checkpointed layer": a_layer,
    "a checkpointed block": checkpointed,
    "DataParallel": nn.DataParallel,
    "several": several,
}


class Twins:
    """A wrapped model and a plain one, to which the same is done."""

    def __init__(self, wrap: Callable[[Any], Any]) -> None:
        self.plain, self.wrapped = Net(), wrap(Net())

    def do(self, action: Callable[[Any], Any]) -> None:
        assert action(self.wrapped) is self.wrapped
        action(self.plain)
        self.agree()

    def agree(self) -> None:
        torch.testing.assert_close(answer(self.wrapped), answer(self.plain), rtol=1e-5, atol=1e-6)
        assert str(lorary.attached(self.wrapped)) == str(lorary.attached(self.plain))


def attach(*words: str) -> Callable[[Any], Any]:
    method = lorary.method(*words, r=2, full=("norms",))
    return lambda model: tiny.shaken(lorary.attach(model, lorary.plan(model, method)))


@pytest.mark.parametrize("name", WRAPPED)
def test_a_wrapped_model_is_as_the_plain_one(name: str, tmp_path: Path) -> None:
    """Its graph, if it has one, follows every change: it has answered before each of them."""
    twins = Twins(WRAPPED[name])
    model, plain = twins.wrapped, twins.plain
    twins.agree()
    before = tiny.everything(model)
    plans = [str(lorary.plan(m, lorary.method("lora", r=2))) for m in (model, plain)]
    assert plans[0] == plans[1]
    assert lorary.Fingerprint.of(model) == lorary.Fingerprint.of(plain)
    twins.do(attach("pissa", "dora"))
    with lorary.disabled(model) as same, lorary.disabled(plain):
        assert same is model
        twins.agree()
    twins.agree()
    groups = [lorary.param_groups(m, lr=1e-3) for m in (model, plain)]
    assert [[len(g["params"]), g["name"]] for g in groups[0]] == [[len(g["params"]), g["name"]] for g in groups[1]]
    assert lorary.rules(model, 3).layers == list(adapted_layers(model).values())
    twins.do(lambda m: lorary.merge(m, keep=True))
    twins.do(lorary.unmerge)
    for m, folder in ((model, "wrapped"), (plain, "plain")):
        lorary.save(m, tmp_path / folder)
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / "wrapped" / file.name).read_bytes() == file.read_bytes()
    twins.do(lorary.detach)
    assert tiny.everything(model) == before
    twins.do(lambda m: lorary.load(m, tmp_path / "plain"))
    adapter = lorary.load_adapter(tmp_path / "wrapped")
    twins.do(lambda m: lorary.switch(m, None))
    twins.do(lambda m: lorary.switch(m, adapter))
    twins.do(lorary.merge)
    twins.do(lorary.quantize)
    twins.do(lorary.dequantize)


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_after_attaching(name: str) -> None:
    twins = Twins(lambda model: model)
    twins.do(attach("lora"))
    twins.wrapped = WRAPPED[name](twins.wrapped)
    twins.agree()
    twins.do(lambda m: lorary.merge(m, keep=True))
    twins.do(lorary.unmerge)
    twins.do(lorary.detach)


@pytest.mark.parametrize("name", WRAPPED)
def test_no_name_has_a_part_of_a_wrapper(name: str) -> None:
    model, plain = WRAPPED[name](Net()), Net()
    found = scan(model)
    assert found.names == scan(plain).names
    assert [path for path, _ in named_modules(model)] == [path for path, _ in plain.named_modules()]
    assert not [path for path in found.modules if set(PARTS) & set(path.split("."))]
    assert type(found.model) is type(plain)
    assert unwrapped(plain) is plain


@pytest.mark.parametrize("words", ["longlora", "glora"])
def test_longer_contexts_and_new_biases(words: str) -> None:
    """RoPE modules are replaced and the configuration changed; GLoRA's merge adds biases, which it has to allow for."""
    model = tiny.seeded("LlamaForCausalLM", max_position_embeddings=3)
    model.model.rotary_emb = checkpoint_wrapper(model.model.rotary_emb)
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    wrapped, base = nn.DataParallel(model), tiny.logits(model)
    before, config = tiny.everything(wrapped), str(model.config)
    method = lorary.method("longlora", r=2, length=6) if words == "longlora" else lorary.method("glora", r=2)
    lorary.attach(wrapped, lorary.plan(wrapped, method))
    expected = tiny.logits(tiny.shaken(wrapped))
    with lorary.disabled(wrapped):
        assert torch.equal(tiny.logits(wrapped), base)
    lorary.merge(wrapped, keep=True)
    torch.testing.assert_close(tiny.logits(wrapped), expected, rtol=1e-4, atol=1e-5)
    assert model.config.attention_bias == (words == "glora")
    assert str(model.config) != config
    lorary.unmerge(wrapped)
    assert torch.equal(tiny.logits(wrapped), expected)
    lorary.detach(wrapped)
    assert (tiny.everything(wrapped), str(model.config)) == (before, config)
    assert torch.equal(tiny.logits(wrapped), base)


def test_a_compiled_base_in_4_bits_is_saved(tmp_path: Path) -> None:
    model = lorary.quantize(tiny.seeded("LlamaForCausalLM"))
    lorary.save_quantized(model, tmp_path / "plain")
    lorary.save_quantized(compiled(model), tmp_path / "compiled")
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / "compiled" / file.name).read_bytes() == file.read_bytes()
    model.model.layers[1] = checkpoint_wrapper(model.model.layers[1])
    message = "model.layers.1: is a CheckpointWrapper, whose name would be in the checkpoint\n      hint: unwrap it"
    assert message in refused(lorary.save_quantized, model, tmp_path / "refused")


# --- distributed: one process is enough here --------------------------------------------------------------------------


def plain_model() -> Any:
    return tiny.seeded("BertForSequenceClassification")


def adapted_model() -> Any:
    model = plain_model()
    lorary.attach(model, lorary.plan(model, lorary.method("bitfit", "lora", r=2), "attention"))
    return tiny.shaken(model)


def refused(action: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(lorary.StateError) as refusal:
        action(*arguments, **options)
    return str(refusal.value)


def same_files(model: Any, folder: Path) -> None:
    lorary.save(model, folder / "found")
    lorary.save(adapted_model(), folder / "expected")
    for file in (folder / "expected").iterdir():
        assert (folder / "found" / file.name).read_bytes() == file.read_bytes()


def reading(model: Any, folder: Path) -> None:
    """All that changes nothing."""
    reference = adapted_model()
    same_files(model, folder)
    assert str(lorary.attached(model)) == str(lorary.attached(reference))
    assert lorary.Fingerprint.of(model) == lorary.Fingerprint.of(reference)
    names = [[group["name"] for group in lorary.param_groups(m, lr=1.0)] for m in (model, reference)]
    assert names[0] == names[1]


def switched_off(model: Any) -> None:
    expected, base = tiny.logits(model), tiny.logits(lorary.detach(adapted_model()))
    with lorary.disabled(model) as same:
        assert same is model
        assert torch.equal(tiny.logits(model), base)
    assert torch.equal(tiny.logits(model), expected)


def under_ddp(folder: Path) -> None:
    model = nn.parallel.DistributedDataParallel(adapted_model())
    reading(model, folder)
    switched_off(model)
    expected = tiny.logits(model)
    lorary.merge(model, keep=True)
    torch.testing.assert_close(tiny.logits(model), expected, rtol=1e-4, atol=1e-5)
    lorary.unmerge(model)
    assert lorary.detach(model) is model
    assert torch.equal(tiny.logits(model), tiny.logits(plain_model()))
    assert lorary.load(model, folder / "found") is model
    assert torch.equal(tiny.logits(model), expected)
    before = nn.parallel.DistributedDataParallel(plain_model())
    plan = lorary.plan(before, tiny.LORA, "attention")
    text = (
        "model: is wrapped in DistributedDataParallel, which averages the gradients of the parameters it was made with"
        "\n      hint: {} first, and wrap the model then"
    )
    assert text.format("attach") in refused(lorary.attach, before, plan)
    assert text.format("load") in refused(lorary.load, before, folder / "found", trainable=True)


def under_fsdp(folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    first = FullyShardedDataParallel(adapted_model(), use_orig_params=True, device_id=torch.device("cpu"))
    reading(first, folder)
    assert "is sharded by FSDP version 1" in refused(lorary.disabled(first).__enter__)
    second, plain = adapted_model(), plain_model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for model in (second, plain):
        for block in model.bert.encoder.layer:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    reading(second, folder)
    switched_off(second)
    plan = lorary.plan(plain, tiny.LORA, "attention")
    for model in (first, second):
        text = "is sharded by FSDP, which puts its own parameters back into the layers in every forward pass"
        for action in (lorary.merge, lorary.unmerge, lorary.detach, lorary.quantize):
            assert text in refused(action, model)
        assert text in refused(lorary.switch, model, None)
    assert "hint: attach first and shard then" in refused(lorary.attach, plain, plan)


def work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=1, timeout=timedelta(seconds=60))
    try:
        for check in (under_ddp, under_fsdp):
            check(Path(folder, check.__name__))
            Path(folder, f"{check.__name__} done").touch()
    finally:
        dist.destroy_process_group()


@pytest.mark.xdist_group(fresh.GROUP)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_ddp_and_fsdp(tmp_path: Path) -> None:
    fresh.together(work, fresh.free_port(), str(tmp_path), count=1)
    assert {path.name for path in tmp_path.glob("* done")} == {"under_ddp done", "under_fsdp done"}
