"""The constant part of training memory: weights, adapters, gradients, and the state of optimizer and rules."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lorary.analysis.memory.memory import Memory
from lorary.layers.other_quantizers import stored_bytes
from lorary.layers.quantized_weight import is_quantized, stored_tensors
from lorary.model.plan import Plan
from lorary.spec.placement import unique_tensor_sets

PAGED_FROM = 100_000
"""Elements of a tensor from which bitsandbytes' paged optimizers keep its state on the host."""


def fixed(
    model: nn.Module,
    plan: Plan,
    dtype: torch.dtype | None = None,
    optimizer: str = "adamw_torch",
) -> Memory:
    """The items that follow from the plan; activations, logits and working are None.

    Args:
        model: the planned model, or its shapes.
        plan: from `lorary.plan`.
        dtype: of the frozen weights that are not quantised; None: unchanged.
        optimizer: as Transformers names it.
    """
    width = None if dtype is None else dtype.itemsize
    trained = [  # (elements, bytes) of every trained tensor; adapters are in fp32
        (math.prod(shape), 4 * math.prod(shape))
        for site in unique_tensor_sets(plan.sites)
        for role, shape in site.shapes.items()
        if role in site.method.trained
    ]
    trained += [(f.size, f.size * width if width else f.bytes) for f in plan.full if f.trains]
    state = sum(math.ceil(n * _state(optimizer, n, size // max(1, n))) for n, size in trained)
    rules = sum(rule.state_bytes(site.shapes) for site in plan.sites for rule in site.method.rules)
    gradients = sum(size for _, size in trained)
    return Memory(_weights(model, plan, width), plan.adapter_bytes, gradients, state, None, None, None, rules=rules)


def persistent_tensors(model: nn.Module, plan: Plan) -> int:
    """The number of persistent tensors."""
    adapters = sum(len(site.shapes) for site in unique_tensor_sets(plan.sites))
    return len({id(t) for _, t in _named(model)}) + 4 * adapters + 2 * len(plan.quantized)


_MOMENTS = {"ademamix": 3, "lion": 1, "rms": 1, "adagrad": 1}  # part of an optimizer's name -> its moments; else 2


def _state(optimizer: str, elements: int, itemsize: int) -> float:
    """Bytes of optimizer state on the device per element of a tensor.

    AdamW has two moments in the parameter's precision; its 8-bit form one scale per 256 elements, but fp32 moments for
    tensors below 4,096 elements; its paged form keeps those of large tensors on the host. Adafactor has a row and a
    column. AdEMAMix has three moments, Lion, RMSprop and Adagrad one.
    """
    moments = next((n for name, n in _MOMENTS.items() if name in optimizer), 2)
    if optimizer == "sgd" or (optimizer.startswith("paged") and elements >= PAGED_FROM):
        return 0.0
    if "8bit" in optimizer:
        return moments * (1 + 4 / 256) if elements >= 4096 else 4.0 * moments
    if optimizer == "adafactor":
        return 8 / math.sqrt(max(1, elements))
    return float(moments * itemsize)


def _weights(model: nn.Module, plan: Plan, width: int | None) -> int:
    to_quantize = {f"{name}.weight" for name in plan.quantized} | set(plan.quantized)  # experts are parameters
    quantized = {id(stored_tensors(m)[0]): m for m in model.modules() if is_quantized(m)}.values()
    counted = {id(t) for layer in quantized for t in stored_tensors(layer)}  # `width` does not apply to them
    total = sum(map(stored_bytes, quantized))
    for name, t in _named(model):
        if id(t) in counted:
            continue
        counted.add(id(t))
        if name in to_quantize:
            total += plan.method.storage.bytes(t.numel(), t.itemsize)
        else:
            total += t.numel() * (width if width and t.is_floating_point() else t.itemsize)
    return total


def _named(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]
