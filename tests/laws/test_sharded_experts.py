"""Law: adapted experts over two processes, sharded with FSDP2 or replicated by DDP, train as in one."""

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
from lorary.layers.experts import ExpertLayer
from tests import fresh
from tests.experts import IDS, moe, shake

from .test_shards import shards_exactly

CASES = [
    ("MixtralForCausalLM", ("lora",)),
    ("MixtralForCausalLM", ("dora",)),
    ("MixtralForCausalLM", ("vera",)),
    ("MixtralForCausalLM", ("qlora",)),
    ("GptOssForCausalLM", ("pissa",)),
    ("GptOssForCausalLM", ("qlora", "pissa")),
    ("Llama4ForCausalLM", ("qlora",)),
]
STEPS = 3


def build(name: str, presets: tuple[str, ...]) -> Any:
    model = moe(name)
    targets = ["q_proj", "experts.gate_up_proj", "experts.down_proj"]
    lorary.attach(model, lorary.plan(model, lorary.method(*presets, r=2), targets=targets))
    assert sum(isinstance(m, ExpertLayer) for m in model.modules()) == 4
    shake(model, 0.05)
    return model


def losses(model: nn.Module, rows: Tensor) -> list[float]:
    """The loss of these rows before each step, averaged over the processes."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    for _ in range(STEPS):
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        mean = loss.detach().clone()
        if dist.is_initialized() and len(rows) < len(IDS):
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        found.append(float(mean))
        optimizer.step()
        optimizer.zero_grad()
    return found


def sharded(model: Any) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    try:
        for name, presets in CASES:
            shards_exactly(build(name, presets), build(name, presets))
            Path(folder, f"{rank} {name} {'+'.join(presets)}").touch()
        for name, presets in (CASES[0], CASES[3]):
            alone = losses(build(name, presets), IDS)
            replicated = nn.parallel.DistributedDataParallel(build(name, presets))
            for way, model in (("DDP", replicated), ("FSDP2", sharded(build(name, presets)))):
                together = losses(model, IDS[rank : rank + 1])
                assert alone[0] - alone[-1] > 0.1, "nothing was learned"
                assert together == pytest.approx(alone, rel=1e-5), way
                Path(folder, f"{rank} {way} {'+'.join(presets)}").touch()
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.xdist_group(fresh.GROUP)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_two_processes_compute_and_learn_as_one(tmp_path: Path) -> None:
    fresh.together(work, fresh.free_port(), str(tmp_path))
    done = {path.name for path in tmp_path.iterdir()}
    expected = {f"{name} {'+'.join(presets)}" for name, presets in CASES}
    expected |= {f"{way} {method}" for way in ("DDP", "FSDP2") for method in ("lora", "qlora")}
    assert done == {f"{rank} {what}" for rank in (0, 1) for what in expected}
