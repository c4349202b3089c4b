"""Law: sharded over two ranks with FSDP2, a model gives the forward pass and the gradients of one process."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import lorary
from lorary.errors import StateError
from lorary.layers.adapted import adapted_layers
from lorary.layers.quantized_weight import is_quantized
from lorary.methods.lora import Add
from lorary.spec import interfaces
from lorary.spec.calibration import CalibratedInit
from tests import fresh, tiny

from .cases import made_of

METHODS = [
    *((name,) for name in lorary.presets() if name != "prompt-tuning"),  # which is refused
    ("longlora", "qlora", "dora"),
    ("rslora", "lora+", "bitfit"),
    ("dora", "rslora", "pissa", "lora+"),
    ("vera", "dora"),
    ("melora", "dora", "lora-fa"),
    ("qlora", "dora"),
    ("qlora", "dora", "rslora", "pissa", "lora+"),
]


class Block(nn.Module):
    """A linear layer, a convolution and an embedding in one unit of sharding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.linear = nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.conv(self.table(ids).transpose(1, 2)).transpose(1, 2)
        return h + self.linear(torch.tanh(h))


def build(names: tuple[str, ...]) -> nn.Module:
    torch.manual_seed(0)
    if "longlora" in names:  # a language model in training, where it attends in groups
        model = tiny.llama(max_position_embeddings=3).train()
        lorary.attach(model, lorary.plan(model, made_of(*names, r=2, alpha=4.0, length=6)))
    elif names[0] in ("prefix-tuning", "prompt-tuning", "alora"):
        model = tiny.llama().train()
        options = {"invocation": (5,)} if "alora" in names else {"tokens": 3}
        lorary.attach(model, lorary.plan(model, lorary.method(*names, **options)))
    else:
        model = nn.Sequential(Block())
        fewer = {name: ["linear"] for name in ("houlsby", "loftq", "corda", "eva", "miss")}
        fewer |= {name: ["linear", "conv"] for name in ("lora-fa", "glora")} | {"rows": ["table"]}
        targets = next((fewer[name] for name in names if name in fewer), ["linear", "conv", "table"])
        method = made_of(*names) if names[0] in ("bitfit", "full") else made_of(*names, r=2, alpha=4.0)
        plan = lorary.plan(model, method, targets=targets)
        data = [torch.arange(12).reshape(2, 6)] if isinstance(method.init, CalibratedInit) else None
        lorary.attach(model, plan, data=data, loss=lambda y, _: (y**2).sum())
        assert is_quantized(getattr(model[0].linear, "base", None)) == bool({"qlora", "loftq"} & {*names})
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.2)
    return model


class _DependsOnTheRank(Add):
    """A join that is not the same on every rank, and on none what it is in one process."""

    def forward(self, layer: Any, x: Tensor) -> Tensor:
        return super().forward(layer, x) * (2.0 + dist.get_rank())


def shards_exactly(model: nn.Module, reference: nn.Module) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model if isinstance(model, nn.Sequential) else model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    ids = torch.arange(12).reshape(2, 6)
    y, expected = (getattr(out, "logits", out) for out in (model(ids), reference(ids)))
    assert (y - expected).abs().max() <= 1e-6, "forward"
    y.square().mean().backward()
    expected.square().mean().backward()
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            assert (p.grad.full_tensor() - q.grad).abs().max() <= 1e-6, name
    whole, alone = lorary.Adapter.of(model), lorary.Adapter.of(reference)  # gathered from all ranks
    for site, roles in alone.tensors.items():
        assert all(torch.equal(whole.tensors[site][role], t) for role, t in roles.items()), site
    assert all(torch.equal(whole.full[name], t) for name, t in alone.full.items())


def work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    try:
        for names in METHODS:
            shards_exactly(build(names), build(names))
            Path(folder, f"{rank} {'+'.join(names)}").touch()
        try:
            shards_exactly(build(("prompt-tuning",)), build(("prompt-tuning",)))
        except StateError:
            Path(folder, f"{rank} refused").touch()
        broken = build(("lora",))
        interfaces.COMPONENTS["_DependsOnTheRank"] = _DependsOnTheRank
        for layer in adapted_layers(broken).values():
            layer.method = layer.method.replace(join=_DependsOnTheRank())
        try:
            shards_exactly(broken, build(("lora",)))
        except AssertionError:
            Path(folder, f"{rank} caught").touch()
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.xdist_group(fresh.GROUP)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_shards_exactly(tmp_path: Path) -> None:
    fresh.together(work, fresh.free_port(), str(tmp_path))
    done = {path.name for path in tmp_path.iterdir()}
    assert {f"{rank} {'+'.join(names)}" for rank in (0, 1) for names in METHODS} <= done
    assert {"0 caught", "1 caught", "0 refused", "1 refused"} <= done
