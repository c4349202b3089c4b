"""Training of adapters one by one, written down independently of `lorary.train.shared_base`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import get_scheduler

import lorary
from lorary.train.shared_base.training import Settings

from ... import tiny

STEPS = 20

METHODS: dict[str, lorary.Method] = {
    "lora": lorary.method("lora", r=4, alpha=8.0),
    "rslora": lorary.method("rslora", r=3),
    "lora+": lorary.method("lora+", r=2),
    "lora-fa": lorary.method("lora-fa", r=4),
    "dora": lorary.method("dora", r=2),
    "vera": lorary.method("vera", r=8),
    "adalora": lorary.method("adalora", r=3, target=1, start=2, final=6),
    "melora": lorary.method("melora", r=2, n=2),
    "multilora": lorary.method("multilora", r=2, n=2),
    "pissa": lorary.method("pissa", r=2),
    "olora": lorary.method("olora", r=2),
    "glora": lorary.method("glora", r=2),
    "delta-lora": lorary.method("delta-lora", r=2, start=5),
    "o-lora": lorary.method("o-lora", r=2, norms=0.01),
    "bitfit": lorary.method("bitfit"),
    "ia3": lorary.method("ia3"),
    "houlsby": lorary.method("houlsby"),
    "norms": lorary.method("lora", r=2).replace(full=("*norm*",)),
}


def batches(seed: int, rows: int = 2, count: int = STEPS, length: int = 7) -> list[dict[str, Tensor]]:
    """Batches of padded text with a mask, of which some tokens have no label; of lengths that vary."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        tokens = length - i % 3
        ids = torch.randint(1, 40, (rows, tokens), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, -1 - i % 2 :] = 0
        labels = torch.where((mask == 1) & (torch.arange(tokens) > 1), ids, -100)
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def train_alone(
    base: Any, plan: lorary.Plan, settings: Settings, rows: Sequence[Mapping[str, Tensor]], seed: int = 0
) -> lorary.Adapter:
    """The adapter after its steps on a copy of the base, with the model's own loss."""
    model = copy.deepcopy(base)
    lorary.attach(model, plan, seed=seed)
    model.train()
    optimizer = lorary.optimizer(model, settings.lr, weight_decay=settings.weight_decay)
    warmup = int(settings.warmup)
    schedule = get_scheduler(settings.schedule, optimizer, warmup, settings.steps)
    rules = lorary.rules(model, settings.steps, optimizer)
    for batch in rows[: settings.steps]:
        loss = model(**batch).loss + rules.penalty()
        loss.backward()
        rules.after_backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        optimizer.step()
        rules.after_step()
        schedule.step()
        optimizer.zero_grad()
    return lorary.Adapter.of(model)


def distance(one: lorary.Adapter, other: lorary.Adapter) -> float:
    """The largest difference of two adapters' numbers."""
    assert one.sites == other.sites
    assert one.base == other.base
    pairs = [(t, other.tensors[site][role]) for site, roles in one.tensors.items() for role, t in roles.items()]
    pairs += [(t, other.full[name]) for name, t in one.full.items()]
    assert pairs
    return max(float((a - b).abs().max()) for a, b in pairs if a.numel())


def movement(base: Any, plan: lorary.Plan, adapter: lorary.Adapter, seed: int = 0) -> float:
    """How far an adapter has moved from its start."""
    model = copy.deepcopy(base)
    start = lorary.Adapter.of(lorary.attach(model, plan, seed=seed))
    moved = [
        float((t - start.tensors[site][role]).abs().max())
        for site, roles in adapter.tensors.items()
        for role, t in roles.items()
        if t.shape == start.tensors[site][role].shape and t.numel()
    ]
    moved += [float((t - start.full[name]).abs().max()) for name, t in adapter.full.items()]
    return max(moved)


def llama(**changes: Any) -> Any:
    """A tiny Llama with biases, whose norms and embeddings are its own."""
    base = tiny.seeded("LlamaForCausalLM", seed=1, attention_bias=True, tie_word_embeddings=False, **changes)
    torch.manual_seed(2)
    with torch.no_grad():  # larger weights, whose loss has a gradient worth speaking of
        for name, p in base.named_parameters():
            p.add_(torch.randn(p.shape) * (0.3 if p.dim() > 1 else 0.05) * (0.2 if "embed" in name else 1.0))
    return base
