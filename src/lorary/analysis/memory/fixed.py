"""What does not change from step to step: weights, adapters, gradients, the optimizer's state, a rule's."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lorary.analysis.memory.memory import Memory
from lorary.layers.other_quantizers import stored
from lorary.layers.quantized_weight import is_quantized, stored_tensors
from lorary.model.plan import Plan
from lorary.spec.placement import unique_tensor_sets

PAGED_FROM = 100_000
"""Numbers in a tensor from which bitsandbytes' paged optimizers keep its state on the host."""


def fixed(
    model: nn.Module,
    plan: Plan,
    dtype: torch.dtype | None = None,
    optimizer: str = "adamw_torch",
) -> Memory:
    """The items that follow from the plan; what comes and goes is None.

    Args:
        model: the model that was planned, or its shapes.
        plan: what `lorary.plan` made of it.
        dtype: of the frozen weights that are not packed; None: as they are.
        optimizer: as Transformers names it.
    """
    adapters = [
        math.prod(shape) for p in unique_tensor_sets(plan.sites) for role, shape in p.shapes.items() if _trains(p, role)
    ]
    width = None if dtype is None else dtype.itemsize
    full = [f.size * width if width else f.bytes for f in plan.full if f.trains]
    numbers, kind = [*adapters, *(f.size for f in plan.full if f.trains)], [4] * len(adapters)
    kind += [width or f.bytes // max(1, f.size) for f in plan.full if f.trains]
    state = sum(math.ceil(n * _state(optimizer, n, size)) for n, size in zip(numbers, kind, strict=True))
    rules = sum(rule.state_bytes(p.shapes) for p in plan.sites for rule in plan.method.rules)
    gradients = 4 * sum(adapters) + sum(full)
    return Memory(_weights(model, plan, width), plan.adapter_bytes, gradients, state, None, None, None, rules=rules)


def tensors(model: nn.Module, plan: Plan) -> int:
    """How many tensors the fixed items are: as many roundings."""
    adapters = sum(len(p.shapes) for p in unique_tensor_sets(plan.sites))
    return sum(1 for _ in _all(model)) + 4 * adapters + 2 * len(plan.quantized)


def _trains(placed: Any, role: str) -> bool:
    return role in placed.method.trained


def _state(optimizer: str, numbers: int, size: int) -> float:
    """Bytes of state on the device for each number of a tensor, whose numbers have this size.

    AdamW keeps two moments in the parameter's precision; in 8 bits a scale for every 256 of each, but not of tensors
    below 4,096 numbers; a paged one keeps those of large tensors on the host. Adafactor keeps a row and a column.
    """
    if optimizer == "sgd" or (optimizer.startswith("paged") and numbers >= PAGED_FROM):
        return 0.0
    if "8bit" in optimizer:
        return 2 * (1 + 4 / 256) if numbers >= 4096 else 8.0
    if optimizer == "adafactor":
        return 8 / math.sqrt(max(1, numbers))
    return 2.0 * size


def _weights(model: nn.Module, plan: Plan, width: int | None) -> int:
    packed = {f"{name}.weight" for name in plan.quantized}
    there = {
        id(stored_tensors(m)[0]): m for m in model.modules() if is_quantized(m)
    }.values()  # their precision never changes
    known = {id(t) for layer in there for t in stored_tensors(layer)}
    total = sum(map(stored, there))
    for name, t in _named(model):
        if id(t) in known:
            continue
        known.add(id(t))
        if name in packed:
            total += plan.method.storage.bytes(t.numel(), t.itemsize)
        else:
            total += t.numel() * (width if width and t.is_floating_point() else t.itemsize)
    return total


def _named(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _all(model: nn.Module) -> Iterable[Tensor]:
    return {id(t): t for _, t in _named(model)}.values()
